"""
A floor under what a server may take: bytes per window of a download, seconds for an answer or a listing. Who sends a
byte a second ends in one line, as does who sends nothing.
"""

from __future__ import annotations

import time

from fpo.errors import CacheError

WINDOW_SECONDS = 60.0
WINDOW_BYTES = 2**16
"""In every window at least so many bytes arrive: 1 kB/s, which no line that moves shards falls below."""

ANSWER_SECONDS = 60.0
"""Until a server begins to answer, and for an answer that is short."""

LISTING_SECONDS = 120.0
MAX_LISTED = 2**17
"""Of one listing: a cache has at most 2^16 shards and records."""


class Pace:
    """Holds one download against the floor."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._begun, self._arrived = time.monotonic(), 0

    def arrived(self, n_bytes: int) -> None:
        """Raises CacheError where a window ends with too little."""
        self._arrived += n_bytes
        seconds = time.monotonic() - self._begun
        if seconds < WINDOW_SECONDS:
            return
        if self._arrived < WINDOW_BYTES:
            raise CacheError(
                f"cannot read {self.where}: {self._arrived} bytes arrived in {seconds:.3g} s, at least {WINDOW_BYTES} "
                f"in {WINDOW_SECONDS:g} s are waited for; try again later, or from another place"
            )
        self._begun, self._arrived = time.monotonic(), 0


def check_listed(where: str, n_names: int) -> None:
    """Raises CacheError for a listing that is longer than any cache or store has."""
    if n_names > MAX_LISTED:
        raise CacheError(f"cannot list {where}: it has more than {MAX_LISTED} names; use a place for caches alone")
