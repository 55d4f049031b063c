"""How a server is set up."""

from __future__ import annotations

import msgspec

MEBIBYTE = 1024 * 1024


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a server. Durations are seconds."""

    host: str = "127.0.0.1"
    port: int = 9341
    """lockd's; 0 takes a free one."""
    max_body_bytes: int = 32 * MEBIBYTE
    """Largest body that is read as a whole: JSON, MessagePack, batches. Payloads that are streamed are not bounded by
    it but by the pond's `max_payload_bytes`."""
    max_meta_bytes: int = MEBIBYTE
    """Largest ``meta`` part of a multipart enqueue."""
    default_visibility: float = 30.0
    """Of a dequeue by lockd's protocol that asks for none."""
    max_visibility: float = 1800.0
    """Longer wishes of a dequeue by lockd's protocol are cut to this."""
    keep_alive: float = 75.0
    """Idle connections are closed after this."""
    drain_grace: float = 10.0
    """From the signal to stop until new connections are refused: consumers answer what they hold."""
    shutdown_timeout: float = 10.0
    """From then on until what is still under way is cut off."""
    backlog: int = 2048
    """Connections that wait to be accepted."""
