"""
A folder of named objects that are written once, durably, and never replaced.

`Folder` is the place where a cache lies on this machine; what the rest of the store knows of it stands in
`objects`. An object store offers the same (create is its conditional put).

Writing: bytes to a fresh file in tmp/, fsync, hard link to the final name (atomic, and it fails where
the name is taken), fsync of the directory. A reader never sees a part of a file, and the first writer wins.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fpo.errors import CacheDamaged, CacheError, CacheMissing
from fpo.store.objects import Objects

TMP = "tmp"
"""Where unfinished files lie. Leftovers of killed writers are never read."""

_NO_HARD_LINKS = {
    errno.EPERM,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.EMLINK,
    errno.EINVAL,
    errno.EXDEV,
}
_NEXT_STEP = {
    errno.ENOSPC: "free some space and run the same command again, finished shards are kept",
    errno.EDQUOT: "free some space and run the same command again, finished shards are kept",
    errno.EROFS: "choose a writable store with --store or FPO_STORE",
    errno.EACCES: "check its permissions, or choose another store with --store or FPO_STORE",
    errno.EPERM: "check its permissions, or choose another store with --store or FPO_STORE",
    errno.EIO: "the disk reports a failure: check it, then run the same command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def printable(text: str, most: int = 100) -> str:
    """Something that a stranger wrote, for a message: no line breaks, no terminal codes, no end of pages."""
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= most else shown[:most] + "..."


class Folder(Objects):
    """Objects under one directory, reached from the `anchor` above it without following any link."""

    def __init__(self, root: Path, anchor: Path | None = None) -> None:
        """anchor: of a cache, the folder of its store; by default the directory itself. See `refuse_links`."""
        self.root = root
        self.anchor = root if anchor is None else anchor

    def inside(self, name: str) -> Folder:
        """The folder `name` in this one, reached from the same anchor."""
        return Folder(self.root / name, self.anchor)

    def where(self, name: str) -> str:
        """How messages call an object."""
        return str(self.root / name)

    def prepare(self, *subfolders: str) -> None:
        """Make the directory and these inside it, durably."""
        for path in (self.root, self.root / TMP, *(self.root / name for name in subfolders)):
            with explained("make", path):
                refuse_links(path, self.anchor)
                make_durable_dirs(path)

    def read(self, name: str, limit: int) -> bytes:
        """
        The whole object. Raises CacheMissing where there is none, CacheDamaged for one above `limit`
        bytes or one that is no plain file (a link could lead anywhere).
        """
        path = self._path(name)
        with explained("read", path):
            try:
                descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            except FileNotFoundError:
                raise CacheMissing(f"{path} is missing") from None
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise CacheDamaged(f"{path} is a link, not a file") from None
                raise
            with os.fdopen(descriptor, "rb") as file:
                facts = os.fstat(descriptor)
                if not stat.S_ISREG(facts.st_mode):
                    raise CacheDamaged(f"{path} is no plain file")
                if facts.st_size > limit:
                    raise CacheDamaged(f"{path} has {facts.st_size} bytes, at most {limit} are read")
                return file.read(facts.st_size)

    def create(self, name: str, data: bytes) -> bool:
        """Write a new object; False where the name is taken already, whose bytes then stay as they are."""
        path = self._path(name)
        with explained("write", path):
            if os.path.lexists(path):
                # Somebody may have made the name without having synced it yet; what follows relies on it.
                _sync_directory(path.parent)
                return False
            temporary = _write_temporary(self._path(f"{TMP}/{path.name}").parent, path.name, data)
            try:
                created = move_without_replacing(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            _sync_directory(path.parent)
            return created

    def sync(self, subfolder: str) -> None:
        """Make the names inside durable, whoever made them."""
        path = self.root / subfolder
        refuse_links(path, self.anchor)
        with explained("sync", path):
            _sync_directory(path)

    def size(self, name: str) -> int:
        """In bytes. Raises CacheMissing where there is none."""
        path = self._path(name)
        with explained("read", path):
            try:
                return os.lstat(path).st_size
            except (FileNotFoundError, NotADirectoryError):
                raise CacheMissing(f"{path} is missing") from None

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Of those that are there; the folders on the way are looked at once, not for each of thousands of names."""
        for parent in {os.path.dirname(name) for name in names}:
            refuse_links(self.root / parent, self.anchor)
        found, root = {}, os.fspath(self.root)
        with explained("read", self.root):
            for name in names:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    found[name] = os.lstat(f"{root}/{name}").st_size
        return found

    def names(self, subfolder: str = "") -> list[str]:
        """Of the objects (and folders) directly inside, sorted; none where the folder is absent."""
        path = self.root / subfolder
        refuse_links(path, self.anchor)
        with explained("list", path):
            try:
                return sorted(os.listdir(path))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def set_aside(self, name: str) -> str | None:
        """Move an object into tmp/ and return its name there; None where somebody else was faster."""
        aside = f"{TMP}/{Path(name).name}.{secrets.token_hex(8)}"
        path = self._path(name)
        with explained("move", path):
            try:
                os.rename(path, self._path(aside))
            except FileNotFoundError:
                return None
            _sync_directory(path.parent)
        return aside

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        path = self._path(name)
        with explained("remove", path), contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def delete(self, name: str) -> None:
        """
        Remove an object, or a folder with all in it, which others may be deleting too. Links are removed, never
        followed, not even one that takes a folder's place meanwhile.
        """
        path = self._path(name)
        with explained("remove", path), _opened(path.parent, self.anchor) as parent:
            while True:
                try:
                    if stat.S_ISDIR(os.stat(path.name, dir_fd=parent, follow_symlinks=False).st_mode):
                        shutil.rmtree(path.name, dir_fd=parent)
                    else:
                        os.unlink(path.name, dir_fd=parent)
                except FileNotFoundError:
                    if not os.path.lexists(path):
                        return

    def _path(self, name: str) -> Path:
        path = self.root / name
        refuse_links(path.parent, self.anchor)
        return path

    def move_away(self, target: Path) -> None:
        """Rename the whole folder: at once, nothing of it is left under its name. Raises CacheMissing."""
        for path in (self.root, target):
            refuse_links(path.parent, self.anchor)
        with explained("move", self.root):
            try:
                os.rename(self.root, target)
            except FileNotFoundError:
                raise CacheMissing(f"{self.root} is missing") from None
            _sync_directory(self.root.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Write or overwrite a file atomically: for notes that only save time, not for caches. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The dot: what a killed process leaves is told from a finished file by its name.
    temporary = _write_temporary(path.parent, f".{path.name}", data)
    os.replace(temporary, path)


@contextlib.contextmanager
def explained(verb: str, path: Path) -> Iterator[None]:
    """An OSError becomes one line: what failed, where, why, what to do."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        step = _NEXT_STEP.get(error.errno or 0, "see the reason, then run the same command again")
        raise CacheError(f"cannot {verb} {path}: {reason}; {step}") from error


def refuse_links(folder: Path, anchor: Path) -> None:
    """
    Raises CacheDamaged where `folder`, or one between it and `anchor`, is a link: it could lead anywhere. The anchor
    itself, the root of a store, may be one: its owner made it. What lies below may come from a stranger.
    """
    for path in (folder, *folder.parents):
        if path == anchor:
            return
        if os.path.islink(path):
            raise CacheDamaged(
                f"{path} is a link, not a folder or file of its own; remove it, or put there what it leads to"
            )


@contextlib.contextmanager
def _opened(folder: Path, anchor: Path) -> Iterator[int]:
    """A descriptor of a folder that was reached without following a link below the anchor, whatever others swap."""
    flags = os.O_RDONLY | os.O_DIRECTORY
    descriptor = os.open(anchor, flags)
    try:
        for part in folder.relative_to(anchor).parts:
            inner = os.open(part, flags | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def make_durable_dirs(path: Path, like: Path | None = None) -> None:
    """
    Make a directory and what is missing above it, and make their names durable. Raises OSError.

    like: a directory above whose permissions the new ones below it get, whatever the umask.
    """
    missing = [p for p in (path, *path.parents) if not p.exists()]
    for directory in reversed(missing):
        try:
            directory.mkdir()
        except FileExistsError:  # somebody was faster
            continue
        if like is not None and like in directory.parents:
            os.chmod(directory, stat.S_IMODE(os.stat(like).st_mode))
        _sync_directory(directory.parent)


def _write_temporary(directory: Path, name: str, data: bytes) -> Path:
    temporary = directory / f"{name}.{secrets.token_hex(8)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        os.close(descriptor)
    return temporary


def move_without_replacing(temporary: Path, path: Path) -> bool:
    """Give a finished file its name; False where that is taken. Raises OSError. The temporary name may remain."""
    try:
        os.link(temporary, path)
    except OSError as error:
        # NFS repeats a request whose answer was lost: the link may stand although the call failed.
        if os.stat(temporary).st_nlink == 2:
            return True
        if isinstance(error, FileExistsError):
            return False
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _rename_without_replacing(temporary, path)
    return True


def _rename_without_replacing(temporary: Path, path: Path) -> bool:
    """For file systems without hard links (FAT, some FUSE): Linux renameat2 with RENAME_NOREPLACE."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOTSUP, "neither hard links nor an exclusive rename")
    at_cwd, no_replace = -100, 1
    if libc.renameat2(at_cwd, os.fsencode(temporary), at_cwd, os.fsencode(path), no_replace) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    raise OSError(code, os.strerror(code), str(path))


def _sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Systems that cannot sync a directory sync names themselves."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.name == "nt":
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS):
            raise
    finally:
        os.close(descriptor)
