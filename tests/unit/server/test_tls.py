"""TLS contexts: what files they take, what they say of others, and that a reload replaces all of it."""

from __future__ import annotations

import contextlib
import os
import ssl
from pathlib import Path
from typing import Any

import pytest
from tests.unit.server.certificates import Authority, key_pem, write

from millpond.errors import InvalidInput
from millpond.server import tls
from millpond.server.config import ServerConfig
from millpond.server.reload import EVERY, Reloader
from millpond.testing import ManualClock


@pytest.fixture(scope="module")
def ca() -> Authority:
    return Authority()


def shake(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[str, dict[str, object] | None]:
    """A handshake in memory: the name on the server's certificate, and what the server sees of the client's."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = server.wrap_bio(to_server, to_client, server_side=True)
    two = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    for _ in range(10):
        for end in (two, one):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    one.do_handshake()
    seen = two.getpeercert()
    assert seen is not None
    subject: object = seen["subject"]
    return str(subject), one.getpeercert()  # type: ignore[return-value]


def trusting(ca: Authority, *, own: tuple[str, str] | None = None, folder: Path | None = None) -> ssl.SSLContext:
    made = ssl.create_default_context(cadata=ca.pem)
    if own is not None:
        assert folder is not None
        files = write(folder, own=own[0] + own[1])
        made.load_cert_chain(files["own"])
    return made


def test_certificate_and_key_from_two_files_or_one(ca: Authority, tmp_path: Path) -> None:
    cert, key = ca.server()
    files = write(tmp_path, cert=cert, key=key, both=key + cert)
    for config in (
        ServerConfig(tls_cert=files["cert"], tls_key=files["key"]),
        ServerConfig(tls_cert=files["both"]),
    ):
        made = tls.context(config)
        assert made.minimum_version is ssl.TLSVersion.TLSv1_2
        assert made.verify_mode is ssl.CERT_NONE
        assert "server" in shake(made, trusting(ca))[0]


def test_a_client_of_an_old_tls_is_refused(ca: Authority, tmp_path: Path) -> None:
    cert, key = ca.server()
    made = tls.context(ServerConfig(tls_cert=write(tmp_path, both=cert + key)["both"]))
    client = trusting(ca)
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        client.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        client.maximum_version = ssl.TLSVersion.TLSv1_1
    client.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        shake(made, client)


@pytest.mark.parametrize("bundled", [False, True])
def test_clients_must_show_a_certificate_of_the_ca(ca: Authority, tmp_path: Path, bundled: bool) -> None:
    cert, key = ca.server()
    files = write(tmp_path, cert=cert, key=key, ca=ca.pem, bundle=ca.pem + cert + key_pem(ca.key) + key)
    config = ServerConfig(tls_cert=files["cert"], tls_key=files["key"], tls_client_ca=files["ca"])
    made = tls.context(ServerConfig(tls_bundle=files["bundle"]) if bundled else config)
    _, seen = shake(made, trusting(ca, own=ca.client("spiffe://x"), folder=tmp_path))
    assert seen is not None
    assert ("URI", "spiffe://x") in seen["subjectAltName"]  # type: ignore[operator]
    with pytest.raises(ssl.SSLError):
        shake(made, trusting(ca))
    with pytest.raises(ssl.SSLError):
        shake(made, trusting(ca, own=Authority("another").client(), folder=tmp_path))
    # A server's certificate is not one of a client, though the same CA signed it.
    with pytest.raises(ssl.SSLError):
        shake(made, trusting(ca, own=ca.server(), folder=tmp_path))


def test_clients_may_show_a_certificate(ca: Authority, tmp_path: Path) -> None:
    cert, key = ca.server()
    files = write(tmp_path, both=cert + key, ca=ca.pem)
    made = tls.context(ServerConfig(tls_cert=files["both"], tls_client_ca=files["ca"], tls_client_auth="optional"))
    assert shake(made, trusting(ca))[1] is None
    assert shake(made, trusting(ca, own=ca.client(), folder=tmp_path))[1]


def test_files_that_cannot_be_used_are_named_and_never_quoted(ca: Authority, tmp_path: Path) -> None:
    cert, key = ca.server()
    other = ca.server()[1]
    locked = key_pem(ca.key, b"password")
    files = write(
        tmp_path,
        cert=cert,
        key=key,
        other=other,
        locked=locked,
        text="hunter2",
        leaf=ca.client()[0],
        no_ca=cert + key,
        wrong=ca.pem + cert + other,
        locked_bundle=ca.pem + cert + locked,
        broken=ca.pem.replace("M", "-", 3) + cert + key,
    )
    missing = str(tmp_path / "missing.pem")

    def refused(said: str, path: str, **settings: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            tls.context(ServerConfig(**settings))  # type: ignore[arg-type]
        assert said in str(caught.value)
        assert path in str(caught.value)
        assert "hunter2" not in str(caught.value)

    refused("cannot be read: No such file", missing, tls_cert=missing)
    refused("cannot be read: No such file", missing, tls_cert=files["cert"], tls_key=missing)
    refused("no certificate with its private key", files["cert"], tls_cert=files["cert"])
    refused("no certificate with its private key", files["text"], tls_cert=files["text"])
    refused("do not belong together", files["other"], tls_cert=files["cert"], tls_key=files["other"])
    refused("is encrypted", files["locked"], tls_cert=files["cert"], tls_key=files["locked"])
    pair = {"tls_cert": files["cert"], "tls_key": files["key"]}
    refused("no CA certificates", files["text"], **pair, tls_client_ca=files["text"])
    refused("holds no certificate of a CA", files["leaf"], **pair, tls_client_ca=files["leaf"])
    refused("0 CA certificates, 1 others and 1 private keys", files["no_ca"], tls_bundle=files["no_ca"])
    refused("0 CA certificates, 0 others and 0 private keys", files["text"], tls_bundle=files["text"])
    refused("do not belong together", files["wrong"], tls_bundle=files["wrong"])
    refused("is encrypted", files["locked_bundle"], tls_bundle=files["locked_bundle"])
    refused("cannot be read", files["broken"], tls_bundle=files["broken"])


def test_a_reload_replaces_certificate_and_cas(ca: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "millpond")
    clock = ManualClock()
    cert, key = ca.server("before")
    files = write(tmp_path, both=cert + key, ca=ca.pem)
    config = ServerConfig(tls_cert=files["both"], tls_client_ca=files["ca"])
    exchangeable = tls.Exchangeable(tls.context(config))
    reloader = Reloader(clock)

    def load() -> None:
        exchangeable.current = tls.context(config)

    reloader.watch("tls", tls.files(config), load)
    reloader.start()
    old_client = ca.client()
    assert "before" in shake(exchangeable, trusting(ca, own=old_client, folder=tmp_path))[0]
    clock.advance(EVERY * 3)
    assert reloader.reloads == 0

    # Half a change: the key of another. What was read before stays in force, and is told of once.
    write(tmp_path, both=cert + ca.server()[1])
    clock.advance(EVERY * 3)
    assert (reloader.reloads, reloader.failures) == (0, 1)
    assert "before" in shake(exchangeable, trusting(ca, own=old_client, folder=tmp_path))[0]

    other = Authority("another")
    cert, key = ca.server("after")
    write(tmp_path, both=cert + key, ca=other.pem)
    clock.advance(EVERY)
    assert (reloader.reloads, reloader.failures) == (1, 1)
    assert "after" in shake(exchangeable, trusting(ca, own=other.client(), folder=tmp_path))[0]
    with pytest.raises(ssl.SSLError):
        shake(exchangeable, trusting(ca, own=old_client, folder=tmp_path))
    assert [record.message for record in caplog.records] == [
        "millpond.server.reload_failed",
        "millpond.server.reloaded",
    ]
    reloader.stop()
    assert clock.pending_timers == 0


def test_which_certificates_are_in_doubt_after_a_reload(ca: Authority) -> None:
    def context(*authorities: Authority) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_verify_locations(cadata="".join(one.pem for one in authorities))
        return made

    def issued(by: str) -> dict[str, Any]:
        return {"issuer": ((("commonName", by),),)}

    another, namesake = Authority("another"), Authority()
    assert tls.no_longer_trusted(context(ca), context(ca, another)) is None
    gone = tls.no_longer_trusted(context(ca, another), context(ca))
    assert gone is not None
    # The CA's own, one of the other's, one of an intermediate: of that nobody knows whose it is.
    assert [gone(issued(name)) for name in ("test CA", "another", "between")] == [False, True, True]
    # Another key under the same name proves nothing.
    gone = tls.no_longer_trusted(context(ca), context(namesake))
    assert gone is not None
    assert gone(issued("test CA"))


def test_a_file_that_vanishes_and_comes_back_is_read_again(tmp_path: Path) -> None:
    clock = ManualClock()
    path = tmp_path / "file"
    path.write_text("1")
    read: list[str] = []

    def load() -> None:
        try:
            read.append(path.read_text())
        except OSError as error:
            raise InvalidInput(str(error)) from error

    reloader = Reloader(clock)
    reloader.watch("file", [str(path)], load)
    reloader.start()
    path.unlink()
    clock.advance(EVERY)
    assert (reloader.failures, read) == (1, [])
    path.write_text("2")
    os.utime(path, ns=(1, 1))
    clock.advance(EVERY)
    clock.advance(EVERY)
    assert read == ["2"]
    reloader.check(force=True)  # as a signal does
    assert read == ["2", "2"]
    reloader.stop()
