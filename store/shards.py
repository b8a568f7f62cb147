"""
Reading one shard with every check, for whoever needs one: the cache, the writer that adopts it, verify.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from fpo.canonical import sha256_hex
from fpo.errors import CacheDamaged, CacheMissing
from fpo.store.format.encoding import MAX_FILE_BYTES, Rows, counts_of, decode_shard
from fpo.store.format.groups import Groups
from fpo.store.format.invariants import Bounds, Invalid
from fpo.store.format.key import shard_digest
from fpo.store.format.manifest import REPAIR_SHARD, ShardEntry, shard_name
from fpo.store.objects import Objects, RemoteObjects

Parsed = TypeVar("Parsed")

FETCH_ATTEMPTS = 4
"""A shard whose bytes arrive damaged is fetched again before it counts as damaged."""
_FIRST_PAUSE = 0.1


def load_shard(folder: Objects, key: str, entry: ShardEntry, bounds: Bounds) -> Rows:
    """
    The rows of a committed shard of a cache or column. Size, checksum, encoding and invariants are checked.

    Raises CacheDamaged naming the file, both values and the next step.
    """
    where = folder.where(shard_name(entry.shard))
    try:
        data = folder.read(shard_name(entry.shard), MAX_FILE_BYTES)
    except CacheMissing as error:
        raise CacheDamaged(f"{error}; {REPAIR_SHARD}") from None
    found, actual = check_shard(folder, key, entry.shard, data, bounds, entry)
    if actual.counts != entry.counts:
        raise CacheDamaged(
            "{} has {} groups, {} completions and {} tokens, the manifest says {}, {} and {}; {}".format(
                where, *actual.counts, *entry.counts, REPAIR_SHARD
            )
        )
    if actual.rows_digest != entry.rows_digest:
        raise CacheDamaged(
            f"{where} holds other groups than the key stands for: they have the digest {actual.rows_digest[:12]}..., "
            f"the manifest says {entry.rows_digest[:12]}...; {REPAIR_SHARD}"
        )
    return found


def fetch_parsed(place: Objects, name: str, limit: int, parse: Callable[[bytes], Parsed]) -> tuple[bytes, Parsed]:
    """A small file of at most `limit` bytes and what it says; where it arrives damaged it is fetched again."""
    for _ in _attempts(place):
        data = place.read(name, limit)
        try:
            return data, parse(data)
        except CacheDamaged as error:
            found = error
    raise found


def _attempts(place: Objects) -> Iterator[int]:
    """With a growing pause between them; on this machine a second look sees the same."""
    for attempt in range(FETCH_ATTEMPTS if isinstance(place, RemoteObjects) else 1):
        if attempt:
            time.sleep(_FIRST_PAUSE * 4 ** (attempt - 1))
        yield attempt


def fetch_shard(place: Objects, entry: ShardEntry) -> bytes:
    """
    The bytes of a shard, as its manifest entry describes them: size and sha256 are checked, nothing else.

    Raises CacheDamaged, naming the object and both values, where they arrive wrong every time.
    """
    name = shard_name(entry.shard)
    for _ in _attempts(place):
        try:
            data = place.read(name, min(entry.size, MAX_FILE_BYTES))
        except CacheMissing as error:
            raise CacheDamaged(f"{error}; {REPAIR_SHARD}") from None
        except CacheDamaged as error:
            found = str(error)
            continue
        digest = sha256_hex(data)
        if len(data) == entry.size and digest == entry.sha256:
            return data
        found = f"{place.where(name)} has {len(data)} bytes with the sha256 {digest[:12]}..."
    raise CacheDamaged(f"{found}; the manifest says {entry.size} bytes, {entry.sha256[:12]}...; {REPAIR_SHARD}")


def check_shard(
    folder: Objects, key: str, sid: int, data: bytes, bounds: Bounds, entry: ShardEntry | None = None
) -> tuple[Rows, ShardEntry]:
    """
    Bytes of shard `sid` -> its rows and what a record says about it; held against `entry` where known.

    Raises CacheDamaged naming the file.
    """
    where = folder.where(shard_name(sid))
    if entry is not None and len(data) != entry.size:
        raise CacheDamaged(f"{where} has {len(data)} bytes, the manifest says {entry.size}; {REPAIR_SHARD}")
    digest = sha256_hex(data)
    if entry is not None and digest != entry.sha256:
        raise CacheDamaged(
            f"{where} has the sha256 {digest[:12]}..., the manifest says {entry.sha256[:12]}...; {REPAIR_SHARD}"
        )
    try:
        rows = decode_shard(data, key, sid, bounds)
    except Invalid as error:
        raise CacheDamaged(f"{where} is damaged: {error}; {REPAIR_SHARD}") from None
    return rows, entry_of(sid, data, rows)


def entry_of(sid: int, data: bytes, rows: Rows) -> ShardEntry:
    """What manifest and record say about shard `sid` of these bytes, which hold these rows."""
    n_groups, n_completions, n_tokens = counts_of(rows)
    return ShardEntry(
        shard=sid,
        size=len(data),
        sha256=sha256_hex(data),
        n_groups=n_groups,
        n_completions=n_completions,
        n_tokens=n_tokens,
        rows_digest=rows_digest(rows),
    )


def rows_digest(rows: Rows) -> str:
    """Whose rows these are, as `ShardEntry.rows_digest` has it."""
    if isinstance(rows, Groups):
        return shard_digest(rows.group_id, rows.n_completions, rows.completion_digest, rows.score, rows.weight)
    return sha256_hex(rows.group_id.astype("<u8").tobytes())
