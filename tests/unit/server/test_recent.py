"""The memory of what was handed out: bounded, and the latest are in it."""

from __future__ import annotations

from millpond.server.recent import Recent


def test_the_latest_are_known_and_the_others_forgotten() -> None:
    recent = Recent(capacity=10)
    for number in range(1000):
        recent.add(str(number))
        assert len(recent) <= 20
        assert all(str(each) in recent for each in range(max(0, number - 8), number + 1))
    assert "1" not in recent
