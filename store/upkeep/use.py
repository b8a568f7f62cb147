"""
Who uses a cache, and when somebody last did: one empty file per cache in STORE/.state/uses, outside the cache.

Whoever reads or writes a cache holds a shared lock (flock) on it, and its modification time is the last use;
whoever removes the cache takes the lock alone. A killed process holds nothing.

Whoever may read the store may write to this file, so that nobody's use is missed: it is empty, and a lock takes no
more than reading. Where a use cannot be noted all the same (a read-only disk, a file of other permissions) its reader
is told so, and a file that shuts readers out says nothing of disuse, see `tells_of_all`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from fpo.errors import CacheDamaged, CacheError, CacheInUse
from fpo.store.files import explained, make_durable_dirs, move_without_replacing, refuse_links

try:
    import fcntl
except ImportError:  # Windows: no locks, so removing refuses
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_LAST_SECOND = 253402300799
"""Of the year 9999, the last that a datetime can say."""

_log = logging.getLogger(__name__)
_told: set[Path] = set()
"""The stores whose users were told already, once per process, that uses cannot be noted there."""


class Use:
    """A cache is being used as long as this object lives, or until `end`."""

    def __init__(self, path: Path, counts: bool = True) -> None:
        """
        path: the cache's file in STORE/.state/uses. Where the use cannot be noted, a line in the log says so, once
        per store: there is then no protection. Raises CacheDamaged where a link stands in the way.
        counts: whether this is a use by which the cache's last use is told, or only a look that must not be disturbed.
        """
        self.path = path
        self.counts = counts
        refuse_links(path, _store_of(path))
        descriptor = None
        try:
            # A file that is made now would tell of a use that was none.
            if counts or path.exists():
                descriptor = locked(path, shared=True)
            if counts and descriptor is not None:
                _let_readers_write(path, descriptor)
                os.utime(descriptor)
        except OSError as error:
            if counts:
                _tell(path, error)
        self.end = weakref.finalize(self, unlocked, descriptor)
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
    refuse_links(path, _store_of(path))
    with explained("lock", path):
        try:
            descriptor = locked(path, shared=False)
        except BlockingIOError:
            raise CacheInUse(
                f"{what} is in use{_by_whom(path)}; wait for them, or end them, and run this again"
            ) from None
        except OSError as error:
            if fcntl is not None and error.errno not in _NO_LOCKS:
                raise
            raise CacheError(
                f"the file system of {_store_of(path)} has no locks, so whether {what} is in use cannot be told; "
                "make sure that it is not and delete its folder yourself"
            ) from None
    try:
        yield
    finally:
        unlocked(descriptor)


def is_used(path: Path) -> bool:
    """Whether somebody uses the cache now, as far as can be told without changing anything."""
    try:
        descriptor = _open(path)
    except (OSError, CacheDamaged):
        return False
    try:
        _flock(descriptor, shared=False)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        unlocked(descriptor)
    return False


def last_use(path: Path) -> datetime | None:
    """UTC, or None where none is noted. Raises CacheError where that cannot be told."""
    facts = _facts(path)
    return None if facts is None or facts.st_mtime <= 0 else moment(facts.st_mtime)


def tells_of_all(path: Path) -> bool:
    """Whether everybody who may read the store can note uses here. Raises CacheError where that cannot be told."""
    facts = _facts(path)
    if facts is None:
        return False
    with explained("read", path):
        folders = [stat.S_IMODE(os.stat(folder).st_mode) for folder in (path.parent, path.parent.parent)]
        wanted = _mode_for_readers(_store_of(path))
    entered = (wanted & 0o444) >> 2
    return facts.st_mode & wanted == wanted and all(mode & entered == entered for mode in folders)


def begin_account(path: Path) -> None:
    """Let everybody who may read the store note uses here, and count from now. Raises CacheError."""
    refuse_links(path, _store_of(path))
    with explained("write", path):
        descriptor = locked(path, shared=True)
        try:
            wanted = stat.S_IMODE(os.stat(_store_of(path)).st_mode)
            for folder in (path.parent, path.parent.parent):
                if stat.S_IMODE(os.stat(folder).st_mode) != wanted:
                    os.chmod(folder, wanted)
            _let_readers_write(path, descriptor)
            os.utime(descriptor)
        finally:
            unlocked(descriptor)


def moment(seconds: float) -> datetime:
    """A file's time (UTC), or the nearest that can be said: file systems hold any number."""
    return datetime.fromtimestamp(min(max(seconds, 0), _LAST_SECOND), UTC)


def _store_of(path: Path) -> Path:
    return path.parents[2]


def _tell(path: Path, error: OSError) -> None:
    store = _store_of(path)
    if store not in _told:
        _told.add(store)
        _log.warning(
            "cannot note in %s that cache %s is used (%s): fpo store gc may take it for unused; a tag keeps it",
            path.parent,
            path.name[:12],
            error.strerror,
        )


def _facts(path: Path) -> os.stat_result | None:
    refuse_links(path, _store_of(path))
    with explained("read", path):
        try:
            return os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None


def _mode_for_readers(store: Path) -> int:
    """Reading and writing for the owner and whoever may read the store or enter it."""
    mode = os.stat(store).st_mode
    readers = (mode | mode << 2) & 0o444
    return 0o600 | readers | readers >> 1


def _let_readers_write(path: Path, descriptor: int) -> None:
    facts, mode = os.fstat(descriptor), _mode_for_readers(_store_of(path))
    if facts.st_uid == os.geteuid() and facts.st_mode & mode != mode:
        os.fchmod(descriptor, stat.S_IMODE(facts.st_mode) | mode)


def locked(path: Path, shared: bool) -> int:
    """
    An open descriptor that holds the lock on a file two folders below a store's root, which is made where it is
    missing. A shared lock waits (removing takes milliseconds), the other does not. `unlocked` ends it.

    Raises OSError, BlockingIOError where somebody else holds it.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no flock")
    while True:
        try:
            descriptor = _open(path)
        except FileNotFoundError:
            _make(path)
            continue
        try:
            _flock(descriptor, shared)
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            unlocked(descriptor)
            raise
        # Whoever removed the cache meanwhile removed this file too: the lock is on a file that is no more.
        unlocked(descriptor)


def _make(path: Path) -> None:
    """A file that tells of no use yet (time 0), at once: nobody takes the time of its making for a use."""
    make_durable_dirs(path.parent, like=_store_of(path))
    # The dot: what a killed process leaves is told from a finished file by its name.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _let_readers_write(path, descriptor)
        os.utime(descriptor, (0, 0))
        move_without_replacing(temporary, path)
    finally:
        unlocked(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _flock(descriptor: int, shared: bool) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the name still stands for this open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _open(path: Path) -> int:
    """For writing where that is allowed (NFS asks for it), else for reading. Raises OSError, CacheDamaged."""
    flags = os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, os.O_RDWR | flags)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        descriptor = os.open(path, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        unlocked(descriptor)
        raise CacheDamaged(f"{path} is no plain file; remove it")
    return descriptor


def unlocked(descriptor: int | None) -> None:
    """Let go of what `locked` gave."""
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
