"""
What the store knows of the place where a cache lies: objects with forward slashes in their names, written once
and never replaced. `files.Folder` is such a place on this machine, `bucket` and `hub` hold those behind a URL.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import datetime
from typing import Self

from fpo.errors import CacheMissing


class Objects(ABC):
    """The objects of one cache, or of a column of it."""

    @abstractmethod
    def inside(self, name: str) -> Objects:
        """The place below, of a column say."""

    @abstractmethod
    def where(self, name: str) -> str:
        """How messages call an object; the place itself for an empty name."""

    @abstractmethod
    def prepare(self, *subfolders: str) -> None:
        """Make the place and these inside it ready for `create`. Raises CacheError where nothing can be written."""

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """
        The whole object. Raises CacheMissing where there is none, CacheDamaged for one above `limit` bytes,
        CacheError where the place cannot be read.
        """

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a new object; False where the name is taken already, whose bytes then stay as they are."""

    @abstractmethod
    def sync(self, subfolder: str) -> None:
        """When this returns, what was created inside is durable and visible to everybody."""

    @abstractmethod
    def size(self, name: str) -> int:
        """In bytes. Raises CacheMissing where there is none."""

    @abstractmethod
    def names(self, subfolder: str = "") -> list[str]:
        """Of the objects (and folders) directly inside, sorted; none where the folder is absent."""

    @abstractmethod
    def set_aside(self, name: str) -> str | None:
        """Move an object into tmp/ and return its name there; None where somebody else was faster."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove an object if it is there."""

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Of those that are there, in as few requests as the place allows."""
        found = {}
        for name in names:
            with contextlib.suppress(CacheMissing):
                found[name] = self.size(name)
        return found

    def holds(self, name: str, data: bytes) -> bool:
        """Whether exactly these bytes stand under the name: read back, unless the place can prove it otherwise."""
        try:
            return self.size(name) == len(data) and self.read(name, len(data)) == data
        except CacheMissing:
            return False

    def arrived(self, name: str, data: bytes) -> bool:
        """Whether what was just created looks whole: the size, and the place's own checksum where it has one."""
        return self.size(name) == len(data)

    def expect(self, names: Sequence[str]) -> None:  # noqa: B027 - most places do nothing
        """A hint: these will be read next, in this order. Places that are near need none."""


class RemoteObjects(Objects):
    """Objects behind a URL, of one cache or, at the root of a store, of all of them."""

    listable = True
    """Whether `names` works: plain web servers have no listing."""

    @abstractmethod
    def inside(self, name: str) -> Self: ...

    @abstractmethod
    def modified(self, name: str) -> datetime:
        """When an object was written (UTC). Raises CacheMissing."""
