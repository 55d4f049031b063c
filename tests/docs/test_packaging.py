"""What lies in packaging/ fits the server: settings that exist, defaults that are, users that are not root."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


def test_the_image_is_asked_whether_it_is_ready_and_is_told_signals_itself() -> None:
    text = re.sub(r"\\\n\s*", "", (PACKAGING / "Dockerfile").read_text())
    [entry] = re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
    assert json.loads(entry)[1:] == ["serve"]  # no shell in between that would keep signals to itself
    [check] = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", text, re.MULTILINE)
    _, option, code = json.loads(check)
    assert option == "-c"
    assert f":{ServerConfig().port}/readyz" in code

    class Ready(BaseHTTPRequestHandler):
        status = 200

        def do_GET(self) -> None:
            self.send_response(self.status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            code = code.replace(f":{ServerConfig().port}/", f":{server.server_port}/").replace(
                "timeout=2", "timeout=30"
            )
            for Ready.status, ended in ((200, 0), (503, 1)):
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
                assert done.returncode == ended
        finally:
            server.shutdown()
            thread.join()
