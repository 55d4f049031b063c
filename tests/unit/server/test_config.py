"""Settings: where they come from, which of them wins, and what is said of those that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from millpond.errors import InvalidInput
from millpond.server.config import ServerConfig, load, parse_bytes, redact_url, show
from millpond.server.options import SECTIONS, SETTINGS


def write(folder: Path, text: str) -> str:
    path = folder / "millpond.toml"
    path.write_text(text)
    return str(path)


def test_the_table_of_settings_and_the_config_are_the_same() -> None:
    assert [setting.field for setting in SETTINGS] == list(ServerConfig.__struct_fields__)
    assert len({setting.option for setting in SETTINGS}) == len(SETTINGS)
    defaults = ServerConfig()
    for setting in SETTINGS:
        value = getattr(defaults, setting.field)
        kinds = {"number": int, "bytes": int, "duration": float, "flag": bool, "list": tuple}
        assert value is None or type(value) is kinds.get(setting.kind, str), setting.place
        assert bool(setting.choices) == (setting.kind == "choice")
        assert setting.section in {None, *SECTIONS}
        assert setting.help.endswith(".")


def test_a_flag_wins_over_a_variable_that_over_the_file_and_that_over_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, 'port = 1\nhost = "127.0.0.2"\n[limit]\nbody = "1MiB"\nheaders = 50\n')
    environment = {"MILLPOND_SERVE_PORT": "2", "MILLPOND_SERVE_LIMIT_HEADERS": "60", "MILLPOND_STORE": "memory://"}
    config, origins = load({"port": 3, "namespace": None}, environment, path)
    assert (config.host, config.port) == ("127.0.0.2", 3)
    assert config.max_headers == 60
    assert config.max_body_bytes == 2**20
    assert config.store == "memory://"
    assert config.drain_grace == 10.0
    assert {
        place: origins[place] for place in ("port", "host", "limit.headers", "limit.body", "store", "namespace")
    } == {
        "port": "--port",
        "host": path,
        "limit.headers": "MILLPOND_SERVE_LIMIT_HEADERS",
        "limit.body": path,
        "store": "MILLPOND_STORE",
        "namespace": "default",
    }


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    path = write(tmp_path, 'log.level = "debug"')
    assert load({}, {"MILLPOND_SERVE_CONFIG": path}).config.log_level == "debug"


def test_every_kind_of_value_is_read_from_file_and_environment(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [tls]
        cert = "server.pem"
        client_ca = "ca.pem"
        revoked = ["0a1f", "ff"]
        [timeout]
        header = 2
        body = "1m30s"
        drain = 0
        [log]
        access = true
        """,
    )
    config = load({}, {"MILLPOND_SERVE_METRICS_PUBLIC": "yes", "MILLPOND_SERVE_TIMEOUT_IDLE": "500ms"}, path).config
    assert config.tls_revoked == ("0a1f", "ff")
    assert (config.header_timeout, config.body_timeout, config.keep_alive, config.drain_grace) == (2.0, 90.0, 0.5, 0.0)
    assert (config.log_access, config.metrics_public) == (True, True)
    assert config.client_auth == "required"
    tls = {"MILLPOND_SERVE_TLS_CERT": "a", "MILLPOND_SERVE_TLS_CLIENT_CA": "b", "MILLPOND_SERVE_TLS_REVOKED": "0a, 0b"}
    assert load({}, tls).config.tls_revoked == ("0a", "0b")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hosst = 'x'", "there is no setting hosst; did you mean host?"),
        ("tls_cert = 'x'", "there is no setting tls_cert; did you mean tls.cert?"),
        ("[limit]\nbodies = 1", "there is no setting limit.bodies; did you mean limit.body?"),
        ("[nonsense]\na = 1", "there is no setting nonsense"),
        ("tls = 'x'", "tls is a table: write [tls]"),
        (
            "[limit]\nbody = 'much'",
            "limit.body must be a number of bytes, such as 65536, 64KiB or 100MiB, not 'much'",
        ),
        ("[limit]\nheaders = 1.5", "limit.headers must be a whole number, not 1.5"),
        ("[limit]\nheaders = true", "limit.headers must be a whole number, not True"),
        ("[timeout]\nidle = 'soon'", "timeout.idle must be 'soon' is no duration"),
        ("[timeout]\nidle = 0", "timeout.idle must be more than 0 and at most a week"),
        ("[timeout]\nidle = nan", "timeout.idle must be more than 0 and at most a week"),
        ("[limit]\nheader = 10", "limit.header must be at least 1,024"),
        ("[log]\nformat = 'xml'", "log.format must be one of auto, text, json, not 'xml'"),
        ("[log]\naccess = 'maybe'", "log.access must be true or false, not 'maybe'"),
        ("[tls]\nrevoked = [1]", "tls.revoked must be a list of texts, not [1]"),
        ("host = 7", "host must be text that is not empty, not 7"),
        ("host = 'a/b'", "is no address"),
        ("namespace = 'A B'", "namespace name 'a b' has a character"),
        ("[tls]\nkey = 'k'", "tls.key is given without tls.cert"),
        ("[tls]\nclient_ca = 'k'", "tls.client_ca is given without tls.cert"),
        ("[tls]\nbundle = 'b'\ncert = 'c'", "leave out tls.cert"),
        ("[tls]\ncert = 'c'\nclient_auth = 'required'", "no CA for clients is given: set tls.client_ca"),
        ("[tls]\ncert = 'c'\nrevoked = ['0a']", "no client shows a certificate"),
        ("[tls]\ncert = 'c'\nclient_ca = 'd'\nrevoked = ['0a:0b']", "is no serial number in hexadecimal"),
        ("[insecure]\nanonymous = true\n[auth]\ntokens = 't'", "keep one of them"),
        ("= nothing", "is not TOML"),
    ],
)
def test_what_cannot_be_is_refused_by_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InvalidInput) as caught:
        load({}, {}, path)
    assert said in str(caught.value)
    assert path in str(caught.value)


def test_an_error_names_flag_or_variable() -> None:
    with pytest.raises(InvalidInput, match=r"--limit-body: limit\.body must be a number of bytes"):
        load({"limit_body": "x"}, {})
    with pytest.raises(InvalidInput, match=r"MILLPOND_SERVE_LOG_LEVEL: log\.level must be one of debug"):
        load({}, {"MILLPOND_SERVE_LOG_LEVEL": "loud"})
    with pytest.raises(
        InvalidInput, match="MILLPOND_SERVE_HOTS is no setting of the server; did you mean MILLPOND_SERVE_HOST"
    ):
        load({}, {"MILLPOND_SERVE_HOTS": "x"})
    with pytest.raises(InvalidInput, match="cannot be read: No such file"):
        load({}, {}, "/nowhere/millpond.toml")


@pytest.mark.parametrize("port", [-1, 65_536])
def test_ports_that_are_none(port: int) -> None:
    with pytest.raises(InvalidInput, match="port must be 0 to 65535"):
        ServerConfig(port=port)


def test_sizes() -> None:
    assert [parse_bytes(text) for text in ("7", "64KiB", "1 mib", "2G", "3kb")] == [7, 65536, 2**20, 2**31, 3000]
    for text in ("", "MiB", "1.5MiB", "-1", "1xib", "9" * 30):
        with pytest.raises(ValueError, match="a number of bytes"):
            parse_bytes(text)


# What is open to others


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_loopback_nothing_is_asked_for(host: str) -> None:
    config = ServerConfig(host=host)
    config.check_exposure()
    assert config.anonymous


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_elsewhere_it_wants_tls_and_to_know_who_is_there(host: str) -> None:
    with pytest.raises(InvalidInput, match=r"refusing to listen on .* without TLS.*--insecure-plaintext"):
        ServerConfig(host=host, auth_tokens="t").check_exposure()
    with pytest.raises(
        InvalidInput, match=r"refusing to listen on .* without knowing who is there.*millpond token create"
    ):
        ServerConfig(host=host, tls_cert="c").check_exposure()
    with pytest.raises(InvalidInput, match="without knowing who is there"):
        ServerConfig(host=host, insecure_plaintext=True).check_exposure()
    with pytest.raises(InvalidInput, match="without TLS"):
        ServerConfig(host=host, insecure_anonymous=True).check_exposure()
    accepted = (
        ServerConfig(host=host, tls_cert="c", auth_tokens="t"),
        ServerConfig(host=host, tls_bundle="c"),
        ServerConfig(host=host, tls_cert="c", tls_client_ca="d"),
        ServerConfig(host=host, insecure_plaintext=True, auth_tokens="t"),
        ServerConfig(host=host, insecure_plaintext=True, insecure_anonymous=True),
    )
    for config in accepted:
        config.check_exposure()
    assert [config.anonymous for config in accepted] == [False, False, False, False, True]


def test_certificates_that_are_only_optional_do_not_shut_others_out_but_give_them_no_rights() -> None:
    config = ServerConfig(host="::", tls_cert="c", tls_client_ca="d", tls_client_auth="optional")
    config.check_exposure()
    assert not config.anonymous
    with pytest.raises(InvalidInput, match="without knowing who"):
        ServerConfig(host="::", tls_cert="c", tls_client_ca="d", tls_client_auth="none").check_exposure()


# Secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:////var/lib/work.db?busy_timeout=5", "sqlite:////var/lib/work.db?busy_timeout=5"),
        ("sqlite:///work.db", "sqlite:///work.db"),
        ("memory://", "memory://"),
        ("s3://bucket/prefix?region=eu-central-1&secret_access_key=hunter2", "s3://bucket/prefix?region=eu-central-1&secret_access_key=***"),
        ("s3://hunter2:hunter2@bucket/p", "s3://***@bucket/p"),
        ("s3://bucket/p?endpoint=http://me:hunter2@127.0.0.1:9000", "s3://bucket/p?endpoint=http://***@127.0.0.1:9000"),
        ("az://c/p#hunter2", "az://c/p"),
        ("hunter2", "(not a URL)"),
        ("s3://[hunter2", "(not a URL)"),
    ],
)  # fmt: skip
def test_what_is_shown_of_a_url_is_no_secret(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert "hunter2" not in shown


def test_a_config_is_shown_with_origins_and_without_secrets() -> None:
    loaded = load({"store": "s3://bucket/p?sas=hunter2", "timeout_body": 90}, {"MILLPOND_SERVE_LIMIT_HEADER": "64KiB"})
    rows = {row.name: (row.value, row.origin) for row in show(loaded)}
    assert rows["store"] == ("s3://bucket/p?sas=***", "--store")
    assert rows["timeout.body"] == ("1m30s", "--timeout-body")
    assert rows["limit.header"] == ("64KiB", "MILLPOND_SERVE_LIMIT_HEADER")
    assert rows["tls.cert"] == ("", "default")
    assert rows["log.access"] == ("false", "default")
    assert "hunter2" not in str(rows)
    assert len(rows) == len(SETTINGS)


def test_an_error_about_the_store_does_not_quote_it() -> None:
    with pytest.raises(InvalidInput) as caught:
        load({"store": ["s3://k:hunter2@b"]}, {})
    assert "hunter2" not in str(caught.value)
