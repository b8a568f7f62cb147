"""
Reading one shard with every check, for whoever needs one: the cache, the writer that adopts it, verify.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from fpo.canonical import sha256_hex
from fpo.errors import CacheDamaged, CacheMissing
from fpo.store.format.encoding import MAX_FILE_BYTES, decode_shard
from fpo.store.format.invariants import Bounds, Invalid
from fpo.store.format.key import shard_digest
from fpo.store.format.manifest import REPAIR_SHARD, ShardEntry, shard_name
from fpo.store.format.pairs import Pairs
from fpo.store.objects import Objects, RemoteObjects

Parsed = TypeVar("Parsed")

FETCH_ATTEMPTS = 4
"""A shard whose bytes arrive damaged is fetched again before it counts as damaged."""
_FIRST_PAUSE = 0.1


def load_shard(folder: Objects, key: str, entry: ShardEntry, bounds: Bounds) -> Pairs:
    """
    The pairs of a committed shard. Size, checksum, encoding and invariants are checked.

    Raises CacheDamaged naming the file, both values and the next step.
    """
    where = folder.where(shard_name(entry.shard))
    try:
        data = folder.read(shard_name(entry.shard), MAX_FILE_BYTES)
    except CacheMissing as error:
        raise CacheDamaged(f"{error}; {REPAIR_SHARD}") from None
    found, actual = check_shard(folder, key, entry.shard, data, bounds, entry)
    if (actual.n_pairs, actual.n_tokens) != (entry.n_pairs, entry.n_tokens):
        raise CacheDamaged(
            f"{where} has {actual.n_pairs} pairs and {actual.n_tokens} tokens, "
            f"the manifest says {entry.n_pairs} and {entry.n_tokens}; {REPAIR_SHARD}"
        )
    if actual.pairs_digest != entry.pairs_digest:
        raise CacheDamaged(
            f"{where} holds other pairs than the key stands for: they have the digest {actual.pairs_digest[:12]}..., "
            f"the manifest says {entry.pairs_digest[:12]}...; {REPAIR_SHARD}"
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
) -> tuple[Pairs, ShardEntry]:
    """
    Bytes of shard `sid` -> its pairs and what a record says about it; held against `entry` where known.

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
        pairs = decode_shard(data, key, sid, bounds)
    except Invalid as error:
        raise CacheDamaged(f"{where} is damaged: {error}; {REPAIR_SHARD}") from None
    return pairs, entry_of(sid, data, pairs)


def entry_of(sid: int, data: bytes, pairs: Pairs) -> ShardEntry:
    """What manifest and record say about shard `sid` of these bytes, which hold these pairs."""
    return ShardEntry(
        shard=sid,
        size=len(data),
        sha256=sha256_hex(data),
        n_pairs=len(pairs),
        n_tokens=pairs.n_tokens,
        pairs_digest=shard_digest(pairs.pair_id, pairs.pair_digest),
    )
