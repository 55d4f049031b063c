"""The servers as fixtures: each is started once, when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.servers.azurite import azurite_server
from tests.servers.corner import Corner, MakeCorner
from tests.servers.google import google_server
from tests.servers.process import Server
from tests.servers.seaweed import seaweed_server

from millpond.model.clock import Clock


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SeaweedFS, for ``s3://``."""
    with seaweed_server(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Azurite, for ``az://``."""
    with azurite_server(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture(scope="session")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """fake-gcs-server behind a translator, for ``gs://``."""
    with google_server(tmp_path_factory.mktemp("google")) as server:
        yield server


@pytest.fixture
def make_corner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeCorner:
    """A part of a server's bucket for this test alone."""

    def make(name: str, clock: Clock) -> Corner:
        server = request.getfixturevalue(name)
        for variable, value in server.environment.items():
            monkeypatch.setenv(variable, value)
        return Corner(server, clock)

    return make
