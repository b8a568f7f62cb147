"""
Which shards of a cache are being computed now, so that processes that know nothing of each other share the work: a
file per shard in the cache's tmp/, locked (flock) by the process that computes it. A killed process holds no lock.
What else one process does for all is claimed in the same way.

Claims are advice. Nothing is wrong where they fail (a file system without locks, a tmp/ that was emptied, a process
that was given up for dead): a shard is then computed twice, and the first writer wins.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from pathlib import Path

from fpo.errors import CacheError
from fpo.store.files import TMP, Folder
from fpo.store.upkeep.use import locked, unlocked

PATIENCE_SECONDS = 600.0
"""How long a claim is honoured whose holder shows no sign of life: stopped, or its machine is gone and the lock not."""


class Claim:
    """Work that this process does, until `end` or the process ends."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path = path
        self._descriptor = descriptor
        self._release = weakref.finalize(self, unlocked, descriptor)

    def renew(self) -> None:
        """Say that the work goes on."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def end(self) -> None:
        """The work is done, or left to others."""
        if self._descriptor is not None and self._release.alive:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self._release()


class Claims:
    """Takes claims on the shards of one cache, or on other work, and remembers how long others' stand still."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._signs: dict[Path, tuple[int, float]] = {}
        """The last sign of life of a holder, and since when (monotonic, so no jump of a clock matters)."""

    def take(self, sid: int) -> Claim | None:
        """None where another process computes the shard. Where files cannot be locked, whoever asks gets it."""
        return self.claim(f"{TMP}/{sid:06d}.claim")

    def claim(self, name: str) -> Claim | None:
        """The same for any work of which all know a file's name; its folder is two below the root of a store."""
        path = self.folder.root / name
        try:
            claim = Claim(path, locked(path, shared=False))
        except BlockingIOError:
            return Claim(path, None) if self._given_up(path) else None
        except (OSError, CacheError):
            return Claim(path, None)
        claim.renew()
        return claim

    def _given_up(self, path: Path) -> bool:
        try:
            sign = path.lstat().st_mtime_ns
        except OSError:  # it ended just now
            return False
        now = time.monotonic()
        seen, since = self._signs.get(path, (sign, now))
        self._signs[path] = (sign, since if seen == sign else now)
        return seen == sign and now - since > PATIENCE_SECONDS
