"""What lies in packaging/ fits the server: settings that exist, defaults that are, users that are not root."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from millpond.server.config import ServerConfig, load
from millpond.server.options import BY_PLACE, SETTINGS

PACKAGING = Path(__file__).parents[2] / "packaging"
TOML = PACKAGING / "millpond.toml"


def test_the_example_holds_the_defaults_but_for_where_the_store_is() -> None:
    loaded = load({}, {}, str(TOML))
    given = {place for place, origin in loaded.origins.items() if origin != "default"}
    assert len(given) > 15
    for place in given - {"store"}:
        field = BY_PLACE[place].field
        assert getattr(loaded.config, field) == getattr(ServerConfig(), field), place
    loaded.config.check_exposure()


def test_what_is_commented_out_there_can_be_set() -> None:
    text = re.sub(r"^# ?(\[\w+\]|\w+ = )", r"\1", TOML.read_text(), flags=re.MULTILINE)
    tables = set(re.findall(r"^\[(\w+)\]", text, re.MULTILINE))
    document = tomllib.loads(text)
    assert {"tls", "auth", "limit", "timeout", "log", "metrics"} == tables
    places = {
        f"{table}.{key}" if isinstance(value, dict) else table
        for table, value in document.items()
        for key in (value if isinstance(value, dict) else [""])
    }
    assert {"tls.client_ca", "auth.tokens", "log.audit", "keyring"} < places
    assert places <= set(BY_PLACE)


def test_the_unit_gives_the_drain_its_time_and_the_connections_their_descriptors() -> None:
    unit = dict(re.findall(r"^(\w+)=(.*)$", (PACKAGING / "millpond.service").read_text(), re.MULTILINE))
    config = ServerConfig()
    assert int(unit["TimeoutStopSec"]) > config.drain_grace + config.shutdown_timeout
    assert int(unit["LimitNOFILE"]) > config.max_connections
    assert (unit["Type"], unit["KillSignal"], unit["DynamicUser"]) == ("notify", "SIGTERM", "yes")
    assert unit["ExecStart"].endswith(" serve --config /etc/millpond/millpond.toml")
    assert unit["ExecReload"].endswith("-HUP $MAINPID")
    hardening = {"NoNewPrivileges": "yes", "ProtectSystem": "strict", "CapabilityBoundingSet": ""}
    assert hardening.items() <= unit.items()


def test_the_image_is_not_roots_and_stops_by_draining() -> None:
    text = (PACKAGING / "Dockerfile").read_text()
    last = text.rpartition("\nFROM ")[2]
    user = re.search(r"^USER (\d+)", last, re.MULTILINE)
    assert user is not None
    assert int(user[1]) > 0
    assert "\nSTOPSIGNAL SIGTERM\n" in last
    assert "\nVOLUME /data\n" in last
    variables = {setting.variable for setting in SETTINGS}
    named = set(re.findall(r"\b(MILLPOND_\w+)=", last))
    assert {"MILLPOND_STORE", "MILLPOND_SERVE_HOST"} <= named <= variables
    assert "INSECURE_ANONYMOUS" not in text
    # As it stands it is refused until somebody gives it tokens.
    config = load({}, {name: value.strip('"') for name, value in re.findall(r"(MILLPOND_\w+)=(\S+)", last)}).config
    assert config.anonymous
    assert config.insecure_plaintext
