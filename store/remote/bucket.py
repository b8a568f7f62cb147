"""
Caches in an object store (s3://, gs://, az://) or on a plain web server (https://, read-only), through obstore.

A put is atomic and refuses a taken name (If-None-Match: *), which is all that the cache format asks of a place.
Credentials come from the environment: AWS_*, GOOGLE_*, AZURE_*, or the machine's own role.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fpo.errors import CacheDamaged, CacheError, CacheMissing
from fpo.store.files import printable
from fpo.store.objects import RemoteObjects
from fpo.store.remote import pace

SCHEMES = ("s3", "gs", "az", "https", "http")

RETRY_SECONDS = 120.0
"""How long a request that fails for a passing reason (dropped, refused, 5xx) is repeated."""
_ATTEMPTS = 4
"""Downloads whose body broke off are started again this often."""
_HEADS_AT_ONCE = 16

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (a profile: eval $(aws configure export-credentials "
    "--format env)), or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "run gcloud auth application-default login or set GOOGLE_APPLICATION_CREDENTIALS, "
    "or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, "
    "or AZURE_SKIP_SIGNATURE=true for a public container",
    "https": "this reads plain public https only; use s3://, gs://, az:// or hf:// for what needs a login",
}
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


Answer = TypeVar("Answer")


class _BrokeOff(CacheError):
    """An answer that did not arrive whole. obstore repeats requests that fail, but not answers that break off."""


def _patiently(step: Callable[[], Answer]) -> Answer:
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(_BrokeOff):
            return step()
    return step()


class BucketFolder(RemoteObjects):
    """Objects under one prefix of a bucket, or one path of a web server."""

    def __init__(self, url: str, store: Any = None) -> None:
        """
        url: s3://bucket/path, gs://, az://container/path, https://host/path; http:// for this machine only.

        Nothing is asked of the server yet. Raises CacheError for a URL that cannot be used.
        """
        self.url = url.rstrip("/")
        scheme = urlsplit(url).scheme
        self.scheme = "https" if scheme == "http" else scheme
        self.listable = self.scheme != "https"
        self._store = _connect(self.url, self.scheme, "2h") if store is None else store
        # Answers that are short, and listings page by page: the whole of one has its time.
        self._brief = _connect(self.url, self.scheme, f"{pace.ANSWER_SECONDS}s") if store is None else store
        self._prefix = ""

    def inside(self, name: str) -> BucketFolder:
        folder = BucketFolder(f"{self.url}/{name}", self._store)
        folder._prefix, folder._brief = f"{self._prefix}{name}/", self._brief
        return folder

    def where(self, name: str) -> str:
        return f"{self.url}/{name}".rstrip("/")

    def prepare(self, *subfolders: str) -> None:
        if self.scheme == "https":
            raise CacheError(f"{self.url} is read-only (plain https); write to s3://, gs://, az:// or hf://")

    def read(self, name: str, limit: int) -> bytes:
        """A download that breaks off is started again a few times; it never takes more than `limit` bytes."""
        return _patiently(lambda: self._read(name, limit))

    def _read(self, name: str, limit: int) -> bytes:
        import obstore

        with self._explained("read", name):
            answer = obstore.get(self._store, self._prefix + name)
            size = int(answer.meta["size"])
            data = bytearray()
            if size <= limit:
                progress = pace.Pace(self.where(name))
                # As it arrives: by default chunks are collected up to 10 MiB, for which a byte a second takes months.
                for chunk in answer.stream(min_chunk_size=1):
                    data += memoryview(chunk)
                    progress.arrived(len(chunk))
                    if len(data) > limit:
                        break
            if max(size, len(data)) > limit:
                raise CacheDamaged(f"{self.where(name)} has more than the {limit} bytes that are read")
            if len(data) != size:
                raise _BrokeOff(f"{self.where(name)} broke off after {len(data)} of {size} bytes; run it again")
            return bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        self.prepare()
        with self._explained("write", name):
            try:
                obstore.put(self._store, self._prefix + name, data, mode="create", use_multipart=False)
            except (AlreadyExistsError, FileExistsError):
                return False
        return True

    def sync(self, subfolder: str) -> None:
        """A put is durable when it returns."""

    def size(self, name: str) -> int:
        return int(self._head(name)["size"])

    def modified(self, name: str) -> datetime:
        written: datetime = self._head(name)["last_modified"]
        return written.astimezone(UTC)

    def _head(self, name: str) -> Any:
        import obstore

        with self._explained("read", name):
            return obstore.head(self._brief, self._prefix + name)

    def names(self, subfolder: str = "") -> list[str]:
        import obstore

        if not self.listable:
            raise CacheError(f"{self.url} cannot be listed (plain https); give the full key of 64 digits")
        prefix = f"{self._prefix}{subfolder}"

        async def listing() -> Any:
            return await obstore.list_with_delimiter_async(self._brief, prefix or None)

        found = _patiently(partial(self._listed, subfolder, listing))
        paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        pace.check_listed(self.where(subfolder), len(paths))
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """One listing per folder; for one object or without listings a HEAD of each, several at a time."""
        if not self.listable or len(names) == 1:
            with ThreadPoolExecutor(_HEADS_AT_ONCE) as pool:
                return {n: s for n, s in zip(names, pool.map(self._size_or_none, names), strict=True) if s is not None}
        found: dict[str, int] = {}
        for folder in {name.rpartition("/")[0] for name in names}:
            found |= _patiently(partial(self._sizes_below, folder))
        return {name: found[name] for name in names if name in found}

    def _sizes_below(self, folder: str) -> dict[str, int]:
        import obstore

        async def listing() -> dict[str, int]:
            found: dict[str, int] = {}
            async for batch in obstore.list(self._brief, (self._prefix + folder) or None):
                found |= {meta["path"].removeprefix(self._prefix): int(meta["size"]) for meta in batch}
                pace.check_listed(self.where(folder), len(found))
            return found

        return self._listed(folder, listing)

    def _listed(self, folder: str, listing: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        """What a listing says, in its own event loop, so that one without an end can be given up."""
        seconds = pace.LISTING_SECONDS

        async def within() -> Answer:
            return await asyncio.wait_for(listing(), seconds)

        with self._explained("list", folder), ThreadPoolExecutor(1) as pool:
            try:
                return pool.submit(asyncio.run, within()).result()
            except TimeoutError:
                raise CacheError(
                    f"cannot list {self.where(folder)}: it did not end in {seconds:g} s; give the full key of 64 digits"
                ) from None

    def _size_or_none(self, name: str) -> int | None:
        try:
            return self.size(name)
        except CacheMissing:
            return None

    def holds(self, name: str, data: bytes) -> bool:
        return self._proved(name, data) or super().holds(name, data)

    def arrived(self, name: str, data: bytes) -> bool:
        """
        S3 answers with an ETag that is the MD5 of what arrived. Where it has the shape of one but is another
        (encryption with a customer's key, or damage), the object is read back.
        """
        meta = self._head(name)
        if int(meta["size"]) != len(data):
            return False
        if self.scheme != "s3" or not _MD5.fullmatch(meta["e_tag"] or ""):
            return True
        return self.holds(name, data)

    def _proved(self, name: str, data: bytes) -> bool:
        try:
            meta = self._head(name)
        except CacheMissing:
            return False
        found = _MD5.fullmatch(meta["e_tag"] or "")
        if self.scheme != "s3" or found is None:
            return False
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return int(meta["size"]) == len(data) and found[1] == digest

    def set_aside(self, name: str) -> str | None:
        raise CacheError(f"{self.where(name)} is damaged, and nothing is moved at a URL; delete it and run again")

    def remove(self, name: str) -> None:
        raise CacheError(f"{self.where(name)}: nothing is removed at a URL; use the tools of that store")

    @contextlib.contextmanager
    def _explained(self, verb: str, name: str) -> Iterator[None]:
        """An error of the object store becomes one line: what failed, where, why, what to do."""
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, OSError) as error:
            raise self._as_cache_error(verb, name, error) from error

    def _as_cache_error(self, verb: str, name: str, error: Exception) -> CacheError:
        from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

        where, text = self.where(name), str(error)
        start = f"cannot {verb} {where}"
        bucket = f"{self.scheme}://{urlsplit(self.url).netloc}"
        if any(sign in text for sign in ("NoSuchBucket", "ContainerNotFound", "specified bucket does not exist")):
            return CacheError(f"{start}: there is no bucket {bucket}; check its name, or make it first")
        if isinstance(error, FileNotFoundError):
            return CacheMissing(f"{where} is missing")
        if "169.254." in text or "metadata.google" in text or isinstance(error, UnauthenticatedError):
            return CacheError(f"{start}: no credentials that {bucket} accepts; {_CREDENTIALS[self.scheme]}")
        if isinstance(error, PermissionDeniedError | PermissionError):
            return CacheError(f"{start}: access denied; {_CREDENTIALS[self.scheme]}")
        if any(sign in text for sign in ("error sending request", "timed out", "dns error", "Connect")):
            return CacheError(f"{start}: {urlsplit(self.url).netloc} is not reachable; check the network and the name")
        reason = re.sub(r"\s+", " ", text.split("Debug source")[0])[:300].strip()
        if verb == "list" and ("llegal" in text or "empty path segment" in text or "Invalid path" in text):
            return CacheError(
                f"{start}: it holds an object with a name that is no path ({printable(reason)}); remove that object, "
                "or name caches by all 64 digits"
            )
        return _BrokeOff(f"{start}: {reason}; run the same command again, what has arrived is kept")


def _connect(url: str, scheme: str, whole: str) -> Any:
    """whole: how long a request may take from its first byte to its last."""
    from obstore.exceptions import BaseError
    from obstore.store import HTTPStore, from_url

    parts = urlsplit(url)
    if not parts.netloc:
        raise CacheError(f"{url} names no bucket or host; write {parts.scheme}://NAME/path")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise CacheError(f"{parts.scheme}://{parts.hostname}{parts.path}: a store's URL holds no login and no query")
    if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise CacheError(f"{url}: plain http is for this machine only, others could change what you read; use https")
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "") if scheme == "s3" else ""
    options: dict[str, Any] = {
        # A whole download may take long on a slow line; what must not happen is that nothing comes (see `pace`).
        "client_options": {
            "timeout": whole,
            "connect_timeout": "5s",
            "read_timeout": f"{pace.ANSWER_SECONDS}s",
            "allow_http": parts.scheme == "http" or endpoint.startswith("http://"),
        },
        "retry_config": {"max_retries": 8, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
    }
    try:
        return HTTPStore.from_url(url, **options) if scheme == "https" else from_url(url, **options)
    except (BaseError, ValueError) as error:
        if "Account must be specified" in str(error):
            raise CacheError(f"cannot open {url}: no storage account; {_CREDENTIALS['az']}") from error
        reason = re.sub(r"\s+", " ", str(error).split("Debug source")[0]).strip()
        raise CacheError(f"cannot open {url}: {reason}") from error
