"""Root keys, by id. The newest writes, any of them reads.

The text form, the same in a file and in an environment variable: one ``id:key`` per line (or comma), the key being 32
bytes in base64. The **last** one is the newest, so that ``millpond keygen >> keyring`` rotates. Blank lines count for
nothing, and ``#`` starts a comment.

    # Millpond root keys; append, never reorder
    2025:3q2+7wAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
    2026:Zm9vYmFyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=

Key material never appears in an error, a log record or a repr.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from millpond.errors import InvalidInput, UnknownKey

log = logging.getLogger("millpond.crypto")

KEY_BYTES = 32
"""A root key feeds HKDF-SHA256 and protects AES-256 keys: 256 bits, neither more nor less."""

_ID = re.compile(r"[a-z0-9._-]{1,32}")
_SALT = b"millpond/1 root key"
"""HKDF salt. It need not be secret; it keeps apart what other programs derive from the same bytes (RFC 5869, 3.1)."""


class Keyring:
    """Root keys by id, in the order of their age; immutable. Build it with `from_file`, `from_env` or `load`."""

    __slots__ = ("_roots", "newest")

    newest: str
    """The id of the key that new ciphertexts are written with."""

    def __init__(self, keys: dict[str, bytes]) -> None:
        """``keys``: id → 32 bytes, oldest first. Raises InvalidInput."""
        if not keys:
            raise InvalidInput("the keyring is empty; `millpond keygen` makes a key")
        for key_id, key in keys.items():
            if not _ID.fullmatch(key_id):
                raise InvalidInput(f"root key id {key_id!r} is not 1 to 32 of a-z 0-9 . _ -")
            if len(key) != KEY_BYTES:
                raise InvalidInput(f"root key {key_id!r} has {len(key)} bytes instead of {KEY_BYTES}")
        # HKDF-Extract (RFC 5869, 2.2), once per key. What is derived later is the Expand step alone.
        self._roots = {key_id: hmac.digest(_SALT, key, "sha256") for key_id, key in keys.items()}
        self.newest = next(reversed(self._roots))

    @classmethod
    def load(cls, text: str, *, source: str = "keyring") -> Keyring:
        """Read the text form; ``source`` is how errors name it. Raises InvalidInput, naming the line."""
        keys: dict[str, bytes] = {}
        for number, line in enumerate(text.splitlines(), 1):
            for entry in line.partition("#")[0].split(","):
                if entry := entry.strip():
                    key_id, key = _entry(entry, f"{source}, line {number}")
                    if key_id in keys:
                        raise InvalidInput(f"{source}, line {number}: root key id {key_id!r} is there already")
                    if key in keys.values():
                        raise InvalidInput(f"{source}, line {number}: root key {key_id!r} repeats an earlier key")
                    keys[key_id] = key
        if not keys:
            raise InvalidInput(f"{source} holds no root key; `millpond keygen` makes one")
        return cls(keys)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Keyring:
        """Read a key file (UTF-8). Raises InvalidInput.

        A file that everybody may read or write is used all the same, with the log event
        ``millpond.crypto.keyring_exposed``: in some containers nothing can be done about it.
        """
        try:
            with Path(path).open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                text = file.read().decode()
        except OSError as error:
            raise InvalidInput(f"keyring file {path} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError:
            # Not chained: the error holds the file's bytes.
            raise InvalidInput(f"keyring file {path} is not UTF-8 text") from None
        if os.name == "posix" and mode & (stat.S_IROTH | stat.S_IWOTH):
            log.warning(
                "millpond.crypto.keyring_exposed",
                extra={"path": os.fspath(path), "mode": f"{stat.S_IMODE(mode):04o}", "cure": f"chmod 600 {path}"},
            )
        return cls.load(text, source=f"keyring file {path}")

    @classmethod
    def from_env(cls, var: str = "MILLPOND_KEYRING") -> Keyring:
        """Read the text form from the environment variable ``var``, or the file that ``<var>_FILE`` names.

        Raises InvalidInput, also when neither is set: encryption must not vanish with a misspelt variable.
        """
        text = os.environ.get(var)
        path = os.environ.get(f"{var}_FILE")
        if text and path:
            raise InvalidInput(f"{var} and {var}_FILE are both set; keep one")
        if text:
            return cls.load(text, source=var)
        if path:
            return cls.from_file(path)
        raise InvalidInput(f"neither {var} nor {var}_FILE is set")

    @staticmethod
    def generate_key(key_id: str | None = None, *, random_bytes: Callable[[int], bytes] = os.urandom) -> str:
        """A new root key as a line of the text form, without line end; with a random id unless one is given.

        Raises InvalidInput for a bad id.
        """
        if key_id is None:
            key_id = f"k-{random_bytes(4).hex()}"
        if not _ID.fullmatch(key_id):
            raise InvalidInput(f"root key id {key_id!r} is not 1 to 32 of a-z 0-9 . _ -")
        return f"{key_id}:{base64.b64encode(random_bytes(KEY_BYTES)).decode()}"

    @property
    def ids(self) -> tuple[str, ...]:
        """All key ids, oldest first."""
        return tuple(self._roots)

    def __contains__(self, key_id: object) -> bool:
        return key_id in self._roots

    def root(self, key_id: str) -> bytes:
        """The secret that the keys under root key ``key_id`` are expanded from. Raises UnknownKey."""
        try:
            return self._roots[key_id]
        except KeyError:
            raise UnknownKey(
                f"needs root key {key_id!r}, which the keyring lacks (it has {', '.join(self._roots)})"
            ) from None

    def __repr__(self) -> str:
        return f"Keyring(ids={list(self._roots)}, newest={self.newest!r})"

    def __reduce__(self) -> str:
        raise TypeError("a Keyring is not pickled: it would take the root keys along")


def _entry(entry: str, where: str) -> tuple[str, bytes]:
    """One ``id:key``. No error quotes any of it before the id is known to be one: it might be a bare key."""
    key_id, colon, encoded = (part.strip() for part in entry.partition(":"))
    if not colon:
        raise InvalidInput(f"{where}: not of the form id:base64key")
    if not _ID.fullmatch(key_id):
        raise InvalidInput(f"{where}: the id before the colon is not 1 to 32 of a-z 0-9 . _ -")
    try:
        # Both alphabets; binascii's strict mode refuses anything after the padding and non-alphabet characters.
        key = binascii.a2b_base64(encoded.replace("-", "+").replace("_", "/"), strict_mode=True)
    except ValueError:
        # binascii.Error, or ValueError for text that is not ASCII. Not chained: its frame holds the key.
        raise InvalidInput(f"{where}: the key of {key_id!r} is not valid base64") from None
    if len(key) != KEY_BYTES:
        raise InvalidInput(f"{where}: the key of {key_id!r} has {len(key)} bytes instead of {KEY_BYTES}")
    return key_id, key
