"""
Caches in a dataset repository of the Hugging Face hub, hf://datasets/owner/name[@revision][/path], through
huggingface_hub. The token comes from the environment (HF_TOKEN) or from `hf auth login`.

The hub knows commits, not puts: what is created is uploaded at once and becomes visible with the next commit, a
hundred objects at a time. A commit names its parent, so it fails where somebody else was faster.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fpo.canonical import sha256_hex
from fpo.errors import CacheConflict, CacheDamaged, CacheError, CacheMissing
from fpo.store.objects import RemoteObjects
from fpo.store.remote import pace

SCHEME = "hf"

_URL = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<path>.*))?")
_COMMIT_FILES = 100
"""Objects in one commit: what the hub recommends."""
_COMMIT_ATTEMPTS = 6
_READ_ATTEMPTS = 4
_LOGIN = "run hf auth login or set HF_TOKEN to a token that may do this"


class _BrokeOff(CacheError):
    """An answer that did not arrive whole."""


@dataclass(frozen=True)
class _Content:
    """What proves an object's bytes: large files carry their sha256 on the hub, small ones git's blob id."""

    size: int
    sha256: str | None
    blob_id: str | None

    def fits(self, data: _Content) -> bool:
        same = self.sha256 == data.sha256 if self.sha256 else self.blob_id == data.blob_id
        return self.size == data.size and same


class HubRepo:
    """One revision of a dataset repository, pinned to the commit that it is when first asked."""

    def __init__(self, repo_id: str, revision: str | None) -> None:
        from huggingface_hub import HfApi

        self.api = HfApi()
        self.repo_id, self.revision = repo_id, revision
        self.lock = threading.RLock()
        self.pending: dict[str, tuple[Any, _Content]] = {}
        self._commit: str | None = None
        self._trees: dict[str, dict[str, _Content]] = {}

    @property
    def commit(self) -> str:
        """The commit that is read. Moves only with our own commits and when another's is found in the way."""
        with self.lock:
            if self._commit is None:
                facts = self.api.repo_info(self.repo_id, repo_type="dataset", revision=self.revision)
                self._commit = str(facts.sha)
            return self._commit

    def tree(self, folder: str) -> dict[str, _Content]:
        """Every file below a folder, by its path in the repository."""
        from huggingface_hub.errors import EntryNotFoundError

        with self.lock:
            if folder not in self._trees:
                files = {}
                with contextlib.suppress(EntryNotFoundError):
                    for item in self._list(folder, recursive=True):
                        if hasattr(item, "size"):
                            files[item.path] = _content_of(item)
                self._trees[folder] = files
            return self._trees[folder]

    def top(self, folder: str) -> list[str]:
        """Names directly inside a folder."""
        from huggingface_hub.errors import EntryNotFoundError

        with contextlib.suppress(EntryNotFoundError):
            return sorted(item.path.rsplit("/", 1)[-1] for item in self._list(folder, recursive=False))
        return []

    def _list(self, folder: str, recursive: bool) -> Iterator[Any]:
        items = self.api.list_repo_tree(
            self.repo_id, folder.rstrip("/") or None, recursive=recursive, revision=self.commit, repo_type="dataset"
        )
        for count, item in enumerate(items):
            pace.check_listed(f"{SCHEME}://datasets/{self.repo_id}/{folder}", count)
            yield item

    def download(self, path: str, where: str) -> Iterator[bytes]:
        """A file's bytes as they arrive, held against the floor of `pace`."""
        from huggingface_hub import hf_hub_url, utils

        hub: Any = utils  # lazily exported names
        url = hf_hub_url(self.repo_id, path, repo_type="dataset", revision=self.commit, endpoint=self.api.endpoint)
        # As it is, not compressed: its length is known, and a megabyte cannot become a gigabyte.
        headers = hub.build_hf_headers(token=self.api.token) | {"Accept-Encoding": "identity"}
        session = hub.get_session()
        with session.stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=pace.ANSWER_SECONDS
        ) as response:
            if response.is_error:
                response.read()
            hub.hf_raise_for_status(response)
            progress = pace.Pace(where)
            for chunk in response.iter_raw():
                progress.arrived(len(chunk))
                yield chunk

    def stage(self, path: str, data: bytes) -> None:
        """Upload what is large, and let the next commit bring it."""
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(path_in_repo=path, path_or_fileobj=data)
        self.api.preupload_lfs_files(
            self.repo_id, [operation], repo_type="dataset", revision=self.revision, num_threads=1
        )
        with self.lock:
            self.pending[path] = operation, _content(data)
            if len(self.pending) >= _COMMIT_FILES:
                self.publish()

    def publish(self) -> None:
        """Commit what is staged. Raises CacheConflict where another commit holds other bytes under one of the names."""
        from huggingface_hub.errors import HfHubHTTPError

        with self.lock:
            for attempt in range(_COMMIT_ATTEMPTS):
                if not self.pending:
                    return
                try:
                    answer = self.api.create_commit(
                        self.repo_id,
                        [operation for operation, _ in self.pending.values()],
                        commit_message=f"Add {len(self.pending)} objects of a preference cache",
                        repo_type="dataset",
                        revision=self.revision,
                        parent_commit=self.commit,
                    )
                except HfHubHTTPError as error:
                    if error.response.status_code not in (409, 412) or attempt + 1 == _COMMIT_ATTEMPTS:
                        raise
                    self._move_on(None)
                    self._drop_published()
                else:
                    self._move_on(str(answer.oid))
                    self._drop_published()
                    self._refuse_ignored()

    def _move_on(self, commit: str | None) -> None:
        self._commit = commit
        self._trees.clear()

    def _drop_published(self) -> None:
        """What now stands there need not be committed, by whomever it was."""
        for item in self.api.get_paths_info(
            self.repo_id, list(self.pending), revision=self.commit, repo_type="dataset"
        ):
            if not _content_of(item).fits(self.pending[item.path][1]):
                raise CacheConflict(
                    f"hf://datasets/{self.repo_id}/{item.path} has other bytes than those to write; nothing is replaced"
                )
            del self.pending[item.path]

    def _refuse_ignored(self) -> None:
        if self.pending:
            raise CacheError(
                f"the hub left {next(iter(self.pending))} out of a commit: {self.repo_id} has a .gitignore that names "
                "it; remove that line and run the same command again"
            )


class HubFolder(RemoteObjects):
    """Objects under one path of a dataset repository."""

    def __init__(self, url: str, repo: HubRepo | None = None) -> None:
        """Nothing is asked of the hub yet. Raises CacheError for a URL that is none of the hub's datasets."""
        parts = _URL.fullmatch(url.rstrip("/"))
        if parts is None:
            raise CacheError(f"{url} is no place on the hub; write hf://datasets/owner/name[@revision][/path]")
        self.url = url.rstrip("/")
        path = parts["path"] or ""
        self._prefix = f"{path}/" if path else ""
        self._repo = repo or HubRepo(parts["repo"], parts["revision"])

    def inside(self, name: str) -> HubFolder:
        return HubFolder(f"{self.url}/{name}", self._repo)

    def where(self, name: str) -> str:
        return f"{self.url}/{name}".rstrip("/")

    def prepare(self, *subfolders: str) -> None:
        """Asks once whether the repository is there; it is never made, since it would be public by mistake."""
        with self._explained("write", ""):
            _ = self._repo.commit

    def read(self, name: str, limit: int) -> bytes:
        size = self.size(name)
        if size > limit:
            raise CacheDamaged(f"{self.where(name)} has {size} bytes, at most {limit} are read")
        for _ in range(_READ_ATTEMPTS - 1):
            with contextlib.suppress(_BrokeOff):
                return self._read(name, size)
        return self._read(name, size)

    def _read(self, name: str, size: int) -> bytes:
        """Never more than the listing says."""
        with self._explained("read", name):
            data = bytearray()
            for chunk in self._repo.download(self._prefix + name, self.where(name)):
                data += chunk
                if len(data) > size:
                    break
        if len(data) > size:
            raise CacheDamaged(f"{self.where(name)} has more than the {size} bytes that the hub lists")
        if len(data) < size:
            raise _BrokeOff(f"{self.where(name)} broke off after {len(data)} of {size} bytes; run it again")
        return bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        """True once it is uploaded; `sync` makes it visible."""
        path = self._prefix + name
        with self._explained("write", name):
            if path in self._tree() or path in self._repo.pending:
                return False
            self._repo.stage(path, data)
        return True

    def sync(self, subfolder: str) -> None:
        with self._explained("write", subfolder):
            self._repo.publish()

    def size(self, name: str) -> int:
        return self._content_of(name).size

    def modified(self, name: str) -> datetime:
        with self._explained("read", name):
            found = self._repo.api.get_paths_info(
                self._repo.repo_id, [self._prefix + name], expand=True, revision=self._repo.commit, repo_type="dataset"
            )
        if not found or found[0].last_commit is None:
            raise CacheMissing(f"{self.where(name)} is missing")
        written: datetime = found[0].last_commit.date
        return written.astimezone(UTC)

    def names(self, subfolder: str = "") -> list[str]:
        with self._explained("list", subfolder):
            return self._repo.top(self._prefix + subfolder)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        with self._explained("list", ""):
            tree = self._tree()
        return {name: tree[self._prefix + name].size for name in names if self._prefix + name in tree}

    def holds(self, name: str, data: bytes) -> bool:
        try:
            return self._content_of(name).fits(_content(data))
        except CacheMissing:
            return False

    def arrived(self, name: str, data: bytes) -> bool:
        """The hub refuses uploads whose sha256 is not the announced one."""
        return True

    def set_aside(self, name: str) -> str | None:
        raise CacheError(f"{self.where(name)} is damaged, and nothing is moved on the hub; delete it and run again")

    def remove(self, name: str) -> None:
        raise CacheError(f"{self.where(name)}: nothing is removed on the hub; use hf repo or the web page")

    def _tree(self) -> dict[str, _Content]:
        return self._repo.tree(self._prefix)

    def _content_of(self, name: str) -> _Content:
        with self._explained("read", name):
            found = self._tree().get(self._prefix + name)
        if found is None:
            raise CacheMissing(f"{self.where(name)} is missing")
        return found

    @contextlib.contextmanager
    def _explained(self, verb: str, name: str) -> Iterator[None]:
        """An error of the hub becomes one line: what failed, where, why, what to do."""
        try:
            yield
        except CacheError:
            raise
        except Exception as error:
            # Uploads wrap what went wrong in a RuntimeError.
            reasons = [reason for reason in (error, error.__cause__) if isinstance(reason, Exception)]
            known = [found for reason in reasons if (found := self._as_cache_error(verb, name, reason))]
            if not known:
                raise
            raise known[0] from error

    def _as_cache_error(self, verb: str, name: str, error: Exception) -> CacheError | None:
        from huggingface_hub import errors

        repo, start = self._repo, f"cannot {verb} {self.where(name)}"
        reason = re.sub(r"\s+", " ", str(error))[:200]
        if isinstance(error, errors.EntryNotFoundError):
            return CacheMissing(f"{self.where(name)} is missing")
        if isinstance(error, errors.RevisionNotFoundError):
            return CacheError(f"{start}: {repo.repo_id} has no revision {repo.revision}")
        if isinstance(error, errors.RepositoryNotFoundError):
            return CacheError(
                f"{start}: no dataset {repo.repo_id} that this token may see; make it with "
                f"hf repo create {repo.repo_id} --repo-type dataset, or {_LOGIN}"
            )
        if isinstance(error, errors.OfflineModeIsEnabled):
            return CacheError(f"{start}: the hub is switched off by HF_HUB_OFFLINE; unset it")
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            if status in (401, 403):
                return CacheError(f"{start}: the hub refuses ({status}); {_LOGIN}")
            return CacheError(f"{start}: the hub answers {status} ({reason}); run the same command again")
        # huggingface_hub passes the errors of its HTTP and transfer libraries through, whichever these are.
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _TRANSPORTS:
            kind = _BrokeOff if verb == "read" else CacheError
            return kind(f"{start}: {reason}; check the network, then run the same command again")
        return None


_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet")


def _content_of(item: Any) -> _Content:
    return _Content(int(item.size), item.lfs.sha256 if item.lfs else None, item.blob_id)


def _content(data: bytes) -> _Content:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return _Content(len(data), sha256_hex(data), blob.hexdigest())
