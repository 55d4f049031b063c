"""Encryption of what a store keeps: root keys (`keyring`), sealed records (`envelope`), sealed streams (`stream`), and
the keys that outlive a root key (`vault`). No I/O here but reading a key file."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("cryptography") is None:
    raise ModuleNotFoundError(
        "encryption needs the package 'cryptography': pip install 'millpond[encryption]'", name="cryptography"
    )
