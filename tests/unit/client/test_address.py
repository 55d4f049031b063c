"""URLs of servers: what they mean, and what is wrong with them."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest

import millpond
from millpond import Config, InvalidInput, Keyring
from millpond.client.address import parse
from millpond.client.pond import RemotePond


@pytest.mark.parametrize(
    ("url", "endpoints"),
    [
        ("http://host", ("http://host:9341",)),
        ("http://Host:80/", ("http://host:80",)),
        ("HTTPS://a:1,b,c:3", ("https://a:1", "https://b:9341", "https://c:3")),
        ("http://a:1,http://b:2,a:1", ("http://a:1", "http://b:2")),
        ("http://10.0.0.1:1/deep/path/", ("http://10.0.0.1:1/deep/path",)),
        ("http://[::1]:1,[fe80::1]", ("http://[::1]:1", "http://[fe80::1]:9341")),
    ],
)
def test_endpoints(url: str, endpoints: tuple[str, ...]) -> None:
    address = parse(url, {})
    assert address.endpoints == endpoints
    assert (address.token, address.timeout) == (None, 30.0)
    assert address.secure == url.lower().startswith("https")


def test_options_stand_in_the_query_or_beside_it() -> None:
    address = parse("https://a?token=t%2Bt&timeout=2.5&ca=%2Fx%2Fca.pem&cert=c&key=k", {"token": None})
    assert (address.token, address.timeout, address.ca, address.cert, address.key) == (
        "t+t",
        2.5,
        "/x/ca.pem",
        "c",
        "k",
    )
    assert parse("https://a?token=a&timeout=1", {"token": "b", "timeout": 3}).token == "b"


@pytest.mark.parametrize(
    ("url", "given", "words"),
    [
        ("http://", {}, "names no server"),
        ("http://,", {}, "names no server"),
        ("http:host", {}, "names no server"),
        ("http://user:secret@host", {}, "give a token"),
        ("http://a#b", {}, "no #"),
        ("http://a:", {}, "no host and port"),
        ("http://:80", {}, "no host and port"),
        ("http://a:0", {}, "1 to 65535"),
        ("http://a:65536", {}, "1 to 65535"),
        ("http://a:x", {}, "1 to 65535"),
        ("http://a b", {}, "no host and port"),
        ("http://ä", {}, "no host and port"),
        ("http://[::1", {}, "no host and port"),
        ("http://a,,b", {}, "no host and port"),
        ("http://" + ",".join(f"h{n}" for n in range(65)), {}, "more than 64"),
        ("http://a?colour=red", {}, "colour"),
        ("http://a?token", {}, "name=value"),
        ("http://a?timeout=soon", {}, "not a number"),
        ("http://a?timeout=0", {}, "more than 0"),
        ("http://a", {"timeout": float("nan")}, "more than 0"),
        ("http://a", {"timeout": "5"}, "more than 0"),
        ("http://a", {"token": ""}, "token must be text"),
        ("http://a", {"token": 5}, "token must be text"),
        ("http://a", {"token": "two words"}, "printable ASCII"),
        ("http://a", {"token": "line\r\nbreak"}, "printable ASCII"),
        ("http://a", {"ca": "x"}, "https"),
        ("https://a", {"key": "x"}, "cert"),
    ],
)
def test_what_is_wrong_is_said(url: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as raised:
        millpond.connect(url, **given)
    assert "secret" not in str(raised.value)


def test_files_that_are_no_certificates(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("nothing")
    for options in ({"ca": "missing.pem"}, {"ca": str(wrong)}, {"cert": str(wrong)}, {"cert": "missing.pem"}):
        with pytest.raises(InvalidInput, match=next(iter(options))):
            millpond.connect("https://a", **options)


def test_what_belongs_to_the_server() -> None:
    for options in ({"config": Config()}, {"keyring": Keyring({"k": bytes(32)})}, {"accept_plain": True}):
        with pytest.raises(InvalidInput, match="give them to it"):
            millpond.connect("http://a", **options)
    with pytest.raises(InvalidInput, match="token"):
        millpond.connect("memory://", token="t")


async def test_what_needs_the_store_itself() -> None:
    pond = millpond.connect("http://a:1,b:2")
    for call in (
        pond.verify(),
        pond.collect(),
        pond.rekey(),
        pond.unreadable("q"),
        pond.discard_unreadable("q", "0197a3c2-0000-7000-8000-000000000001"),
    ):
        with pytest.raises(InvalidInput, match=r"run it where that is.*http://a:1, http://b:2"):
            await call
    with pytest.raises(AttributeError, match="in the server"):
        _ = pond.store
    assert not hasattr(pond, "colour")
    assert pond.requests().total.total == 0
    assert not pond.capabilities.requests_cost_money


def test_what_workers_ask_of_a_pond() -> None:
    pond = millpond.connect("http://a:1?timeout=5", token="t")
    assert not pond.is_open
    twin = pond.twin()
    assert isinstance(twin, RemotePond)
    assert twin is not pond
    assert (twin.transport.where, twin.transport._address) == ("http://a:1", pond.transport._address)  # type: ignore[attr-defined]

    @pond.consumer("orders")
    async def handle(payload: bytes) -> None: ...

    assert list(pond.consumers) == ["handle"]


def test_a_local_store_loads_nothing_of_it() -> None:
    script = (
        "import sys, millpond; millpond.connect('memory://'); "
        "print([name for name in sys.modules if name.startswith(('millpond.client', 'millpond.wire', 'aiohttp'))])"
    )
    done = run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
