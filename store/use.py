"""
Who uses a cache, and when somebody last did: one empty file per cache in STORE/.state/uses, outside the cache.

Whoever reads or writes a cache holds a shared lock (flock) on it, and its modification time is the last use;
whoever removes the cache takes the lock alone. A killed process holds nothing. Where the file cannot be made
(a read-only store, somebody else's) there is no lock and no last use, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from errors import CacheError, CacheInUse
from store.files import make_durable_dirs

try:
    import fcntl
except ImportError:  # Windows: no locks, so removing refuses
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class Use:
    """A cache is being used as long as this object lives, or until `end`."""

    def __init__(self, path: Path, counts: bool = True) -> None:
        """
        path: the cache's file in STORE/.state/uses. Never fails: without the file there is no protection.
        counts: whether this is a use by which the cache's last use is told, or only a look that must not be disturbed.
        """
        self.path = path
        self.counts = counts
        descriptor = None
        with contextlib.suppress(OSError):
            # A file that is made now would tell of a use that was none.
            if counts or path.exists():
                descriptor = _locked(path, shared=True)
            if counts and descriptor is not None:
                os.utime(descriptor)
        self.end = weakref.finalize(self, _close, descriptor)
        """Call it to say that the use is over; otherwise that is so when the object goes."""

    def __reduce__(self) -> tuple[type[Use], tuple[Path, bool]]:
        # In a worker process that gets the cache pickled it is a use of its own.
        return (Use, (self.path, self.counts))


@contextlib.contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """
    Nobody uses the cache inside this block, and who begins to waits until its end.

    Raises CacheInUse, naming the processes where the system tells, or CacheError where locks do not work.
    """
    known = path.exists()
    try:
        descriptor = _locked(path, shared=False)
    except BlockingIOError:
        raise CacheInUse(f"{what} is in use{_by_whom(path)}; wait for them, or end them, and run this again") from None
    except OSError as error:
        if fcntl is None or error.errno in _NO_LOCKS:
            raise CacheError(
                f"the file system of {path.parents[2]} has no locks, so whether {what} is in use cannot be told; "
                "make sure that it is not and delete its folder yourself"
            ) from None
        raise CacheError(f"cannot lock {path}: {error.strerror}; check its permissions") from error
    try:
        yield
    finally:
        if not known and _is_at(path, descriptor):
            # A file made for this lock alone: its time would be taken for a use.
            path.unlink(missing_ok=True)
        os.close(descriptor)


def is_used(path: Path) -> bool:
    """Whether somebody uses the cache now, as far as can be told without changing anything."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        _flock(descriptor, shared=False)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def last_use(path: Path) -> datetime | None:
    """UTC, or None where nothing is known."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        return None


def _locked(path: Path, shared: bool) -> int:
    """
    An open descriptor that holds the lock. A shared one waits (removing takes milliseconds), the other does not.

    Raises OSError, BlockingIOError where somebody else holds it.
    """
    while True:
        descriptor = _open(path)
        try:
            _flock(descriptor, shared)
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # Whoever removed the cache meanwhile removed this file too: the lock is on a file that is no more.
        os.close(descriptor)


def _flock(descriptor: int, shared: bool) -> None:
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no flock")
    fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the name still stands for this open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _open(path: Path) -> int:
    """For writing where that is allowed (NFS asks for it), else for reading."""
    try:
        make_durable_dirs(path.parent)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _by_whom(path: Path) -> str:
    """Linux lists who holds which lock: " by process 71 (fpo align mine.yaml)"; elsewhere ""."""
    try:
        facts = path.stat()
        file = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return ""
    holders = sorted(
        {int(words[-4]) for words in lines if "FLOCK" in words and words[-3] == file and "->" not in words}
    )
    if not holders:
        return " (by a process on another machine, or of another user)"
    return " by " + ", ".join(f"process {pid}{_command(pid)}" for pid in holders)


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return ""
    line = " ".join(word for word in words if word)
    return f" ({line[:77] + '...' if len(line) > 80 else line})" if line else ""
