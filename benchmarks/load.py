"""Load on a server of lockd's queue protocol, or of Millpond's own, at as little cost as it can be made. Prints JSON.

    python benchmarks/load.py MODE URL [--protocol lockd|native] [--connections N] [--seconds S] [--rate R]

The server has one core and this program another; what a client costs must not hide what the server can do. So this
one speaks HTTP/1.1 by hand: requests are made once, answers are looked through for the few things that matter, and
each connection is a small state machine that sends its next request from within the arrival of the answer. It is a
client for measuring, and forgives nothing: an answer that is not as expected ends the run.

- ``single``: each connection enqueues a message, receives one and acks it, one call each, over and over.
- ``latency``: the same, but begun ``--rate`` per second at even times, whether or not the ones before are done; what
  is measured counts from when one was to begin.
- ``batch``: the same with a hundred messages a call. Millpond's own protocol only.
- ``stream``: some connections enqueue, in batches of a hundred, some get messages on a stream, and each stream has
  another connection for acks, in batches of what came. By lockd's protocol, which has neither batches nor flow
  control, enqueues and acks are one call per message, over all the connections.
- ``idle``: so many connections subscribe to a queue where nothing comes. Prints ``ready``, and ends after a line on
  stdin.

Messages are 1 KiB; a queue of its own is used, and left empty when all goes well.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import ssl
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import msgspec

PAYLOAD = os.urandom(1024)
BATCH = 100
WARM_UP = 0.5
"""Seconds that are not counted."""
LATE = 10.0
"""Seconds after the end of a run in which what was begun must be done."""
WAIT = 2
"""Seconds for which a receive waits."""
WINDOW = 4000
"""Messages that are enqueued and not yet acked, at most, where producers run on their own."""
STREAMS = 4
BOUNDARY = "bench-5b0c7f"


class LockdMessage(msgspec.Struct):
    """Of a delivery by lockd's protocol, what an ack needs."""

    message_id: str
    lease_id: str
    fencing_token: int
    meta_etag: str
    payload_bytes: int
    txn_id: str = ""


class LockdMeta(msgspec.Struct):
    """The part before a payload."""

    message: LockdMessage


class Delivery(msgspec.Struct):
    """Of a delivery by Millpond's own, the same."""

    message_id: str
    lease_id: str
    fencing_token: int
    payload: bytes


class Frame(msgspec.Struct):
    """Of an answer or a frame of a stream, what came."""

    messages: list[Delivery] = []
    type: str = ""


class AckResult(msgspec.Struct):
    """Of one message of a batch."""

    message_id: str
    error: Any = None


class AckResults(msgspec.Struct):
    """Of a batch."""

    results: list[AckResult]


decode_meta = msgspec.json.Decoder(LockdMeta).decode
decode_frame = msgspec.msgpack.Decoder(Frame).decode
decode_results = msgspec.msgpack.Decoder(AckResults).decode
encode_json = msgspec.json.Encoder().encode
encode = msgspec.msgpack.Encoder().encode


class Failed(Exception):
    """The server said something else than was hoped for."""


class Requests:
    """Whole requests, and what answers mean: lockd's protocol."""

    def __init__(self, host: str, queue: str) -> None:
        self.host, self.queue = host, queue
        meta = encode_json({"queue": queue, "max_attempts": 5})
        parts = (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="meta"\r\n'
            "Content-Type: application/json\r\n\r\n".encode(),
            meta,
            f'\r\n--{BOUNDARY}\r\nContent-Disposition: form-data; name="payload"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n".encode(),
            PAYLOAD,
            f"\r\n--{BOUNDARY}--\r\n".encode(),
        )
        self.enqueue = self.post("/v1/queue/enqueue", b"".join(parts), f"multipart/related; boundary={BOUNDARY}")
        wish = {"queue": queue, "owner": "bench", "wait_seconds": WAIT}
        self.receive = self.json("dequeue", wish)
        self.subscribe = self.json("subscribe", {**wish, "wait_seconds": 0, "page_size": 64})

    def post(self, path: str, body: bytes, kind: str) -> bytes:
        """A request."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def json(self, route: str, body: Any) -> bytes:
        """A request with a JSON body."""
        return self.post(f"/v1/queue/{route}", encode_json(body), "application/json")

    def received(self, status: int, body: bytes) -> list[Any]:
        """The messages of an answer to `receive`."""
        if status == 409:
            return []
        expect(status, body)
        at = body.index(b"\r\n\r\n") + 4
        message = decode_meta(body[at : body.index(b"\n", at)]).message
        if message.payload_bytes != len(PAYLOAD) or PAYLOAD not in body:
            raise Failed("the payload is not the one that was sent")
        return [message]

    def ack(self, messages: list[Any]) -> bytes:
        """The request that acks one."""
        [message] = messages
        return self.json(
            "ack",
            {
                "queue": self.queue,
                "message_id": message.message_id,
                "lease_id": message.lease_id,
                "txn_id": message.txn_id,
                "fencing_token": message.fencing_token,
                "meta_etag": message.meta_etag,
            },
        )

    def acked(self, status: int, body: bytes) -> None:
        """All is well."""
        expect(status, body)


class NativeRequests(Requests):
    """The same by Millpond's own protocol, as MessagePack."""

    def __init__(self, host: str, queue: str, count: int = 1) -> None:
        super().__init__(host, queue)
        self.enqueue = self.pack("enqueueBatch", {"queue": queue, "messages": [{"payload": PAYLOAD}] * count})
        self.receive = self.pack("receive", {"queue": queue, "count": count, "wait_ms": WAIT * 1000})
        self.subscribe = self.pack("stream", {"queue": queue, "credit": 1000, "max_batch": BATCH})

    def pack(self, route: str, body: Any) -> bytes:
        """A request with a MessagePack body."""
        return self.post(f"/v1/queue/{route}", encode(body), "application/msgpack")

    def received(self, status: int, body: bytes) -> list[Any]:
        """The messages of an answer to `receive`."""
        expect(status, body)
        messages = decode_frame(body).messages
        if messages and messages[0].payload != PAYLOAD:
            raise Failed("the payload is not the one that was sent")
        return list(messages)

    def ack(self, messages: list[Any]) -> bytes:
        """The request that acks them all."""
        handles = [
            {"message_id": one.message_id, "lease_id": one.lease_id, "fencing_token": one.fencing_token}
            for one in messages
        ]
        return self.pack("ackBatch", {"queue": self.queue, "messages": handles})

    def acked(self, status: int, body: bytes) -> None:
        """All is well."""
        expect(status, body)
        for result in decode_results(body).results:
            if result.error is not None:
                raise Failed(f"an ack was refused: {result.error}")


def expect(status: int, body: bytes) -> None:
    """200."""
    if status != 200:
        raise Failed(f"the server answered {status}: {body[:300]!r}")


class Run:
    """What all connections share."""

    def __init__(self, seconds: float, failed: asyncio.Future[None]) -> None:
        self._seconds = seconds
        self.failed = failed
        self.done = 0
        self.start()

    def start(self) -> None:
        """It begins now: all connections stand."""
        self.begin = time.perf_counter() + WARM_UP
        self.end = self.begin + self._seconds

    def add(self, count: int) -> None:
        """So many lifecycles ended now."""
        if self.begin <= time.perf_counter() < self.end:
            self.done += count

    @property
    def over(self) -> bool:
        """The time is up."""
        return time.perf_counter() >= self.end


class Connection(asyncio.Protocol):
    """One connection that is kept: sends a request, calls back with the answer, or with what a stream brings."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answered: Callable[[int, bytes], None] | None = None
        self._streamed: Callable[[bytes], None] | None = None
        self._streaming = False
        self.closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It stands."""
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        """It must not be lost before the end."""
        if not self.closing and not self.run.failed.done():
            self.run.failed.set_exception(Failed(f"the server closed a connection: {error}"))

    def send(self, request: bytes, answered: Callable[[int, bytes], None]) -> None:
        """``answered(status, body)`` is called with the answer."""
        self._answered = answered
        assert self.transport is not None
        self.transport.write(request)

    def stream(self, request: bytes, streamed: Callable[[bytes], None]) -> None:
        """``streamed(part)`` is called with each part of the answer's body, as it comes."""
        self._streamed = streamed
        assert self.transport is not None
        self.transport.write(request)

    def close(self) -> None:
        """End it."""
        self.closing = True
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Some of an answer."""
        try:
            self._look(self._buffer + data if self._buffer else data)
        except Exception as error:
            if not self.run.failed.done():
                self.run.failed.set_exception(error)

    def _look(self, data: bytes) -> None:
        if self._streaming:
            self._chunks(data)
            return
        at = data.find(b"\r\n\r\n")
        if at < 0:
            self._buffer = data
            return
        head = data[:at].lower()
        status = int(head[9:12])
        body = at + 4
        found = head.find(b"\r\ncontent-length:")
        if found >= 0:
            stop = head.find(b"\r\n", found + 17)
            end = body + int(head[found + 17 : stop if stop >= 0 else None])
            if len(data) < end:
                self._buffer = data
                return
            self._buffer = b""
            self._finish(status, data[body:end])
        elif self._streamed is not None and status == 200:
            self._streaming = True
            self._chunks(data[body:])
        else:  # chunked, and whole once its last chunk is there
            if not data.endswith(b"0\r\n\r\n"):
                self._buffer = data
                return
            self._buffer = b""
            self._finish(status, b"".join(chunks(data[body:])[0]))

    def _finish(self, status: int, body: bytes) -> None:
        if self._streamed is not None:
            raise Failed(f"the server did not begin a stream but answered {status}: {body[:300]!r}")
        answered, self._answered = self._answered, None
        if answered is None:
            raise Failed("an answer that nobody waits for")
        answered(status, body)

    def _chunks(self, data: bytes) -> None:
        parts, self._buffer = chunks(data)
        if parts and not parts[-1] and not self.closing:
            raise Failed("the server ended a stream")
        assert self._streamed is not None
        if parts:
            self._streamed(b"".join(parts))


def chunks(data: bytes) -> tuple[list[bytes], bytes]:
    """The whole chunks of a chunked body, the last of which is empty, and what is behind them."""
    parts: list[bytes] = []
    at = 0
    while (stop := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:stop], 16)
        end = stop + 2 + size
        if len(data) < end + 2:
            break
        parts.append(data[stop + 2 : end])
        at = end + 2
    return parts, data[at:]


class Lifecycles:
    """One connection that enqueues, receives and acks, over and over, or at given times."""

    def __init__(self, run: Run, connection: Connection, requests: Requests, count: int, dues: Iterator[float] | None):
        self._run, self._connection, self._requests = run, connection, requests
        self._count, self._missing = count, 0
        self._dues, self._due = dues, 0.0
        self._sent = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lifecycles: list[float] = []
        self.calls: list[float] = []

    def begin(self) -> None:
        """The next lifecycle, now or when it is due."""
        if self._run.over:
            self._end()
        elif self._dues is None:
            self._enqueue()
        else:
            self._due = next(self._dues)
            if self._due >= self._run.end:
                self._end()
            else:
                loop = asyncio.get_running_loop()
                loop.call_later(max(0.0, self._due - time.perf_counter()), self._enqueue)

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _send(self, request: bytes, answered: Callable[[int, bytes], None]) -> None:
        self._sent = time.perf_counter()
        self._connection.send(request, answered)

    def _note(self) -> None:
        if self._dues is not None and self._due >= self._run.begin:
            self.calls.append(time.perf_counter() - self._sent)

    def _enqueue(self) -> None:
        self._missing = self._count
        self._send(self._requests.enqueue, self._enqueued)

    def _enqueued(self, status: int, body: bytes) -> None:
        expect(status, body)
        self._note()
        self._send(self._requests.receive, self._received)

    def _received(self, status: int, body: bytes) -> None:
        messages = self._requests.received(status, body)
        if not messages:  # others were given ours
            if self._run.over:
                self._end()
            else:
                self._send(self._requests.receive, self._received)
            return
        self._note()
        self._missing -= len(messages)
        taken = len(messages)
        self._send(self._requests.ack(messages), lambda status, body: self._acked(status, body, taken))

    def _acked(self, status: int, body: bytes, count: int) -> None:
        self._requests.acked(status, body)
        self._note()
        self._run.add(count)
        if self._dues is not None and self._due >= self._run.begin:
            self.lifecycles.append(time.perf_counter() - self._due)
        if self._missing > 0 and not self._run.over:
            self._send(self._requests.receive, self._received)
        else:
            self.begin()


class Streams:
    """Producers, streams, and connections for acks, each going at its own pace."""

    def __init__(self, run: Run, requests: Requests, count: int) -> None:
        self.run, self.requests = run, requests
        self._count = count
        self._open = 0
        """Messages that are enqueued, or about to be, and not acked."""
        self._resting: list[Connection] = []
        self._unacked: deque[Any] = deque()
        self._free: list[Connection] = []
        self._rest = b""
        self._batch = 1 if count == 1 else 500

    def produce(self, connection: Connection) -> None:
        """Enqueue, unless consumers are behind."""
        if self._open + self._count > WINDOW:
            self._resting.append(connection)
        elif not self.run.over:
            self._open += self._count
            connection.send(self.requests.enqueue, lambda status, body: self._enqueued(connection, status, body))

    def _enqueued(self, connection: Connection, status: int, body: bytes) -> None:
        expect(status, body)
        self.produce(connection)

    def consume(self, connection: Connection, acks: list[Connection]) -> None:
        """Messages of this connection are acked on those."""
        self._free += acks
        parser = FrameParser() if isinstance(self.requests, NativeRequests) else MultipartParser()
        connection.stream(self.requests.subscribe, lambda part: self._came(parser.feed(part)))

    def _came(self, messages: list[Any]) -> None:
        self._unacked.extend(messages)
        self._ack()

    def _ack(self) -> None:
        while self._free and self._unacked:
            take = min(len(self._unacked), self._batch)
            messages = [self._unacked.popleft() for _ in range(take)]
            self._send_ack(self._free.pop(), messages)

    def _send_ack(self, connection: Connection, messages: list[Any]) -> None:
        count = len(messages)
        connection.send(self.requests.ack(messages), lambda status, body: self._acked(connection, count, status, body))

    def _acked(self, connection: Connection, count: int, status: int, body: bytes) -> None:
        self.requests.acked(status, body)
        self.run.add(count)
        self._open -= count
        self._free.append(connection)
        self._ack()
        resting, self._resting = self._resting, []
        for each in resting:
            self.produce(each)

    @property
    def left(self) -> int:
        """Messages on their way."""
        return self._open


class FrameParser:
    """Frames of Millpond's streams."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[Any]:
        """The messages of all frames that are whole now."""
        data = self._buffer + data
        messages: list[Any] = []
        at = 0
        while len(data) >= at + 4:
            end = at + 4 + int.from_bytes(data[at : at + 4], "big")
            if len(data) < end:
                break
            frame = decode_frame(data[at + 4 : end])
            if frame.type == "end":
                raise Failed("the server ended a stream")
            messages += frame.messages
            at = end
        self._buffer = data[at:]
        return messages


class MultipartParser:
    """Pairs of parts of lockd's streams. Payloads are passed over by their length."""

    def __init__(self) -> None:
        self._buffer = b""
        self._message: Any = None

    def feed(self, data: bytes) -> list[Any]:
        """The messages whose payloads are whole now."""
        data = self._buffer + data
        messages: list[Any] = []
        at = 0
        while (stop := data.find(b"\r\n\r\n", at)) >= 0:
            body = stop + 4
            head = data[at:stop].lower()
            if b'name="meta"' in head:
                end = data.find(b"\n", body)
                if end < 0:
                    break
                self._message = decode_meta(data[body:end]).message
                at = end + 1
            else:
                length = head.partition(b"content-length:")[2].split(b"\r\n", 1)[0]
                end = body + int(length)
                if len(data) < end:
                    break
                messages.append(self._message)
                at = end
        self._buffer = data[at:]
        return messages


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The median and the 99th percentile, in ms."""
    if len(seconds) < 2:
        raise Failed("too few lifecycles ended to say anything")
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3, "max_ms": max(seconds) * 1e3}


def dues(rate: float) -> Iterator[float]:
    """Even times from now on."""
    origin = time.perf_counter()
    number = 0
    while True:
        yield origin + number / rate
        number += 1


def tls(bundle: str | None, scheme: str) -> ssl.SSLContext | None:
    """For a server whose certificate the bundle's authority signed; lockd's clients check no more than that."""
    if scheme != "https":
        return None
    context = ssl.create_default_context(cafile=bundle)
    context.check_hostname = False
    if bundle:
        context.load_cert_chain(bundle)
    return context


class Load:
    """A run against one server."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        parts = urlsplit(options.url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 9341
        self._tls = tls(options.bundle, parts.scheme)
        count = BATCH if options.mode in ("batch", "stream") and options.protocol == "native" else 1
        queue = f"bench-{options.mode}-{os.getpid()}"
        name = f"{self._host}:{self._port}"
        self.requests = Requests(name, queue) if options.protocol == "lockd" else NativeRequests(name, queue, count)
        self.count = count
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.connections: list[Connection] = []

    async def connect(self, run: Run, count: int) -> list[Connection]:
        """So many connections."""
        loop = asyncio.get_running_loop()
        made = []
        for _ in range(count):
            _, connection = await loop.create_connection(lambda: Connection(run), self._host, self._port, ssl=self._tls)
            made.append(connection)
        self.connections += made
        return made

    async def run(self) -> dict[str, Any]:
        """Do it; what came of it."""
        options = self.options
        run = Run(options.seconds, self.failed)
        kind = {"stream": self.streams, "idle": self.idle}.get(options.mode, self.lifecycles)
        try:
            return await kind(run)
        finally:
            for connection in self.connections:
                connection.close()

    async def until(self, what: asyncio.Future[Any], seconds: float) -> None:
        """Wait for it, or for the first failure."""
        await asyncio.wait({what, self.failed}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self.failed.done():
            what.cancel()
            self.failed.result()

    async def lifecycles(self, run: Run) -> dict[str, Any]:
        """`single`, `batch` and `latency`."""
        options = self.options
        connections = await self.connect(run, options.connections)
        run.start()
        schedule = dues(options.rate) if options.mode == "latency" else None
        callers = [Lifecycles(run, one, self.requests, self.count, schedule) for one in connections]
        for caller in callers:
            caller.begin()
        everyone = asyncio.ensure_future(asyncio.wait([caller.ended for caller in callers]))
        await self.until(everyone, options.seconds + WARM_UP + LATE)
        result: dict[str, Any] = {"lifecycles": run.done, "per_second": run.done / options.seconds}
        if options.mode == "latency":
            result["lifecycle"] = percentiles([each for caller in callers for each in caller.lifecycles])
            result["call"] = percentiles([each for caller in callers for each in caller.calls])
        return result

    async def streams(self, run: Run) -> dict[str, Any]:
        """`stream`."""
        options = self.options
        ways = STREAMS if self.count > 1 else (options.connections - STREAMS) // 2
        consumers, acks, producers = (
            await self.connect(run, STREAMS),
            await self.connect(run, ways),
            await self.connect(run, ways),
        )
        run.start()
        streams = Streams(run, self.requests, self.count)
        for number, consumer in enumerate(consumers):
            streams.consume(consumer, acks[number::STREAMS])
        for producer in producers:
            streams.produce(producer)
        await self.until(asyncio.ensure_future(asyncio.sleep(options.seconds + WARM_UP)), options.seconds + LATE)
        late = time.perf_counter() + LATE
        while streams.left and time.perf_counter() < late:
            await self.until(asyncio.ensure_future(asyncio.sleep(0.05)), 1)
        return {"lifecycles": run.done, "per_second": run.done / options.seconds, "left_over": streams.left}

    async def idle(self, run: Run) -> dict[str, Any]:
        """`idle`."""
        heard = 0

        def hear(part: bytes) -> None:
            nonlocal heard
            heard += len(part)

        for connection in await self.connect(run, self.options.connections):
            connection.stream(self.requests.subscribe, hear)
        await asyncio.sleep(1)
        if self.failed.done():
            self.failed.result()
        print("ready", flush=True)
        line = asyncio.ensure_future(asyncio.to_thread(sys.stdin.readline))
        await self.until(line, self.options.seconds)
        return {"subscribers": self.options.connections, "bytes_heard": heard}


async def main(options: argparse.Namespace) -> None:
    """Run, print."""
    begun = time.process_time()
    result = await Load(options).run()
    print(json.dumps({**result, "cpu_seconds": time.process_time() - begun}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["single", "latency", "batch", "stream", "idle"])
    parser.add_argument("url")
    parser.add_argument("--protocol", choices=["lockd", "native"], default="lockd")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=1000.0, help="lifecycles per second, for latency")
    parser.add_argument("--bundle", help="PEM with the authority, and a certificate and key for mTLS")
    given = parser.parse_args()
    if given.mode == "batch" and given.protocol == "lockd":
        parser.error("lockd's protocol has no batches")
    runner: Callable[..., Any] = asyncio.run
    with contextlib.suppress(ImportError):
        import uvloop

        runner = uvloop.run
    try:
        runner(main(given))
    except Failed as error:
        sys.exit(f"load.py: {error}")
