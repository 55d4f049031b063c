from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta, timezone

import pytest

from millpond.cli.output import Output, one_line, printable, to_json
from millpond.cli.records import error_text, payload_fields, timestamp
from millpond.cli.settings import _fields_formatter


def test_json_is_one_line_in_the_order_given() -> None:
    assert to_json({"b": 1, "a": "ü\n", "c": None}) == '{"b":1,"a":"ü\\n","c":null}\n'.encode()


def test_json_takes_what_attributes_may_hold() -> None:
    record = json.loads(to_json({"at": datetime(2025, 1, 1, tzinfo=UTC), "raw": b"\xff\x00"}))
    assert record == {"at": "2025-01-01 00:00:00+00:00", "raw": "\\xff\x00"}


def test_a_payload_is_text_or_marked_base64_or_marked_as_left_out() -> None:
    assert payload_fields("ü".encode()) == {"payload": "ü", "payload_encoding": "utf-8"}
    assert payload_fields(b"") == {"payload": "", "payload_encoding": "utf-8"}
    assert payload_fields(b"\xff\x00") == {"payload": "/wA=", "payload_encoding": "base64"}
    assert payload_fields(None) == {"payload": None, "payload_encoding": "omitted"}


def test_times_are_utc_with_milliseconds() -> None:
    moment = datetime(2025, 6, 15, 17, 6, 40, 123_456, tzinfo=timezone(timedelta(hours=2)))
    assert timestamp(moment) == "2025-06-15T15:06:40.123Z"
    assert timestamp(None) is None


def test_text_for_people_cannot_steer_their_terminal() -> None:
    assert printable("a\x1b[2Jb\r") == "a\\x1b[2Jb\\r"
    assert printable("a\nb", indent=2) == "a\n  b"
    assert one_line("a\nb" + "c" * 200).startswith("a ⏎ bccc")
    assert len(one_line("c" * 200)) == 120


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (None, ""),
        ("plain", "plain"),
        ({"error": "exit code 1", "stderr": "boom\n"}, "exit code 1: boom"),
        ({"error": "exit code 1", "stderr": ""}, "exit code 1"),
        ({"type": "KeyError", "message": "'a'", "traceback": "…"}, "KeyError: 'a'"),
        ({"type": "Stop", "message": "", "traceback": ""}, "Stop"),
        ({"other": 1}, "{'other': 1}"),
    ],
)
def test_the_gist_of_a_last_error(error: object, text: str) -> None:
    assert error_text(error) == text


def test_off_a_terminal_a_table_is_aligned_text(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    output = Output()
    output.rows(("queue", "ready"), [("a", 1), ("long-name", 1000)])
    output.flush()
    assert capfdbinary.readouterr().out == b"QUEUE      READY\na              1\nlong-name   1000\n"


def test_notes_go_to_stderr_and_quiet_silences_them(capsys: pytest.CaptureFixture[str]) -> None:
    Output().note("hello")
    Output(quiet=True).note("hush")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "millpond: hello\n")


def test_what_consumers_say_cannot_pass_for_a_line_of_the_log() -> None:
    record = logging.makeLogRecord({"msg": "millpond.message.dead_lettered", "levelname": "WARNING"})
    record.reason = "\x1b[2Jgone\nmillpond: ERROR: all is lost" + "!" * 5000
    line = _fields_formatter("millpond: %(levelname)s: %(message)s").format(record)
    assert line.startswith(
        "millpond: WARNING: millpond.message.dead_lettered reason=\\x1b[2Jgone ⏎ millpond: ERROR: all"
    )
    assert "\n" not in line
    assert len(line) < 1100
