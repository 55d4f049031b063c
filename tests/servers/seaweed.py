"""SeaweedFS as a stand-in for Amazon S3: a real implementation of its own, with conditional writes."""

from __future__ import annotations

import contextlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tests.servers.process import Server, answers, free_ports, running

BUCKET = "millpond-test"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testsecret", "AWS_REGION": "us-east-1"}


@contextlib.contextmanager
def seaweed_server(directory: Path) -> Iterator[Server]:
    """SeaweedFS with an S3 gateway and one bucket."""
    program = Path(sysconfig.get_path("scripts")) / "weed"
    assert program.exists(), f"{program} is missing: `make test` installs it"
    access = {"accessKey": ENVIRONMENT["AWS_ACCESS_KEY_ID"], "secretKey": ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    access_file = directory / "s3.json"
    access_file.write_text(
        json.dumps({"identities": [{"name": "ci", "credentials": [access], "actions": actions}]}), "utf-8"
    )
    data = directory / "data"
    data.mkdir()
    parts = ("master", "volume", "filer", "s3")
    ports = dict(zip([*parts, *(f"{part}.grpc" for part in parts)], free_ports(8), strict=True))
    command = [
        str(program), "-v=0", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3",
        f"-s3.config={access_file}", "-master.volumeSizeLimitMB=64", "-volume.max=40", "-master.telemetry=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{part}.port.grpc={ports[f'{part}.grpc']}" for part in parts),
        *(f"-{part}.port={ports[part]}" for part in parts),
    ]  # fmt: skip
    log, port = directory / "seaweed.log", ports["s3"]

    def url(prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}?endpoint=http://127.0.0.1:{port}"

    with running(command, log, answers(port)):
        _create_bucket(port)
        yield Server("SeaweedFS", port, log, url, ENVIRONMENT)


def _create_bucket(port: int) -> None:
    """It appears with its first object."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        BUCKET,
        access_key_id=ENVIRONMENT["AWS_ACCESS_KEY_ID"],
        secret_access_key=ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
        region=ENVIRONMENT["AWS_REGION"],
        endpoint=f"http://127.0.0.1:{port}",
        client_options={"allow_http": True},
    )
    obstore.put(store, "first", b"")  # obstore tries again until all parts of SeaweedFS have met
