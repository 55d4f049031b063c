"""What `cryptography` does here, in one place: it is an extra, and who lacks it must hear what to install.

Nothing that works without encryption may import this, for most installations have no such package."""

from __future__ import annotations

from millpond.errors import StoreError

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
except ModuleNotFoundError as error:
    raise StoreError("encryption needs the package cryptography: pip install 'millpond[encryption]'") from error

__all__ = ["AESGCM", "SHA256", "HKDFExpand", "InvalidTag"]
