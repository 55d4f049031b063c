"""`connect`: from a URL to a pond, on a store of one's own or behind a server."""

from __future__ import annotations

from millpond.crypto.keyring import Keyring
from millpond.errors import InvalidInput
from millpond.model.clock import Clock, SystemClock
from millpond.pond import DEFAULT_URL, Pond, open_store
from millpond.service.config import Config
from millpond.stores.base import Reach

SERVERS = ("http", "https")
"""Schemes of URLs that name a server."""


def connect(
    url: str = DEFAULT_URL,
    *,
    keyring: Keyring | None = None,
    config: Config | None = None,
    clock: Clock | None = None,
    accept_plain: bool = False,
    token: str | None = None,
    ca: str | None = None,
    cert: str | None = None,
    key: str | None = None,
    timeout: float | None = None,
) -> Pond:
    """A pond on the store that ``url`` names; open it with ``async with``.

    ``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``s3://bucket/prefix``, ``gs://bucket/prefix``,
    ``az://container/prefix``, ``memory://``. With a ``keyring`` everything is encrypted before it reaches the store;
    ``accept_plain`` then lets in what is not encrypted yet, for the time in which
    ``pond.rekey(encrypt_plain=True)`` encrypts an existing store.

    ``http://host:9341`` and ``https://…`` are a Millpond server, or several of one store
    (``http://one:9341,two:9341``). ``token``: sent with each request. ``ca``, ``cert``, ``key``: files, of the
    authority that signed the server's certificate and of one's own. ``timeout``: seconds that a call may take besides
    its wait, tries included (30). Each of these may stand in the URL's query as well. ``keyring``, ``config`` and
    ``accept_plain`` are the server's to have.

    Raises InvalidInput for a URL that cannot be right, StoreError where a bucket or a keyring needs a package that is
    not installed; opening raises StoreError, and UnknownKey for an encrypted store without its keyring."""
    if not isinstance(url, str):
        raise InvalidInput(f"a store is named by a URL, as sqlite:///work.db, not by a {type(url).__name__}")
    if config is not None and not isinstance(config, Config):
        raise InvalidInput(f"config is a millpond.Config, not a {type(config).__name__}")
    if keyring is not None and not isinstance(keyring, Keyring):  # not told what it is: it may be the key itself
        raise InvalidInput(f"keyring is a millpond.Keyring, not a {type(keyring).__name__}: see Keyring.from_file")
    if url.partition(":")[0].lower() in SERVERS:
        if keyring is not None or config is not None or accept_plain:
            raise InvalidInput("keyring, config and accept_plain belong to the server of this URL: give them to it")
        from millpond.client.pond import RemotePond

        remote = RemotePond(url, clock=clock, token=token, ca=ca, cert=cert, key=key, timeout=timeout)
        if clock is None:
            remote._twin = lambda: RemotePond(url, token=token, ca=ca, cert=cert, key=key, timeout=timeout)
        return remote
    given = {"token": token, "ca": ca, "cert": cert, "key": key, "timeout": timeout}
    if wrong := [name for name, value in given.items() if value is not None]:
        raise InvalidInput(f"{', '.join(wrong)} is of use with a server's URL only (http:// or https://)")
    own_clock = clock is not None
    clock = clock or SystemClock()
    store = open_store(url, clock)
    if keyring is not None:
        from millpond.stores.encrypted import EncryptedStore

        store = EncryptedStore(store, keyring, accept_plain=accept_plain)
    pond = Pond(store, clock=clock, config=config)
    if not own_clock and store.capabilities.reach is not Reach.PROCESS:
        pond._twin = lambda: connect(url, keyring=keyring, config=config, accept_plain=accept_plain)
    return pond
