"""A proxy before a server of objects that counts its requests and makes each of them wait: a network of 30 ms.

    python benchmarks/bucket_proxy.py SERVER-PORT DELAY-MS

Prints its own port, then, for each line on its standard input, what it has counted since the line before, as JSON: a
number for each method, where a GET of a list of names is a LIST. It ends with its input.

A proxy and not a wrapper in our own code, so that our client and those of the peers meet the same delay, and so that
what is counted is what would be on the bill: retries and everything else that a client does by itself included. Each
request waits before it is passed on; bytes of one request are not delayed against each other, nor is the reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter

COUNTED: Counter[str] = Counter()
HEADER_LIMIT = 1 << 16
PIECE = 1 << 16


def kind(header: bytes) -> str:
    """What the request costs as."""
    method, target = header.split(b" ", 2)[:2]
    name = method.decode("ascii")
    # Keys are escaped in a URL, so these stand for themselves.
    if name == "GET" and any(mark in target for mark in (b"list-type=", b"prefix=", b"delimiter=")):
        return "LIST"
    return f"{name} batch" if name == "POST" and b"?delete" in target else name


async def body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, header: bytes) -> None:
    """Pass the rest of a request on as it comes."""
    fields = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(b":") for line in header.split(b"\r\n")[1:])
    }
    if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
        while True:
            line = await reader.readuntil(b"\r\n")
            size = int(line.partition(b";")[0], 16)
            writer.write(line + await reader.readexactly(size + 2))
            await writer.drain()
            if not size:
                return
    left = int(fields.get(b"content-length", b"0"))
    while left:
        piece = await reader.read(min(left, PIECE))
        if not piece:
            return
        left -= len(piece)
        writer.write(piece)
        await writer.drain()


async def replies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass everything on that the server says."""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(PIECE):
            writer.write(piece)
            await writer.drain()
    writer.close()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, delay: float) -> None:
    """One connection of a client, and its own to the server."""
    server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port, limit=HEADER_LIMIT)
    back = asyncio.create_task(replies(server_reader, writer))
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            header = await reader.readuntil(b"\r\n\r\n")
            COUNTED[kind(header)] += 1
            if delay:
                await asyncio.sleep(delay)
            server_writer.write(header)
            await body(reader, server_writer, header)
    server_writer.close()
    with contextlib.suppress(asyncio.CancelledError):  # the proxy ends
        await back


async def main() -> None:
    """Serve until the input ends."""
    port, delay = int(sys.argv[1]), float(sys.argv[2]) / 1000
    server = await asyncio.start_server(
        lambda reader, writer: serve(reader, writer, port, delay), "127.0.0.1", 0, limit=HEADER_LIMIT, backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(COUNTED), flush=True)
        COUNTED.clear()
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
