"""The framing, byte by byte: every place at which a body can be cut, and every tail that looks like a delimiter."""

from __future__ import annotations

import email
import email.policy
import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.wire import multipart
from millpond.wire.multipart import Begin, Close, Data, End, Event, MultipartError, Parser, Writer, boundary_of

BOUNDARY = "b0undary"
MARK = b"--" + BOUNDARY.encode()

TRAPS = [
    b"",
    b"x",
    b"\r",
    b"\n",
    b"\r\n",
    b"\r\n-",
    b"\r\n--",
    b"\r\n--b0und",
    b"\r\n" + MARK[:-1],
    b"\r\n" + MARK + b"x",
    b"\r\n" + MARK + b"-x",
    b"\r\n" + MARK + b" x",
    b"\r\n" + MARK + b"\rx",
    b"\r\n" + MARK + b"\n",
    MARK,
    MARK + b"--",
    b"\n" + MARK + b"\r\n",
    b"\r\r\n--\r\n\r\n",
    b"a\r\n\r\nb",
    b"\r" * 30,
    bytes(range(256)),
]
"""Payloads that end in, or hold, what a delimiter begins with."""


class Part:
    """What a reader makes of the events of one part."""

    def __init__(self, begin: Begin) -> None:
        self.begin = begin
        self.data = b""
        self.ended = False


def read(parser: Parser, pieces: Iterable[bytes]) -> list[Part]:
    parts: list[Part] = []
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    for event in events:
        if isinstance(event, Begin):
            assert not parts or parts[-1].ended
            parts.append(Part(event))
        elif isinstance(event, Data):
            assert event.data
            assert not parts[-1].ended
            parts[-1].data += event.data
        elif isinstance(event, End):
            parts[-1].ended = True
        else:
            assert event is events[-1]
    return parts


def body_of(*payloads: bytes) -> bytes:
    """As any sender writes it: delimiters before each part and after the last."""
    parts = b"".join(
        b"\r\n" + MARK + b'\r\nContent-Disposition: form-data; name="p"\r\n\r\n' + payload for payload in payloads
    )
    return (parts + b"\r\n" + MARK + b"--\r\n")[2:]


@pytest.mark.parametrize("payload", TRAPS)
def test_a_body_cut_anywhere_is_the_same(payload: bytes) -> None:
    body = body_of(payload, b"second")
    for at in range(len(body) + 1):
        parser = Parser(BOUNDARY.encode())
        parts = read(parser, [body[:at], body[at:]])
        assert [(part.data, part.ended) for part in parts] == [(payload, True), (b"second", True)], at
        assert parser.closed
        parser.finish()


@pytest.mark.parametrize("payload", TRAPS)
def test_a_body_that_comes_byte_by_byte_is_the_same(payload: bytes) -> None:
    body = body_of(payload, payload)
    parts = read(Parser(BOUNDARY.encode()), [body[at : at + 1] for at in range(len(body))])
    assert [part.data for part in parts] == [payload, payload]


@pytest.mark.parametrize("payload", TRAPS)
@pytest.mark.parametrize("trust", [False, True])
def test_a_message_is_whole_before_the_next_one_comes(payload: bytes, trust: bool) -> None:
    """Held back neither by what the payload ends in, nor by what may follow the early delimiter."""
    writer = Writer(BOUNDARY)
    parser = Parser(BOUNDARY.encode(), trust_lengths=trust)
    sent = writer.open
    for number in range(3):
        sent += writer.head(b"{}\n", len(payload), b"text/plain") + payload + writer.after
        parts = read(parser, [sent])
        if number == 0:
            assert [part.begin.name for part in parts] == ["meta", "payload"]
            assert parts[-1].begin.headers["content-type"] == "text/plain"
        assert parts[-1].data == payload
        assert parts[-1].begin.length == len(payload)
        assert parts[-1].ended == trust
        # Without trust its end, which was held back, comes with the next message.
        parser = Parser(BOUNDARY.encode(), trust_lengths=trust)
    parts = read(parser, [sent + writer.close])
    assert [part.data for part in parts] == [b"{}\n", payload] * 3
    assert parser.closed


def test_a_trusted_length_lets_a_payload_hold_the_delimiter() -> None:
    writer = Writer(BOUNDARY)
    payload = b"a\r\n" + MARK + b"\r\n\r\nb\r\n" + MARK + b"--\r\n"
    body = writer.open + writer.head(b"{}\n", len(payload), b"x/y") + payload + writer.after + writer.close
    for at in range(len(body)):
        parts = read(Parser(BOUNDARY.encode(), trust_lengths=True), [body[:at], body[at:]])
        assert [part.data for part in parts] == [b"{}\n", payload]


def test_a_payload_longer_than_its_trusted_length_is_refused() -> None:
    writer = Writer(BOUNDARY)
    body = writer.open + writer.head(b"{}\n", 3, b"x/y") + b"four" + writer.after + writer.close
    with pytest.raises(MultipartError, match="longer than its Content-Length"):
        read(Parser(BOUNDARY.encode(), trust_lengths=True), [body])


def test_what_the_writer_writes_is_multipart_to_others() -> None:
    writer = Writer(BOUNDARY)
    body = writer.open
    for number, payload in enumerate([b"one", b"", b"three\r\n"]):
        body += writer.head(b'{"n":%d}\n' % number, len(payload), b"application/x-y", number) + payload + writer.after
    body += writer.close
    head = f'Content-Type: multipart/related; boundary="{BOUNDARY}"\r\nMIME-Version: 1.0\r\n\r\n'
    message = email.message_from_bytes(head.encode() + body, policy=email.policy.HTTP)
    parts = list(message.iter_parts())  # type: ignore[attr-defined]
    assert not message.defects
    assert [part.get_param("name", header="content-disposition") for part in parts] == ["meta", "payload"] * 3
    assert [part.get_filename() for part in parts[:2]] == ["meta-0.json", "payload-0"]
    assert [part.get_payload(decode=True) for part in parts[1::2]] == [b"one", b"", b"three\r\n"]


def test_preamble_padding_and_epilogue_are_passed_over() -> None:
    body = b"hello\r\n" + MARK + b"  \t\r\nA: 1\r\n\r\nx\r\n" + MARK + b" \r\n\r\ny\r\n" + MARK + b"-- \r\nbye" + MARK
    parser = Parser(BOUNDARY.encode())
    parts = read(parser, [body[at : at + 1] for at in range(len(body))])
    assert [(part.begin.headers, part.data) for part in parts] == [({"a": "1"}, b"x"), ({}, b"y")]
    assert parser.feed(b"more") == []


def test_a_body_that_ends_early_is_told() -> None:
    body = body_of(b"payload")
    for at in range(len(body) - 3):
        parser = Parser(BOUNDARY.encode())
        parser.feed(body[:at])
        with pytest.raises(MultipartError, match="ends before its closing delimiter"):
            parser.finish()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"x" * 20_000, "is the boundary right"),
        (MARK + b"\r\nA: " + b"x" * 20_000, "headers take more than"),
        (MARK + b"\r\n" + b"A: 1\r\n" * 33 + b"\r\n", "more than 32 headers"),
        (MARK + b"\r\nno colon\r\n\r\n", "that is none"),
        (MARK + b"\r\nA: 1\r\n  folded\r\n\r\n", "that is none"),
        (MARK + b"\r\nA : 1\r\n\r\n", "that is none"),
        (MARK + b"\r\nA: \0\r\n\r\n", "that is none"),
        (MARK + b"\r\nA: 1\n\r\n\r\n", "that is none"),
    ],
)
def test_what_is_none_is_refused_and_nothing_is_kept(body: bytes, why: str) -> None:
    with pytest.raises(MultipartError, match=why):
        read(Parser(BOUNDARY.encode()), [body[at : at + 1000] for at in range(0, len(body), 1000)])


def test_a_long_body_is_passed_on_and_not_kept() -> None:
    parser = Parser(BOUNDARY.encode())
    parser.feed(MARK + b"\r\n\r\n")
    for _ in range(100):
        [event] = parser.feed(b"\r" * 1000)
        assert isinstance(event, Data)
        assert len(event.data) >= 999
        assert len(parser._buffer) < 32
    # Spaces after a delimiter are no way to make it keep more.
    parser.feed(b"\r\n" + MARK)
    for _ in range(100):
        parser.feed(b" " * 1000)
        assert len(parser._buffer) < 2000


@pytest.mark.parametrize(
    ("value", "boundary"),
    [
        ("multipart/related; boundary=abc", b"abc"),
        ('multipart/form-data; charset=x; boundary="a b(c)"', b"a b(c)"),
        ('Multipart/Mixed;BOUNDARY="a\\"', None),
        ('multipart/mixed; boundary="q\\:r"', b"q:r"),
        ("multipart/mixed; boundary=", None),
        ("multipart/mixed", None),
        ("application/json; boundary=abc", None),
        ('multipart/mixed; x="; boundary=no"; boundary=yes', b"yes"),
        ("multipart/mixed; boundary=" + "x" * 70, b"x" * 70),
        ("multipart/mixed; boundary=" + "x" * 71, None),
        ('multipart/mixed; boundary="x "', None),
        ('multipart/mixed; boundary="x\r\ny"', None),
        ("", None),
        (";;;", None),
    ],
)
def test_the_boundary_of_a_content_type(value: str, boundary: bytes | None) -> None:
    assert boundary_of(value) == boundary


def test_names_and_parameters_are_unquoted() -> None:
    disposition = 'form-data; filename="; name=no"; Name="yes\\"y"; name=later'
    assert begun(f"Content-Disposition: {disposition}").name == 'yes"y'
    assert begun("A: b").name is None
    assert begun("Content-Length: 12").length == 12
    assert begun("Content-Length: -1").length is None
    assert begun("Content-Length: ²").length is None
    assert begun("Content-Length: 12").headers == {"content-length": "12"}


def begun(header: str) -> Begin:
    [begin] = Parser(b"x").feed(b"--x\r\n" + header.encode("latin-1") + b"\r\n\r\n")
    assert isinstance(begin, Begin)
    return begin


noise = st.lists(
    st.sampled_from([b"\r", b"\n", b"-", b"--", MARK, b"\r\n" + MARK, b"\r\n", b" ", b"x", b"A: 1", b"--\r\n", b"\0"])
    | st.binary(max_size=4),
    max_size=30,
).map(b"".join)


@given(noise, st.lists(st.integers(0, 120), max_size=8))
def test_any_bytes_however_cut_give_the_same_or_are_refused(body: bytes, cuts: list[int]) -> None:
    def outcome(pieces: list[bytes]) -> list[tuple[dict[str, str], bytes, bool]] | str:
        try:
            return [(part.begin.headers, part.data, part.ended) for part in read(Parser(BOUNDARY.encode()), pieces)]
        except MultipartError as error:
            return str(error)

    at = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    pieces = [body[start:end] for start, end in itertools.pairwise(at)]
    whole, cut = outcome([body]), outcome(pieces)
    assert whole == cut


@given(st.lists(noise.filter(lambda payload: MARK not in payload), min_size=1, max_size=4), st.integers(1, 40))
def test_payloads_come_back_as_they_were(payloads: list[bytes], size: int) -> None:
    body = body_of(*payloads)
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    assert [part.data for part in read(Parser(BOUNDARY.encode()), pieces)] == payloads


@given(noise, noise, st.sampled_from(["", "--", "x", "\r\n", " "]))
def test_the_short_way_for_two_parts_says_what_the_long_way_says(one: bytes, two: bytes, odd: str) -> None:
    for body in (body_of(one, two), body_of(one, two) + odd.encode(), odd.encode() + body_of(one, two), one + two):
        pair = multipart.pair(body, BOUNDARY.encode())
        if pair is None:
            continue
        parser = Parser(BOUNDARY.encode())
        parts = read(parser, [body])
        assert parser.closed
        assert [(part.begin, part.data) for part in parts] == [(pair[0], pair[1]), (pair[2], pair[3])]


@pytest.mark.parametrize("at", [0, 1])
def test_the_short_way_is_not_taken_for_a_longer_boundary(at: int) -> None:
    pieces = body_of(b"{}", b"payload").split(MARK + b"\r\n")
    odd = pieces[0] + [MARK + b"\r\n", MARK + b"xx"][at == 0] + pieces[1]
    odd += [MARK + b"\r\n", MARK + b"xx"][at == 1] + pieces[2]
    assert len(odd) == len(body_of(b"{}", b"payload"))
    assert multipart.pair(odd, BOUNDARY.encode()) is None


def test_the_short_way_is_taken_for_what_clients_send() -> None:
    for payload in TRAPS:
        taken = multipart.pair(body_of(b"{}", payload), BOUNDARY.encode())
        if MARK not in payload:
            assert taken is not None
            assert (taken[0].name, taken[1], taken[3]) == ("p", b"{}", payload)


@given(st.text(max_size=60))
def test_no_content_type_is_too_odd(value: str) -> None:
    kind, found = multipart.parameters(value)
    assert kind == kind.lower()
    assert all(name == name.lower() for name in found)
    assert Close() in Parser(boundary_of(value) or b"x").feed(b"--" + (boundary_of(value) or b"x") + b"--")
