"""lockd's framing: messages as pairs of parts, ``meta`` and ``payload``, in a multipart body.

The parser takes bytes as they come and gives events; it holds back no more than what might be the beginning of a
delimiter, and what a part's headers may take. The writer ends each payload with the delimiter of what comes next
(``CRLF--boundary``), before it is known what that is. A reader of multipart holds back a tail that may be the beginning
of a delimiter; with the delimiter there it need not, so that no message waits for the next one, whatever it ends in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, NamedTuple

MAX_HEADER_BYTES = 16 * 1024
"""Of one part; lockd's clients send some hundred."""
MAX_HEADERS = 32
MAX_PREAMBLE = 16 * 1024
"""Bytes before the first delimiter; nobody sends any."""
MAX_PADDING = 64
"""Spaces that may follow a delimiter on its line."""

CACHED = 256
"""Blocks of headers, and content types, whose meaning is remembered: those of so many kinds of clients."""
CACHED_BYTES = 512
"""Longer ones are not."""

_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'\s*;\s*({_TOKEN})\s*=\s*("(?:[^"\\]|\\.)*"|[^;"\s]*)', re.DOTALL)
_TYPE = re.compile(rf"\s*({_TOKEN}/{_TOKEN}|{_TOKEN})")
_HEADER = re.compile(rf"({_TOKEN}):[ \t]*([^\r\n\0]*?)[ \t]*")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


class MultipartError(ValueError):
    """These bytes are no multipart body."""


class Begin(NamedTuple):
    """A part begins."""

    headers: Mapping[str, str]
    """By lower-case name; of one given twice the first counts."""
    name: str | None
    """The ``name`` of its Content-Disposition."""
    length: int | None
    """Its Content-Length, if it has a usable one."""


class Data(NamedTuple):
    """Some bytes of the part's body; never empty."""

    data: bytes


class End(NamedTuple):
    """The part is complete."""


class Close(NamedTuple):
    """The closing delimiter; what follows it is ignored."""


Event = Begin | Data | End | Close

_END: Final = End()
_CLOSE: Final = Close()


def parameters(value: str) -> tuple[str, dict[str, str]]:
    """A header's value and its parameters, by lower-case name, unquoted; of one given twice the first counts."""
    found = _TYPE.match(value)
    if found is None:
        return "", {}
    result: dict[str, str] = {}
    at = found.end()
    while (parameter := _PARAMETER.match(value, at)) is not None:
        name, text = parameter.group(1).lower(), parameter.group(2)
        if text[:1] == '"':
            text = _ESCAPED.sub(r"\1", text[1:-1])
        result.setdefault(name, text)
        at = parameter.end()
    return found.group(1).lower(), result


def boundary_of(content_type: str) -> bytes | None:
    """The boundary in a ``multipart/…`` Content-Type; None for another type, or without a usable one."""
    return _seen_boundary(content_type) if len(content_type) <= CACHED_BYTES else _boundary(content_type)


def _boundary(content_type: str) -> bytes | None:
    kind, found = parameters(content_type)
    boundary = found.get("boundary", "")
    if not kind.startswith("multipart/") or _BOUNDARY.fullmatch(boundary) is None:
        return None
    return boundary.encode()


_seen_boundary = lru_cache(CACHED)(_boundary)


def pair(body: bytes, boundary: bytes) -> tuple[Begin, bytes, Begin, bytes] | None:
    """The two parts of a whole body that has exactly two and nothing unusual about it: what `Parser` says of it, for a
    fraction of the work. None for any other body, which may be right or wrong."""
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, 4)
    if len(pieces) != 4 or pieces[0] or pieces[3][:2] != b"--":
        return None
    first, second = pieces[1], pieces[2]
    if first[:2] != b"\r\n" or second[:2] != b"\r\n":
        return None
    one, found_one, first = first[2:].partition(b"\r\n\r\n")
    two, found_two, second = second[2:].partition(b"\r\n\r\n")
    if not (one and two and found_one and found_two) or len(one) + 4 > CACHED_BYTES or len(two) + 4 > CACHED_BYTES:
        return None
    if one[:2] == b"\r\n" or two[:2] == b"\r\n":
        return None
    return _begin(one), first, _begin(two), second


class Parser:
    """Reads one multipart body."""

    def __init__(self, boundary: bytes, *, trust_lengths: bool = False) -> None:
        """``trust_lengths``: a part with a Content-Length ends after so many bytes, without a look at them; its end is
        known at once, and its content may be anything. For the answers of a server, whose lengths are right."""
        self._delimiter = b"\r\n--" + boundary
        self._trust = trust_lengths
        # As if a line had ended before: then the first delimiter is like all others.
        self._buffer = b"\r\n"
        self._state = self._preamble
        self._skipped = -2
        self._left = 0
        self.closed = False
        """The closing delimiter was met."""

    def feed(self, data: bytes) -> list[Event]:
        """What ``data`` brings. Raises MultipartError."""
        events: list[Event] = []
        self._buffer = self._buffer + data if self._buffer else data
        while self._state(events):
            pass
        return events

    def finish(self) -> None:
        """The body is over. Raises MultipartError if it ended early."""
        if not self.closed:
            raise MultipartError("the body ends before its closing delimiter")

    # The states: each takes what it can from the buffer, and says whether another is to go on

    def _delimited(self, start: int = 0) -> tuple[int, int, bool]:
        """Where the next delimiter begins, where it ends, and whether it closes. An end of 0: it takes more bytes to
        know whether this is one. A begin at the end of the buffer: there is none before."""
        buffer, delimiter = self._buffer, self._delimiter
        while True:
            at = buffer.find(delimiter, start)
            if at < 0:
                # The longest tail that may be the beginning of one.
                tail = max(start, len(buffer) - len(delimiter) + 1)
                while (tail := buffer.find(b"\r", tail)) >= 0:
                    if delimiter.startswith(buffer[tail:]):
                        return tail, 0, False
                    tail += 1
                return len(buffer), 0, False
            after = at + len(delimiter)
            following = buffer[after : after + MAX_PADDING + 2]
            if following[:2] == b"--":
                return at, after + 2, True
            padding = following.lstrip(b" \t")
            if padding[:2] == b"\r\n":
                return at, after + len(following) - len(padding) + 2, False
            if padding in {b"", b"\r"} and len(following) < MAX_PADDING + 2:
                return at, 0, False
            if following == b"-":
                return at, 0, False
            start = at + 1  # A longer boundary, or text that begins like ours.

    def _preamble(self, events: list[Event]) -> bool:
        at, end, last = self._delimited()
        self._skipped += at
        if self._skipped > MAX_PREAMBLE:
            raise MultipartError("no part begins; is the boundary right?")
        if not end:
            self._buffer = self._buffer[at:]
            return False
        return self._delimiter_passed(events, end, last)

    def _delimiter_passed(self, events: list[Event], end: int, last: bool) -> bool:
        if last:
            self._buffer = b""
            self.closed = True
            self._state = self._epilogue
            events.append(_CLOSE)
            return False
        self._buffer = self._buffer[end:]
        self._state = self._headers
        return True

    def _headers(self, events: list[Event]) -> bool:
        buffer = self._buffer
        if buffer[:2] == b"\r\n":
            block, rest = b"", 2
        else:
            end = buffer.find(b"\r\n\r\n", 0, MAX_HEADER_BYTES)
            if end < 0:
                if len(buffer) >= MAX_HEADER_BYTES:
                    raise MultipartError(f"a part's headers take more than {MAX_HEADER_BYTES} bytes")
                return False
            block, rest = buffer[:end], end + 4
        begin = _begin(block)
        events.append(begin)
        self._buffer = buffer[rest:]
        length = begin.length if self._trust else None
        if length is not None:
            self._left = length
            self._state = self._counted
        else:
            self._state = self._body
        return True

    def _body(self, events: list[Event]) -> bool:
        at, end, last = self._delimited()
        if at:
            events.append(Data(self._buffer[:at]))
        if not end:
            self._buffer = self._buffer[at:]
            return False
        events.append(_END)
        return self._delimiter_passed(events, end, last)

    def _counted(self, events: list[Event]) -> bool:
        buffer = self._buffer
        if self._left:
            data = buffer[: self._left]
            if not data:
                return False
            events.append(Data(data))
            self._left -= len(data)
            self._buffer = buffer[len(data) :]
            if self._left:
                return False
        events.append(_END)
        self._state = self._between
        return True

    def _between(self, events: list[Event]) -> bool:
        """After a part that was read by its length: nothing but a delimiter may follow."""
        at, end, last = self._delimited()
        if at:
            raise MultipartError("a part is longer than its Content-Length")
        if not end:
            return False
        return self._delimiter_passed(events, end, last)

    def _epilogue(self, events: list[Event]) -> bool:
        self._buffer = b""
        return False


def _begin(block: bytes) -> Begin:
    # A client's are the same for each message, but for a length.
    cached = len(block) <= CACHED_BYTES and b"ength" not in block
    return _seen_block(block) if cached else _read_block(block)


def _read_block(block: bytes) -> Begin:
    headers = _parsed(block)
    name = parameters(headers.get("content-disposition", ""))[1].get("name")
    text = headers.get("content-length", "")
    length = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
    return Begin(headers, name, length)


_seen_block = lru_cache(CACHED)(_read_block)


def _parsed(block: bytes) -> dict[str, str]:
    if not block:
        return {}
    lines = block.decode("latin-1").split("\r\n")
    if len(lines) > MAX_HEADERS:
        raise MultipartError(f"a part has more than {MAX_HEADERS} headers")
    result: dict[str, str] = {}
    for line in lines:
        found = _HEADER.fullmatch(line)
        if found is None:
            raise MultipartError("a part has a line among its headers that is none")
        result.setdefault(found.group(1).lower(), found.group(2))
    return result


class Writer:
    """Writes one body of messages: `open`, for each message `head`, payload and `after`, and `close`."""

    __slots__ = ("_meta", "_payload", "after", "boundary", "close", "open")

    def __init__(self, boundary: str) -> None:
        """``boundary``: by chance, so that no payload contains it."""
        self.boundary = boundary
        delimiter = b"\r\n--" + boundary.encode()
        self.open = delimiter[2:]
        self.after = delimiter
        """After each payload, at once."""
        self.close = b"--\r\n"
        self._meta = b'\r\nContent-Disposition: form-data; name="meta"\r\nContent-Type: application/json\r\n\r\n'
        self._payload = delimiter + b'\r\nContent-Disposition: form-data; name="payload"\r\nContent-Length: '

    def head(self, meta: bytes, size: int, content_type: bytes, number: int | None = None) -> bytes:
        """Everything of a message that comes before its payload. ``number``: its place among several."""
        if number is None:
            return b"%b%b%b%d\r\nContent-Type: %b\r\n\r\n" % (self._meta, meta, self._payload, size, content_type)
        return (
            b'\r\nContent-Disposition: form-data; name="meta"; filename="meta-%d.json"\r\n'
            b"Content-Type: application/json\r\n\r\n%b%b\r\n"
            b'Content-Disposition: form-data; name="payload"; filename="payload-%d"\r\n'
            b"Content-Length: %d\r\nContent-Type: %b\r\n\r\n" % (number, meta, self.after, number, size, content_type)
        )
