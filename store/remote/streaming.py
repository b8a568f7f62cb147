"""
Reading a cache that lies behind a URL: its shards pass through a bounded folder on this machine, ahead of the
reader, so that training neither waits for the network nor needs disk for the whole cache.

The folder is shared by all caches, their columns, runs and processes of the machine: shards are named by their sha256,
which is checked at every read, so it may be deleted, damaged or full at any time and only speed is lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fpo.canonical import sha256_hex
from fpo.errors import CacheDamaged, CacheError, CacheMissing
from fpo.memo import memo_folder
from fpo.store.files import Folder, replace_file
from fpo.store.format.encoding import MAX_FILE_BYTES
from fpo.store.format.manifest import ShardEntry, shard_name
from fpo.store.objects import Objects
from fpo.store.shards import fetch_shard

try:
    import fcntl
except ImportError:  # Windows: processes do not wait for each other, and may fetch a shard twice
    fcntl = None  # type: ignore[assignment]

DEFAULT_GIB = 20.0
FETCH_THREADS = 4

PATIENCE_SECONDS = 600.0
"""How long a run that is under way waits for a server or network that is gone."""
_PAUSE_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Shelf:
    """A folder of shards that never holds more than `max_bytes`: the least recently used make room."""

    def __init__(self, root: Path | str | None = None, max_bytes: int | None = None) -> None:
        """
        root: default $FPO_SHARDS, else $XDG_CACHE_HOME/fpo-shards, else ~/.cache/fpo-shards.
        max_bytes: default $FPO_SHARDS_GIB GiB, else 20 GiB. Processes that share a folder should agree.
        """
        self.root = Path(root) if root is not None else _default_root()
        self.max_bytes = max_bytes if max_bytes is not None else _default_bytes()
        self.ahead = LookAhead(self.max_bytes // 2)
        """What is fetched before it is read, for all that this process streams through the shelf."""
        self._folder = Folder(self.root)
        self._told = False

    def get(self, entry: ShardEntry) -> bytes | None:
        """A shard's verified bytes, or None; a damaged one is removed."""
        name = _file_name(entry)
        try:
            data = self._folder.read(name, min(entry.size, MAX_FILE_BYTES))
        except CacheError:
            data = b""
        if len(data) == entry.size and sha256_hex(data) == entry.sha256:
            with contextlib.suppress(OSError):
                os.utime(self.root / name)
            return data
        with contextlib.suppress(CacheError):
            self._folder.remove(name)
        return None

    def has(self, entry: ShardEntry) -> bool:
        """Whether a file of that name and size is there, unverified."""
        with contextlib.suppress(CacheError):
            return self._folder.size(_file_name(entry)) == entry.size
        return False

    def put(self, entry: ShardEntry, data: bytes) -> bool:
        """Keep these verified bytes, making room first. False where they cannot be kept."""
        if entry.size > self.max_bytes:
            return False
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with _locked(self.root / "lock"):
                self._make_room(entry.size)
                replace_file(self.root / _file_name(entry), data)
        except OSError as error:
            if not self._told:
                self._told = True
                _log.warning("shards are not kept in %s (%s): each is fetched again when needed", self.root, error)
            return False
        return True

    @contextlib.contextmanager
    def fetching(self, entry: ShardEntry) -> Iterator[None]:
        """One process fetches a shard, the others wait and find it."""
        path = self.root / f"{entry.sha256}.fetch"
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(path))
            try:
                yield
            finally:
                # Whoever waits on the removed file goes on, whoever comes later finds the shard.
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _make_room(self, size: int) -> None:
        """Called with the lock held, so every unfinished file is a leftover of a killed process."""
        files = []
        with os.scandir(self.root) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX):
                    with contextlib.suppress(FileNotFoundError):
                        facts = entry.stat(follow_symlinks=False)
                        files.append((facts.st_mtime_ns, facts.st_size, entry.path))
                elif f"{_SUFFIX}." in entry.name:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(entry.path)
        excess = sum(n for _, n, _ in files) + size - self.max_bytes
        for _, n_bytes, path in sorted(files):
            if excess <= 0:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            excess -= n_bytes


class _Plan:
    """What one folder expects to be read."""

    def __init__(self, names: Sequence[str]) -> None:
        self.left = list(reversed(names))
        """Still to be fetched, the next one last."""
        self.n = len(self.left)

    @property
    def share(self) -> float:
        """How much of it is on its way."""
        return 1 - len(self.left) / max(self.n, 1)


class LookAhead:
    """
    Fetches in the background what the folders of one shelf expect to be read, together no more than a budget. A base
    and its columns are read side by side: whose plan is the least far on goes first.
    """

    def __init__(self, max_bytes: int, threads: int = FETCH_THREADS) -> None:
        """max_bytes: half of the shelf; the other half is what was read lately, by this process or others."""
        self._budget, self._threads = max_bytes, threads
        self.lock = threading.RLock()
        self._folders: weakref.WeakSet[StreamingFolder] = weakref.WeakSet()
        self._running = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fpo-fetch")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def join(self, folder: StreamingFolder) -> None:
        """Take a folder into account as long as it lives."""
        with self.lock:
            self._folders.add(folder)

    def give_up(self) -> None:
        """Nothing can be kept, so nothing is gained by fetching early."""
        self._budget = 0

    def go_on(self) -> None:
        """Start as many fetches as threads are free and the budget allows."""
        with self.lock:
            while self._running < self._threads:
                waiting = [folder for folder in self._folders if folder.plan.left]
                if not waiting:
                    return
                folder = min(waiting, key=lambda one: one.plan.share)
                entry = folder.entries[folder.plan.left[-1]]
                if sum(one.bytes_ahead() for one in self._folders) + entry.size > self._budget:
                    return
                try:
                    future = self._pool.submit(self._fetch, folder, entry)
                except RuntimeError:  # the interpreter ends
                    return
                folder.ahead[folder.plan.left.pop()] = future
                self._running += 1

    def _fetch(self, folder: StreamingFolder, entry: ShardEntry) -> None:
        try:
            folder.fetch_ahead(entry)
        finally:
            with self.lock:
                self._running -= 1
            self.go_on()


class StreamingFolder(Objects):
    """
    The objects of a remote cache, or of a column of it; its shards come through a shelf, those that are expected ahead
    of time.
    """

    def __init__(self, remote: Objects, entries: Sequence[ShardEntry], shelf: Shelf) -> None:
        self.remote, self.shelf = remote, shelf
        self.entries = {shard_name(entry.shard): entry for entry in entries}
        self.plan = _Plan([])
        self.ahead: dict[str, Future[None]] = {}
        """Being fetched, or on the shelf and not read yet."""
        self._process = os.getpid()
        shelf.ahead.join(self)

    def inside(self, name: str) -> Objects:
        """What lies inside has shards of its own, which this folder does not know."""
        return self.remote.inside(name)

    def expect(self, names: Sequence[str]) -> None:
        """Fetch these in the background, in this order, as far as half of the shelf; forgets earlier hints."""
        with self.shelf.ahead.lock:
            self.plan = _Plan([name for name in names if name in self.entries])
            self.ahead = {name: future for name, future in self.ahead.items() if not future.done()}
        self.shelf.ahead.go_on()

    def bytes_ahead(self) -> int:
        """Of what is being fetched, or on the shelf and not read yet."""
        return sum(self.entries[name].size for name in self.ahead)

    def fetch_ahead(self, entry: ShardEntry) -> None:
        """Put a shard on the shelf that is not there."""
        if not self.shelf.has(entry):
            with self.shelf.fetching(entry):
                if not self.shelf.has(entry) and not self.shelf.put(entry, self._fetch(entry)):
                    self.shelf.ahead.give_up()

    def read(self, name: str, limit: int) -> bytes:
        entry = self.entries.get(name)
        if entry is None:
            return self.remote.read(name, limit)
        if os.getpid() != self._process:
            # The threads did not come along, and waiting for one of them would never end.
            raise CacheError(f"{self.where('')} was opened before this process was forked; open it in each process")
        with self.shelf.ahead.lock:
            if name in self.plan.left:
                self.plan.left.remove(name)
            fetched = self.ahead.get(name)
        if fetched is not None:
            # What went wrong there is met again here, and told from here.
            fetched.exception()
        data = self._load(entry)
        with self.shelf.ahead.lock:
            self.ahead.pop(name, None)
        self.shelf.ahead.go_on()
        return data

    def _load(self, entry: ShardEntry) -> bytes:
        data = self.shelf.get(entry)
        if data is not None:
            return data
        with self.shelf.fetching(entry):
            data = self.shelf.get(entry)
            if data is None:
                data = self._fetch(entry)
                self.shelf.put(entry, data)
            return data

    def _fetch(self, entry: ShardEntry) -> bytes:
        """A run of days must not die of a network that is away for a minute; of damage it must."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return fetch_shard(self.remote, entry)
            except (CacheDamaged, CacheMissing):
                raise
            except CacheError as error:
                left = end - time.monotonic()
                if left <= 0:
                    raise
                _log.warning("%s (trying for another %d s)", error, left)
                time.sleep(min(_PAUSE_SECONDS, left))

    def where(self, name: str) -> str:
        return self.remote.where(name)

    def size(self, name: str) -> int:
        return self.remote.size(name)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        return self.remote.sizes(names)

    def names(self, subfolder: str = "") -> list[str]:
        return self.remote.names(subfolder)

    def prepare(self, *subfolders: str) -> None:
        self.remote.prepare(*subfolders)

    def create(self, name: str, data: bytes) -> bool:
        return self.remote.create(name, data)

    def sync(self, subfolder: str) -> None:
        self.remote.sync(subfolder)

    def set_aside(self, name: str) -> str | None:
        return self.remote.set_aside(name)

    def remove(self, name: str) -> None:
        self.remote.remove(name)


_SUFFIX = ".zarr.zip"


def _file_name(entry: ShardEntry) -> str:
    return f"{entry.sha256}{_SUFFIX}"


def _default_root() -> Path:
    own = os.environ.get("FPO_SHARDS")
    base = os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(base) if base else memo_folder().parent) / "fpo-shards"


def _default_bytes() -> int:
    text = os.environ.get("FPO_SHARDS_GIB") or str(DEFAULT_GIB)
    try:
        gib = float(text)
        if not 0 <= gib < 2**20:
            raise ValueError
    except ValueError:
        raise CacheError(f"FPO_SHARDS_GIB is {text!r}; give the GiB that streamed shards may take, as 20") from None
    return int(gib * 2**30)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if fcntl is not None:
            # Without locks (some network file systems) two processes may fetch a shard twice or pass the bound briefly.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
