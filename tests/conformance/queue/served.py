"""Ponds behind a server: a local pond, a server on it in the same process, and a client; the suite sees the client.

What an operator does where the store is (verify, collect) is done there, and so are the few steps of the service that
no queue offers.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from tests.unit.server.certificates import Authority, write

from millpond import Pond
from millpond.client.pond import RemotePond
from millpond.model.clock import SystemClock
from millpond.server import tls
from millpond.server.config import ServerConfig
from millpond.server.context import Context
from millpond.server.run import Server

LEFT_OUT: dict[str, str] = {
    "test_cancellation": "it cancels at each store call that the caller's own task makes; here they are the server's, "
    "whom a cancelled client does not reach. tests/unit/client/test_cancelling.py cancels over the wire",
    "test_a_payload_is_never_lost_to_a_message_that_goes_meanwhile": "its store removes a message as soon as it is "
    "looked up, and a server looks up a duplicate to say how it stands",
}
"""Test or module -> why it cannot apply to a pond behind a server. Everything else must hold there, too."""

SCHEMES = ("http", "https", "mtls")
"""In clear; with TLS; with TLS and certificates of clients."""

ALL = bool(os.environ.get("MILLPOND_HTTP_ALL"))
"""Run everything over SQLite and with TLS as well; otherwise, to save time, what is run on servers of clouds, too."""


def applies(world: str, definition: Any) -> bool:
    """Whether a test is run in this world."""
    if world.partition("-")[0] not in SCHEMES:
        return True
    if definition.originalname in LEFT_OUT or definition.path.stem in LEFT_OUT:
        return False
    return world == "http-memory" or ALL or any(definition.iter_markers("servers"))


@functools.cache
def certificates() -> dict[str, str]:
    """A CA's certificate, and those of a server and a client with their keys, in files; made once."""
    authority = Authority()
    (server, server_key), (client, client_key) = authority.server(), authority.client()
    folder = Path(tempfile.mkdtemp(prefix="millpond-certificates-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write(folder, ca=authority.pem, server=server, server_key=server_key, client=client, client_key=client_key)


class Service:
    """The remote service, and behind it what only the local one has."""

    def __init__(self, remote: Any, local: Any) -> None:
        self._remote = remote
        self._local = local

    def __getattr__(self, name: str) -> Any:
        return getattr(self._remote if hasattr(self._remote, name) else self._local, name)


class ServedPond(RemotePond):
    """A client and its server."""

    def __init__(self, local: Pond, scheme: str, *, random_bytes: Callable[[int], bytes]) -> None:
        files, config, context = {}, ServerConfig(port=0, drain_grace=0.0, shutdown_timeout=1.0), None
        if scheme != "http":
            paths = certificates()
            files = {"ca": paths["ca"]}
            made = {"tls_cert": paths["server"], "tls_key": paths["server_key"]}
            if scheme == "mtls":
                files |= {"cert": paths["client"], "key": paths["client_key"]}
                made["tls_client_ca"] = paths["ca"]
            config = msgspec.structs.replace(config, **made)
            context = tls.context(config)
        url = "http://127.0.0.1:1" if scheme == "http" else "https://127.0.0.1:1"
        super().__init__(url, clock=local.clock, random_bytes=random_bytes, **files)
        self.local = local
        # Bytes take real time, whatever the test's clock does meanwhile.
        self.transport.io_clock = SystemClock()
        self._operations = Service(self._remote, local.service)
        self.server = Server(Context(local, config), tls=context)
        # Nor does a client become slow by a test's years.
        self.server.watch._clock = SystemClock()
        for name in ("collect", "verify", "unreadable", "discard_unreadable", "rekey", "statistics"):
            setattr(self, name, getattr(local, name))

    def __getattr__(self, name: str) -> Any:
        if name == "service":
            return self._operations
        if name in ("store", "dispatcher"):
            return getattr(self.local, name)
        raise AttributeError(name)

    async def open(self) -> Pond:
        if self.is_open:  # a worker opens it again
            return self
        await self.local.open()
        await self.server.start()
        self.transport.endpoints[0].url = self.server.url
        return await super().open()

    async def close(self) -> None:
        await super().close()
        await self.server.stop()
        await self.local.close()

    @property
    def busy(self) -> bool:
        """A request is under way that does not wait for a message, or the server still gives something back."""
        waiting = self.local.dispatcher.queue_stats(None, "any").total_consumers
        return self.transport.under_way > waiting or bool(self.server.context.tasks)
