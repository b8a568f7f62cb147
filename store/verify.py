"""
Doubting a cache: everything that can be checked without the model, and all that is wrong, not the first.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from fpo.errors import CacheDamaged, CacheError
from fpo.store.files import TMP, printable
from fpo.store.format.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_RECIPE_BYTES,
    MAX_RECORD_BYTES,
    RECIPE,
    RECORDS,
    REPAIR_SHARD,
    SHARDS,
    Manifest,
    RecipeFacts,
    ShardEntry,
    parse_manifest,
    parse_recipe,
    parse_record,
    recipe_facts,
    record_name,
    shard_name,
)
from fpo.store.local import Store
from fpo.store.objects import Objects, RemoteObjects
from fpo.store.remote.places import RemoteStore, open_store
from fpo.store.shards import fetch_shard, load_shard

Found = TypeVar("Found")
Level = Literal["sizes", "checksums", "all"]


@dataclass
class Report:
    """What `verify` found."""

    key: str
    shards: int = 0
    """Shards that passed every check."""
    pairs: int = 0
    """Pairs in them."""
    problems: list[str] = field(default_factory=list)
    """One line per problem, naming the file."""

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    store: Store | RemoteStore | Path | str,
    name: str,
    on_shard: Callable[[int, int], None] | None = None,
    level: Level = "all",
) -> Report:
    """
    Doubt a cache. Whatever the level: the key, manifest and records against themselves and each other, files that do
    not belong there. Of the shards, "sizes" looks at the size, "checksums" at every byte's part in the sha256,
    "all" also decodes them and checks every invariant. One shard is in memory at a time.

    on_shard(done, total) is called after each shard, for a progress bar.
    Raises CacheMissing where no key starts with `name`; all else is in the report.
    """
    store = open_store(store)
    key = store.resolve(name)
    use = store.use(key, counts=False) if isinstance(store, Store) else None
    try:
        return _verify(store.folder(key), key, on_shard, level)
    finally:
        if use is not None:
            use.end()


def _verify(folder: Objects, key: str, on_shard: Callable[[int, int], None] | None, level: Level) -> Report:
    report = Report(key)

    def attempt(step: Callable[[], Found]) -> Found | None:
        try:
            return step()
        except CacheError as error:
            report.problems.append(str(error))
            return None

    facts = attempt(partial(_facts, folder, key))
    if facts is None:
        return report
    total = len(facts.shard_groups)
    attempt(partial(_refuse_strangers, folder, total, report))
    manifest = attempt(partial(_manifest, folder, key, facts))
    ids = array("Q")
    for sid in range(total):
        record = attempt(partial(_record, folder, key, sid))
        entry = manifest.shards[sid] if manifest else record
        if manifest and record and record != entry:
            report.problems.append(f"{folder.where(record_name(sid))} does not say what {MANIFEST} says of its shard")
        if entry is None:
            continue
        if level == "all":
            pairs = attempt(partial(load_shard, folder, key, entry, facts.bounds))
            if pairs is not None:
                ids.frombytes(pairs.group_id.tobytes())
            passed = pairs is not None
        else:
            passed = attempt(partial(_bytes_pass, folder, entry, level)) is not None
        if passed:
            report.shards, report.pairs = report.shards + 1, report.pairs + entry.n_groups
        if on_shard is not None:
            on_shard(sid + 1, total)
    if holds_a_value_twice(ids):
        report.problems.append(f"{folder.where(SHARDS)}: a pair stands in two shards")
    return report


def holds_a_value_twice(ids: array[int]) -> bool:
    """Sorts them in place: the ids of a big cache are in memory once."""
    values = np.frombuffer(ids, np.uint64)
    values.sort()
    return bool((values[1:] == values[:-1]).any())


def _bytes_pass(folder: Objects, entry: ShardEntry, level: Level) -> bool:
    """True, or CacheDamaged or CacheMissing naming the file: size alone, or every byte."""
    name = shard_name(entry.shard)
    if level == "checksums":
        fetch_shard(folder, entry)
    elif (size := folder.size(name)) != entry.size:
        raise CacheDamaged(f"{folder.where(name)} has {size} bytes, the manifest says {entry.size}; {REPAIR_SHARD}")
    return True


def _facts(folder: Objects, key: str) -> RecipeFacts:
    return recipe_facts(parse_recipe(folder.read(RECIPE, MAX_RECIPE_BYTES), key, folder.where(RECIPE)))


def _manifest(folder: Objects, key: str, facts: RecipeFacts) -> Manifest:
    return parse_manifest(folder.read(MANIFEST, MAX_MANIFEST_BYTES), key, facts, folder.where(MANIFEST))


def _record(folder: Objects, key: str, sid: int) -> ShardEntry:
    name = record_name(sid)
    record = parse_record(folder.read(name, MAX_RECORD_BYTES), key, sid, folder.where(name))
    return ShardEntry(**record.model_dump(exclude={"key", "provenance"}))


def _refuse_strangers(folder: Objects, total: int, report: Report) -> None:
    if isinstance(folder, RemoteObjects) and not folder.listable:
        return
    known = {RECIPE, MANIFEST, SHARDS, RECORDS, TMP}
    known |= {name(sid) for sid in range(total) for name in (shard_name, record_name)}
    there = folder.names() + [f"{sub}/{name}" for sub in (SHARDS, RECORDS) for name in folder.names(sub)]
    strangers = [folder.where(printable(name)) for name in there if name not in known]
    report.problems += [f"{stranger} does not belong to this cache" for stranger in strangers]
