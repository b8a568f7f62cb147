"""
Names that people give to caches: STORE/tags/NAME holds the key that it stands for.

A tag works wherever a key does, may be moved to another cache, and keeps its cache from being collected.
"""

from __future__ import annotations

import re
from pathlib import Path

from fpo.errors import CacheConflict, CacheDamaged, CacheError, CacheMissing
from fpo.nearest import nearest
from fpo.store.files import Folder, explained, replace_file
from fpo.store.objects import Objects, RemoteObjects

TAGS = "tags"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_LIKE_A_KEY = re.compile(r"[0-9a-f]+")
_CONTENT = re.compile(rb"([0-9a-f]{64})\n")


def check_tag_name(name: str) -> None:
    """Raises CacheError for what is no name, or could be taken for the start of a key."""
    if not _NAME.fullmatch(name):
        raise CacheError(
            f"{name!r} cannot be a tag: use up to 100 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
        )
    if _LIKE_A_KEY.fullmatch(name):
        raise CacheError(f"{name!r} cannot be a tag: it could be the start of a key; add a letter beyond f, or a '-'")


def is_tag_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and not _LIKE_A_KEY.fullmatch(name)


def read_tag(store: Objects, name: str) -> str | None:
    """The key that a tag of this store stands for; None where there is no such tag. Raises CacheDamaged."""
    if not is_tag_name(name):
        return None
    try:
        if isinstance(store, RemoteObjects):
            content = store.inside(TAGS).read(name, 2**10)
        else:
            content = store.read(f"{TAGS}/{name}", 2**10)
    except CacheMissing:
        return None
    found = _CONTENT.fullmatch(content)
    if found is None:
        raise CacheDamaged(f"{store.where(f'{TAGS}/{name}')} holds no key; delete it and tag again")
    return found[1].decode()


def read_tags(store: Objects) -> dict[str, str]:
    """Every tag with its key; damaged ones are left out."""
    tags = {}
    for name in store.names(TAGS):
        try:
            key = read_tag(store, name)
        except CacheDamaged:
            continue
        if key is not None:
            tags[name] = key
    return tags


def carry_tag(store: RemoteObjects, name: str, key: str) -> None:
    """Let `name` stand for `key` at a URL, where nothing is replaced. Raises CacheConflict where it is taken."""
    folder, data = store.inside(TAGS), f"{key}\n".encode()
    if folder.create(name, data):
        folder.sync("")
    refuse_other_tag(store, name, key)


def refuse_other_tag(store: Objects, name: str, key: str) -> None:
    """Raises CacheConflict where the tag stands for another cache: a tag of somebody else's does not move."""
    theirs = read_tag(store, name)
    if theirs not in (None, key):
        raise CacheConflict(
            f"the tag {name} in {store.where('')} stands for {theirs[:12]}, not for {key[:12]}; give yours another "
            f"name (fpo store tag {key[:12]} NAME), or go by the key {key[:12]}"
        )


def write_tag(root: Path, name: str, key: str) -> str | None:
    """Let `name` stand for `key`, atomically; returns the key that it stood for. Raises CacheError."""
    check_tag_name(name)
    before = read_tag(Folder(root), name)
    with explained("write", root / TAGS / name):
        replace_file(root / TAGS / name, f"{key}\n".encode())
    return before


def remove_tag(root: Path, name: str) -> str:
    """Forget a tag; returns the key that it stood for, which keeps its cache. Raises CacheMissing."""
    folder = Folder(root)
    key = read_tag(folder, name)
    if key is None:
        known = sorted(read_tags(folder))
        near = nearest(name, known)
        hint = f"; did you mean {near}?" if near else f"; it has {', '.join(known[:10])}" if known else ""
        raise CacheMissing(f"{root} has no tag {name!r}{hint}")
    folder.remove(f"{TAGS}/{name}")
    return key
