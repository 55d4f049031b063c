"""``millpond serve``: HTTP in front of the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from millpond.cli.settings import Command, Settings, option, pass_settings

if TYPE_CHECKING:
    import asyncio

YOUNG_OBJECTS = 20_000
"""Objects that Python makes before it looks for garbage among them; some megabytes."""


@click.command(cls=Command)
@option("--host", default="127.0.0.1", help="Address to listen on.")
@option("--port", type=click.IntRange(0, 65535), default=9341, help="Port to listen on; 0 takes a free one.")
@pass_settings
def serve(settings: Settings, host: str, port: int) -> None:
    """Serve the store over HTTP.

    Speaks lockd's queue protocol and Millpond's own. SIGTERM or Ctrl-C drains: nothing more is handed out, and
    consumers have ten seconds to answer what they hold.
    """
    import asyncio
    import gc
    import signal

    from millpond.server.config import ServerConfig
    from millpond.server.run import serve as serve_pond

    output = settings.output()
    settings.start_logging()

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        async with settings.open() as pond:
            await serve_pond(
                pond, ServerConfig(host=host, port=port), stop=stop, ready=lambda url: output.note(f"serving at {url}")
            )

    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    try:
        import uvloop
    except ModuleNotFoundError:
        pass  # not every platform has it
    else:
        factory = uvloop.new_event_loop
    # Requests leave nothing behind that goes in circles, so looking for such garbage after each 700 objects is a tenth
    # of the time for nothing. What was imported stays, and need not be looked through at all.
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
