"""Text that others' code has made, so that it can be stored: whole characters, and no more of them than may be."""

from __future__ import annotations


def text_of(error: BaseException) -> str:
    """An exception's own text. Never raises: who tells of a failure must not fail at its text."""
    try:
        return str(error)
    except Exception as broken:  # the user's own __str__, which may raise anything
        return f"(its text cannot be had: {type(broken).__name__})"


def clipped(text: str, characters: int) -> str:
    """The beginning of a text. What has no form in UTF-8 (half of a surrogate pair) is a question mark."""
    return text[:characters].encode("utf-8", "replace").decode()


def clipped_to_bytes(text: str, limit: int) -> str:
    """As `clipped`, so that it takes at most ``limit`` bytes as UTF-8; no character is cut in two."""
    return text[:limit].encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")
