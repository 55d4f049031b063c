"""A server for the tests of a real process: ``serve_worker.py STORE PORT`` prints its URL and serves until SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop

import millpond
from millpond.server.config import ServerConfig
from millpond.server.run import serve


async def main(store: str, port: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with millpond.connect(store) as pond:
        config = ServerConfig(port=port, drain_grace=20.0, shutdown_timeout=5.0)
        await serve(pond, config, stop=stop, ready=lambda url: print(url, flush=True))


if __name__ == "__main__":
    # The event loop of `millpond serve`.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1], int(sys.argv[2])))
