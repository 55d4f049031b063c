"""Recognising an encrypted store without being able to read it."""

from __future__ import annotations

from millpond.crypto.place import PLACE
from millpond.errors import UnknownKey
from millpond.stores.base import Store


async def refuse_sealed(store: Store) -> None:
    """For those who open a store without a keyring: raises UnknownKey when it is encrypted."""
    if await store.document(*PLACE) is not None:
        raise UnknownKey("this store is encrypted; give a keyring (MILLPOND_KEYRING, or keyring=…)")
