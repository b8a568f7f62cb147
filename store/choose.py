"""
Which columns of a cache a command means: all that are complete, none, or those whose keys begin as somebody said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fpo.errors import CacheMissing
from fpo.store.beside import column_keys
from fpo.store.format.key import is_key
from fpo.store.format.manifest import COLUMNS, MANIFEST, RECIPE
from fpo.store.objects import Objects, RemoteObjects

AllOrKeys = Sequence[str] | Literal["all"]
"""Starts of columns' keys; "all" are the complete ones, of which a server without a listing tells none."""


def choose_columns(folder: Objects, columns: AllOrKeys) -> list[str]:
    """
    Full keys of these columns beside the cache in `folder`, each once.

    Raises CacheMissing, which lists what is there, where a start is that of none or of several.
    """
    if isinstance(folder, RemoteObjects) and not folder.listable:
        return [] if columns == "all" else [_stands(folder, key) for key in dict.fromkeys(columns)]
    keys = column_keys(folder)
    if columns == "all":
        return [key for key in keys if folder.inside(f"{COLUMNS}/{key}").sizes([MANIFEST])]
    return list(dict.fromkeys(_resolve(folder, keys, start) for start in columns))


def _resolve(folder: Objects, keys: list[str], start: str) -> str:
    found = [key for key in keys if start and key.startswith(start)]
    if len(found) == 1:
        return found[0]
    shown = "".join(f"\n  {key}" for key in (found or keys)[:10])
    if found:
        raise CacheMissing(
            f"{start} is the start of {len(found)} columns of {folder.where('')}; give more digits{shown}"
        )
    there = f"it has{shown}" if keys else "it has none"
    raise CacheMissing(f"{folder.where('')} has no column whose key starts with {start!r}; {there}")


def _stands(folder: Objects, key: str) -> str:
    if is_key(key) and folder.inside(f"{COLUMNS}/{key}").sizes([RECIPE]):
        return key
    what = f"no column {key}" if is_key(key) else f"{key!r} is no full key, and it has no listing"
    raise CacheMissing(f"{folder.where('')}: {what}; give the 64 digits of a column that is there")
