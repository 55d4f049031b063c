"""Options of `millpond serve`: what is shown, and what is refused before anything is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from millpond.cli.app import app
from millpond.cli.serve import serve
from millpond.server.options import GLOBAL, SETTINGS


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `millpond serve`."""
    done = CliRunner().invoke(app, ["serve", *arguments], env=environment)
    return done.exit_code, done.stdout, done.stderr


def test_every_setting_is_an_option() -> None:
    options = {param.name: param for param in serve.params}
    for setting in SETTINGS:
        if setting.place not in GLOBAL:
            option = options[setting.option]
            assert setting.flag in option.opts
            assert option.help == setting.help  # type: ignore[attr-defined]


def test_the_config_is_shown_with_origins_and_without_secrets(tmp_path: Path) -> None:
    path = tmp_path / "millpond.toml"
    path.write_text('store = "s3://bucket/p?token=hunter2"\n[timeout]\ndrain = "5s"\n')
    code, out, _ = run(
        *("--show-config", "--json", "--config", str(path), "--limit-headers", "20", "--no-log-access"),
        MILLPOND_SERVE_PORT="77",
        MILLPOND_NAMESPACE="team",
    )
    assert code == 0
    rows = {row["setting"]: (row["value"], row["origin"]) for row in map(json.loads, out.splitlines())}
    assert rows["store"] == ("s3://bucket/p?token=***", str(path))
    assert rows["timeout.drain"] == ("5s", str(path))
    assert rows["limit.headers"] == ("20", "--limit-headers")
    assert rows["log.access"] == ("false", "--log-access")
    assert rows["port"] == ("77", "MILLPOND_SERVE_PORT")
    assert rows["namespace"] == ("team", "MILLPOND_NAMESPACE")
    assert rows["host"] == ("127.0.0.1", "default")
    code, out, _ = run("--show-config", "--config", str(path), "--store", "memory://")
    assert code == 0
    assert "hunter2" not in out
    assert out.splitlines()[1].split() == ["store", "memory://", "--store"]


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--host", "0.0.0.0", "--insecure-plaintext"], {}, "without knowing who is there"),
        (["--limit-body", "much"], {}, "--limit-body: limit.body must be a number of bytes"),
        (["--log-format", "xml"], {}, "--log-format: log.format must be one of auto, text, json"),
        ([], {"MILLPOND_SERVE_LIMIT_BODIES": "1"}, "MILLPOND_SERVE_LIMIT_BODIES is no setting of the server"),
        ([], {"MILLPOND_SERVE_LOG_ACCESS": "perhaps"}, "MILLPOND_SERVE_LOG_ACCESS: log.access must be true or false"),
        (["--config", "none.toml"], {}, "config file none.toml cannot be read"),
        (["--store", "http://127.0.0.1:9341"], {}, "store is the URL of a server"),
        (["--tls-key", "k"], {}, "tls.key is given without tls.cert"),
    ],
)
def test_what_cannot_be_is_wrong_usage(arguments: list[str], environment: dict[str, str], said: str) -> None:
    code, out, err = run(*arguments, **environment)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
