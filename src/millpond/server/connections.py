"""One connection: uvicorn's protocol, with limits on what a client may send, hold open and keep waiting.

What uvicorn leaves open, and is closed here: how long a head may take and how large it may be, a body that trickles,
trailers without end, clients that do not read their answer, too many connections, of one address or in all.

No clock is asked for a request. A sweep once a second counts ticks; a connection notes the tick at which its stage
began, and the sweep ends those that have been in one too long. Importing this module loads uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from millpond.model.clock import Clock, TimerHandle
from millpond.server.auth import PEER, Identity, certificate_identity, serial_number
from millpond.server.config import ServerConfig
from millpond.server.context import AsgiScope
from millpond.server.exchange import Exchange, FastProtocol
from millpond.server.heads import beginning
from millpond.wire import faults
from millpond.wire.faults import Fault

log = logging.getLogger("millpond.server")

IDLE, HEAD, BODY, BUSY, LINGER = range(5)
"""Stages: nothing under way; a head on its way; a body on its way; the client waits for us; refused, soon closed."""
LINGERING = 2.0
"""Seconds for a refused client to read why. Closing at once while it still sends would make the kernel throw our answer
away with what it sent."""
LEAST_RATE = 128
"""Bytes a second that a body must bring, on average over the time that it may make no progress: a modem's rate, below
which somebody only wants to hold the connection."""
LEAST_TICK = 0.02
MOST_AT_ONCE = 256 * 1024
"""Bytes that an event loop reads at once, without TLS."""

MOST_AHEAD = 65_536
"""Bytes that are read while a request waits for the answer to another. More would take memory; but as long as reading
goes on, a client that leaves is noticed at once."""
MOST_PIPELINED = 64
"""Requests that may wait behind one that is being answered: some kilobytes each."""

REASONS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


class Watch:
    """What all connections of a server have in common: their limits, their number, the sweep."""

    def __init__(self, config: ServerConfig, clock: Clock) -> None:
        self.config = config
        self._clock = clock
        times = (config.header_timeout, config.body_timeout, config.keep_alive, config.write_timeout, LINGERING)
        self.tick_seconds = max(LEAST_TICK, min(1.0, *(seconds / 4 for seconds in times)))
        self.tick = 0
        self.head, self.body, self.idle, self.write, self.linger = (
            max(1, round(seconds / self.tick_seconds)) for seconds in times
        )
        self.least_body = config.body_timeout * LEAST_RATE
        self.connections: set[Connection] = set()
        self.addresses: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        """Connections that were refused or ended, by reason; for metrics."""
        self.unsent: dict[Connection, int] = {}
        """Connections whose clients do not read as fast as they are written to, the longest-standing first, and the
        bytes that lie here for them."""
        self._unsent = 0
        """Sum of those."""
        self.revoked = {serial_number(text) for text in config.tls_revoked}
        self._timer: TimerHandle | None = None

    def start(self) -> None:
        """Sweep from now on."""
        self._timer = self._clock.call_later(self.tick_seconds, self._sweep)

    def stop(self) -> None:
        """Sweep no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        self.tick += 1
        for connection in list(self.connections):
            connection.check(self.tick)
        self._shed()
        self.start()

    def stalled(self, connection: Connection, size: int) -> None:
        """A client reads more slowly than it is written to: so many bytes lie here for it, and no more until it has
        read them."""
        self.read_again(connection)
        self.unsent[connection] = size
        self._unsent += size
        self._shed()

    def read_again(self, connection: Connection) -> None:
        """It has read them, or is gone."""
        self._unsent -= self.unsent.pop(connection, 0)

    def _shed(self) -> None:
        """Cut off those who have read slowly for longest while too much lies here. Each answer is bounded, but a client
        may have many connections, and let all of them lie for as long as `write_timeout`."""
        most = self.config.max_unsent_bytes
        if self._unsent <= most:
            return
        self.unsent = {connection: connection.unsent for connection in self.unsent}
        self._unsent = sum(self.unsent.values())
        for connection in list(self.unsent):
            if self._unsent <= most:
                return
            if connection.cut_off_if_slow(self.tick):
                self.read_again(connection)

    def withdraw(self, gone: Callable[[Mapping[str, Any]], bool]) -> None:
        """The certificates for which ``gone`` is true let nobody in any more."""
        for connection in self.connections:
            connection.withdraw(gone)

    def over(self, address: str) -> str | None:
        """Why a further connection of this address is one too many; None when it is not."""
        config = self.config
        if len(self.connections) >= config.max_connections:
            return "too_many_connections"
        most = config.max_connections_per_address
        if most and self.addresses[address] >= most:
            return "too_many_connections_of_address"
        return None


KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""Seconds of silence until the system asks the client's, seconds between such questions, and how many go unanswered
before the connection is over: a consumer whose machine was switched off says nothing of it."""


def _ask_when_silent(sock: socket.socket | None) -> None:
    if sock is None or sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):  # not every system has all of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Connection(FastProtocol):
    """A connection to a client."""

    def __init__(self, watch: Watch, **rest: Any) -> None:
        super().__init__(**rest)
        self._watch = watch
        self._max_head = watch.config.max_header_bytes
        self._max_headers = watch.config.max_headers
        self._stage = IDLE
        self._since = watch.tick
        self._begun = False
        """A byte has come."""
        self._chunk = 0
        """Bytes that came last."""
        self._first = 0
        """Bytes that came together with the beginning of the head."""
        self._fed = 0
        """Bytes that came since the beginning of the head, that chunk included: no head is larger."""
        self._body = 0
        """Bytes of the body since `_since`."""
        self._ahead = 0
        """Bytes that came while a request waited for the answer to another."""
        self._quiet = 0
        """Bytes that came since a part of the body did: trailers, extensions of chunks, which nobody reads."""
        self._came = False
        """A head or a part of a body was in the bytes that came last."""
        self._stalled: int | None = None
        """Since when the client reads nothing."""
        self._peer: Identity | None = None
        self._address = ""

    # Beginning and end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        watch = self._watch
        address = self.client[0] if self.client else ""
        reason = watch.over(address)
        self._since = watch.tick
        self._address = address
        watch.connections.add(self)
        watch.addresses[address] += 1
        if reason is not None:
            self.refuse(503, reason, "this server has as many connections as it takes; close some, or come back later")
            return
        _ask_when_silent(transport.get_extra_info("socket"))
        tls = transport.get_extra_info("ssl_object")
        certificate = None if tls is None else tls.getpeercert()
        if certificate:
            self._peer = certificate_identity(certificate)
            if self._peer.id in watch.revoked:
                watch.refused["revoked_certificate"] += 1
                log.warning("millpond.auth.revoked", extra={"client": address, "identity": self._peer.name})
                transport.abort()

    def withdraw(self, gone: Callable[[Mapping[str, Any]], bool]) -> None:
        """As `Watch.withdraw`."""
        if self._peer is None:
            return
        certificate = self.transport.get_extra_info("ssl_object").getpeercert()
        if not certificate or gone(certificate):
            self._peer.withdrawn = True

    def connection_lost(self, exc: Exception | None) -> None:
        watch = self._watch
        if self in watch.connections:
            watch.connections.discard(self)
            watch.addresses[self._address] -= 1
            if watch.addresses[self._address] <= 0:
                del watch.addresses[self._address]
        watch.read_again(self)
        super().connection_lost(exc)

    # What comes

    def data_received(self, data: bytes) -> None:
        size = len(data)
        if self._stage == IDLE:
            # The parser is between two requests, so that what it does not see it does not miss.
            raw = beginning(data)
            head = self._known.get(raw)
            if head is not None and size == len(raw) + head.length:
                self._stage, self._begun = BUSY, True
                self.run_known(head, data[len(raw) :])
                return
            self._raw = raw
            self._stage, self._since, self._begun, self._fed = HEAD, self._watch.tick, True, 0
            self._first = size
        elif self._stage == LINGER:
            return
        if self.pipeline:
            self._ahead += size
            if self._ahead > MOST_AHEAD:
                self.flow.pause_reading()
        self._chunk = size
        self._fed += size
        self._came = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # To what? This server speaks HTTP/1.1 alone; the request goes on as one, but the parser has stopped.
            if self._stage != LINGER:
                self.cycle.keep_alive = False
        except httptools.HttpParserError:
            self.refuse(400, "bad_request", "this is no HTTP/1.1 request")
        else:
            if self._stage == HEAD:
                if self._fed > self._max_head + self._first:
                    self._head_too_large()
            elif self._stage == BODY:
                # Not by how much came: what TLS decrypts after a pause can be a megabyte of body in one piece.
                self._quiet = 0 if self._came else self._quiet + size
                if self._quiet > self._max_head + MOST_AT_ONCE:
                    self._head_too_large()

    def on_message_begin(self) -> None:
        if self._stage == LINGER:
            return  # refused; what came together with that is not looked at
        if len(self.pipeline) >= MOST_PIPELINED:
            self.refuse(
                400,
                "too_many_requests_ahead",
                f"more than {MOST_PIPELINED} requests wait for their answers; read those",
            )
            return
        super().on_message_begin()
        self._stage, self._since = HEAD, self._watch.tick
        self._first = self._fed = self._chunk

    def on_header(self, name: bytes, value: bytes) -> None:
        # What comes after the body is a trailer, which nobody reads. Not by the base class: this is called a lot.
        if self._stage == HEAD:
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._stage == LINGER:
            return
        if len(self.headers) > self._max_headers or (self._fed > self._max_head and self._head_size() > self._max_head):
            self._head_too_large()
            return
        self._stage, self._since, self._body, self._quiet = BODY, self._watch.tick, 0, 0
        self._came = True
        super().on_headers_complete()

    def scope_of_request(self) -> AsgiScope:
        scope = super().scope_of_request()
        if self._peer is not None:
            scope[PEER] = self._peer
        return scope

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _head_too_large(self) -> None:
        self.refuse(
            431,
            "header_too_large",
            f"the head of the request has more than {self._max_head} bytes or {self._max_headers} headers; send fewer",
        )

    def on_body(self, body: bytes) -> None:
        if self._stage == BODY:
            self._body += len(body)
            self._came = True
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._stage == BODY:
            self._stage = BUSY
            super().on_message_complete()

    # What goes

    def on_response_complete(self) -> None:
        if self._stage == BODY and not self.transport.is_closing():
            # Answered before the body was there, and nobody will read the rest of it.
            self.server_state.total_requests += 1
            self._linger()
            return
        if self.pipeline:
            super().on_response_complete()
            return
        self._ahead = 0
        # As uvicorn does it, without a timer for each answer: the sweep sees to that.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        self._since = self._watch.tick
        if self._stage == BUSY:
            self._stage = IDLE

    def pause_writing(self) -> None:
        self._stalled = self._watch.tick
        super().pause_writing()
        self._watch.stalled(self, self.unsent)

    def resume_writing(self) -> None:
        self._stalled = None
        self._watch.read_again(self)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, "bad_request", "this is no HTTP/1.1 request")

    def refuse(self, status: int, code: str, detail: str) -> None:
        """Say why, unless an answer has begun, and close the connection."""
        if self._stage == LINGER:
            return
        self._watch.refused[code] += 1
        log.info("millpond.server.refused", extra={"client": self._address, "reason": code})
        if self.tell_gone():
            self._stage = LINGER
            self.transport.abort()
            return
        body = faults.as_json(Fault(code, detail))
        lines = [b"HTTP/1.1 %d %s" % (status, REASONS[status])]
        lines += [name + b": " + value for name, value in self.server_state.default_headers]
        lines += [b"content-type: application/json", b"content-length: %d" % len(body), b"connection: close"]
        if status == 503:
            lines.append(b"retry-after: 1")
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        self._linger()

    def _linger(self) -> None:
        self._stage, self._since = LINGER, self._watch.tick
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    # The sweep

    @property
    def unsent(self) -> int:
        """Bytes of answers that the client has not taken yet."""
        size: int = self.transport.get_write_buffer_size()
        return size

    def cut_off_if_slow(self, tick: int) -> bool:
        """End the connection, and say so, unless what lies here may only just have been written."""
        if self._stalled is None or self._stalled >= tick - 1:
            return False
        self._stalled = None
        self._end("too_much_unsent")
        return True

    def check(self, tick: int) -> None:
        """End the connection if its stage has lasted too long."""
        watch = self._watch
        if self._stalled is not None and tick - self._stalled > watch.write:
            self._stalled = None
            self._end("slow_reader")
            return
        if self.transport.is_closing():
            return
        if self.flow.read_paused and self.hung_up():
            self.tell_gone()
            self.transport.close()
            return
        age = tick - self._since
        match self._stage:
            case 0:  # IDLE
                if age > (watch.idle if self._begun else watch.head):
                    self._end("idle" if self._begun else "silent", gently=True)
            case 1:  # HEAD
                if self._waits_for_us():
                    self._since = tick
                elif age > watch.head:
                    self.refuse(408, "request_timeout", "the head of the request took too long")
            case 2:  # BODY
                if self._waits_for_us():
                    self._since, self._body = tick, 0
                elif age > watch.body:
                    if self._body < watch.least_body:
                        self.refuse(408, "request_timeout", "the body of the request makes no progress")
                    else:
                        self._since, self._body = tick, 0
            case 4:  # LINGER
                if age > watch.linger:
                    self.transport.abort()
            case _:
                pass

    def _waits_for_us(self) -> bool:
        """It is not the client's fault that nothing comes."""
        cycle: RequestResponseCycle | Exchange | None = self.cycle
        if self.flow.read_paused:
            return True
        if cycle is None or cycle.response_complete:
            return False
        return self._stage == HEAD or cycle.waiting_for_100_continue

    def _end(self, reason: str, *, gently: bool = False) -> None:
        self._watch.refused[reason] += 1
        if gently:
            self.transport.close()
        else:
            log.info("millpond.server.refused", extra={"client": self._address, "reason": reason})
            self.transport.abort()
