"""
A store at a URL, and the one function that opens any store.
"""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime
from pathlib import Path

from fpo.errors import CacheError, CacheMissing
from fpo.store.format.key import is_key
from fpo.store.format.manifest import RECIPE
from fpo.store.local import URL, Store
from fpo.store.objects import RemoteObjects
from fpo.store.remote.bucket import SCHEMES as BUCKET_SCHEMES
from fpo.store.remote.bucket import BucketFolder
from fpo.store.remote.hub import SCHEME as HUB_SCHEME
from fpo.store.remote.hub import HubFolder
from fpo.store.summaries import Summary, look
from fpo.store.upkeep.tags import carry_tag, read_tag, read_tags, refuse_other_tag


def is_url(store: Store | RemoteStore | Path | str) -> bool:
    """Whether this names a store that is not a folder of this machine."""
    return isinstance(store, RemoteStore) or (isinstance(store, str | Path) and URL.fullmatch(str(store)) is not None)


def open_store(store: Store | RemoteStore | Path | str) -> Store | RemoteStore:
    """
    A folder; s3://bucket/path, gs://, az://container/path; https://host/path (read-only);
    hf://datasets/owner/name[@revision][/path]. Nothing is asked of the server yet.

    A Path that was made from a URL, and so lost a slash, is understood.
    Raises CacheError for a URL that cannot be used.
    """
    if isinstance(store, Store | RemoteStore):
        return store
    parts = URL.fullmatch(os.fspath(store))
    if parts is None:
        return Store(store)
    scheme, rest = parts[1].lower(), parts[2]
    if scheme == HUB_SCHEME:
        return RemoteStore(HubFolder(f"{scheme}://{rest}"))
    if scheme in BUCKET_SCHEMES:
        return RemoteStore(BucketFolder(f"{scheme}://{rest}"))
    known = ", ".join(f"{name}://" for name in (*BUCKET_SCHEMES[:-1], HUB_SCHEME))
    raise CacheError(f"{scheme}://{rest}: a store is a folder or begins with {known}")


class RemoteStore:
    """The caches under one URL: read there, or moved with `push` and `pull`; never built, tagged or removed."""

    def __init__(self, root: RemoteObjects) -> None:
        self._root = root

    @property
    def root(self) -> str:
        """The URL."""
        return self._root.where("")

    def keys(self) -> list[str]:
        """Of every cache here, complete or not, sorted. Raises CacheError where the server has no listing."""
        return [name for name in self._root.names() if is_key(name)]

    def folder(self, key: str) -> RemoteObjects:
        """The objects of the cache of this full key."""
        if not is_key(key):
            raise ValueError(f"a key has 64 hex digits, got {key!r}")
        return self._root.inside(key)

    def resolve(self, name: str) -> str:
        """
        The one key here that starts with `name`, or that the tag `name` stands for. A full key and a tag are answered
        without a listing.

        Raises CacheMissing, which lists what is here, where none or several do.
        """
        tagged = read_tag(self._root, name)
        if tagged is not None:
            return tagged
        if is_key(name) and self.folder(name).sizes([RECIPE]):
            return name
        if not self._root.listable:
            what = f"no cache {name}" if is_key(name) else f"{name!r} is no full key, and {self.root} no listing"
            raise CacheMissing(f"{what}: give the 64 digits of a cache that lies in {self.root}")
        keys = self.keys()
        found = [key for key in keys if name and key.startswith(name)]
        if len(found) == 1:
            return found[0]
        shown = "".join(f"\n  {key}" for key in (found or keys)[:10])
        if found:
            raise CacheMissing(f"{name} is the start of {len(found)} keys in {self.root}; give more digits{shown}")
        listing = f"it holds {len(keys)} caches{shown}" if keys else "it is empty; fill it with fpo store push"
        raise CacheMissing(f"no cache in {self.root} has a key that starts with {name!r}; {listing}")

    def summaries(self) -> list[Summary]:
        """Every cache here, in key order; a damaged one carries its problem instead of raising."""
        tags = self.tags()
        return [self._summary(key, tuple(name for name in tags if tags[name] == key)) for key in self.keys()]

    def tags(self) -> dict[str, str]:
        """Every tag and the key that it stands for. Raises CacheError where the server has no listing."""
        return read_tags(self._root)

    def tag_of(self, name: str, key: str) -> str | None:
        """`name` if it is a tag of this cache."""
        return name if read_tag(self._root, name) == key else None

    def refuse_other_tag(self, name: str, key: str) -> None:
        """Raises CacheConflict where the tag stands for another cache."""
        refuse_other_tag(self._root, name, key)

    def carry_tag(self, name: str, key: str) -> None:
        """Let `name` stand for a cache that was just brought here. Raises CacheConflict where it is another's."""
        carry_tag(self._root, name, key)

    def _summary(self, key: str, tags: tuple[str, ...]) -> Summary:
        folder = self.folder(key)
        created = datetime.fromtimestamp(0, UTC)
        with contextlib.suppress(CacheError):  # its recipe is missing, which `look` meets, too
            created = folder.modified(RECIPE)
        return look(folder, key, created, None, tags)
