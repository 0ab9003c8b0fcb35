"""What the server takes unless it is told otherwise; nothing of it is imported, so that help is quick."""

from dataclasses import dataclass

PARALLEL, QUEUE = 2, 16
"""Answers that are written at once, and requests that wait."""
CACHE_BYTES = 256 << 20
"""Of encoded images."""


@dataclass(frozen=True)
class Limits:
    """Bytes of a body, seconds until a body is whole, and seconds of a whole request, its wait included."""

    body_bytes: int = 32 << 20
    body_seconds: float = 30.0
    seconds: float = 600
