"""
Pairs that need not be computed: another complete cache of the same scorer holds them already.

A pair is found by the digest of its tokens, so it does not matter from which dataset, in which order or at which
place it was scored. Both caches are shuffled, so each shard to be written may need rows of every shard that
exists: several are gathered in one pass over the sources, as many as fit into memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from errors import CacheError, CacheMissing
from store.cache import Cache, open_cache
from store.files import replace_file
from store.local import Store
from store.manifest import MANIFEST, MAX_JSON_BYTES, RECIPE, parse_recipe
from store.pairs import I64, U8, U64, Pairs, starts_of
from store.weights import memo_folder

GATHER_BYTES = 2**30
"""About how much of the gathered rows is in memory at a time, uncompressed."""


@dataclass(frozen=True)
class Reused:
    """The rows of one shard that were copied."""

    positions: I64
    """(R,) where they belong in the shard, ascending."""
    pairs: Pairs | None
    """The rows, in that order, with the ids of their old cache; None where there are none."""
    sources: dict[str, int]
    """How many came from which cache (key)."""

    def missing(self, n: int) -> I64:
        """Positions of a shard of n pairs that have to be computed."""
        return np.setdiff1d(np.arange(n), self.positions).astype(np.int64)

    def merge(self, pair_id: U64, computed: Pairs | None) -> Pairs:
        """
        The whole shard: copied rows and computed ones at their places, under these ids.

        computed: the pairs at `missing(len(pair_id))`, in that order; None where nothing is missing.
        """
        parts = [part for part in (self.pairs, computed) if part is not None]
        places = np.concatenate([self.positions, self.missing(len(pair_id))])
        return dataclasses.replace(Pairs.concat(parts).take(np.argsort(places)), pair_id=pair_id)


class ReusableRows:
    """The pairs of every complete cache of one scorer in a store."""

    def __init__(self, store: Store | Path | str, scorer: dict[str, Any], memory: int = GATHER_BYTES) -> None:
        """
        scorer: the part of the recipe that says how pairs are scored.
        Caches that cannot be read are left out, and named in `problems`.
        """
        self.store = store if isinstance(store, Store) else Store(store)
        self.memory = memory
        self.problems: list[str] = []
        """What kept rows from being reused, one line each. They are computed instead: nothing damaged is copied."""
        found = (self._source(key, scorer) for key in sorted(self.store.keys()))
        self.sources = [cache for cache in found if cache is not None]
        self._damaged: set[tuple[int, int]] = set()

    def held(self, digests: U8) -> int:
        """How many of these pairs, (P, 16), stand in some source."""
        return int((self._find(digests)[0] >= 0).sum())

    def gather(self, wanted: Sequence[U8]) -> list[Reused]:
        """
        The rows of the first of these shards, each given as its pair digests (P, 16) in order: of as many shards
        as fit into memory, at least one. Every shard read is verified, every row's digest compared.
        """
        if not wanted:
            return []
        found = [self._find(digests) for digests in wanted]
        found = found[: self._how_many([int((source >= 0).sum()) for source, _ in found])]
        rows: list[list[tuple[I64, Pairs, str]]] = [[] for _ in found]
        for number, source in enumerate(self.sources):
            starts = starts_of(np.array(source.shard_pairs, dtype=np.int64))
            needed = np.concatenate([row[at == number] for at, row in found])
            for sid in np.unique(np.searchsorted(starts, needed, side="right") - 1).tolist():
                pairs = self._shard(number, sid)
                if pairs is None:
                    continue
                for target, (at, row) in enumerate(found):
                    places = np.flatnonzero((at == number) & (row >= starts[sid]) & (row < starts[sid + 1]))
                    picked = row[places] - starts[sid]
                    same = (pairs.pair_digest[picked] == wanted[target][places]).all(axis=1)
                    if same.any():
                        rows[target].append((places[same], pairs.take(picked[same]), source.key))
        return [_joined(parts) for parts in rows]

    @cached_property
    def _index(self) -> tuple[U64, U8, I64, I64]:
        """First eight bytes of every digest, ascending; the digests, source and row there in the same order."""
        digests = [_digests(source, self.problems) for source in self.sources]
        every = np.concatenate([np.empty((0, 16), np.uint8), *digests])
        source = np.repeat(np.arange(len(digests)), [len(part) for part in digests])
        row = np.concatenate([np.empty(0, np.int64), *(np.arange(len(part)) for part in digests)])
        heads = _heads(every)
        order = np.argsort(heads, kind="stable")
        return heads[order], every[order], source[order], row[order]

    def _find(self, digests: U8) -> tuple[I64, I64]:
        """(P, 16) -> source and row in it of each pair, -1 where no source has it."""
        heads, known, source, row = self._index
        nowhere = np.full(len(digests), -1, dtype=np.int64)
        if not len(heads):
            return nowhere, nowhere
        at = np.minimum(np.searchsorted(heads, _heads(digests)), len(heads) - 1)
        # Two pairs that share the first eight bytes only are not the same: the second one is computed.
        same = (known[at] == digests).all(axis=1)
        return np.where(same, source[at], nowhere), np.where(same, row[at], nowhere)

    def _how_many(self, counts: list[int]) -> int:
        """Shards whose reusable rows, this many each, fit into memory; all of them where there are few."""
        per_pair = max((_bytes_per_pair(source) for source in self.sources), default=0.0)
        return max(1, int(np.searchsorted(np.cumsum(counts) * per_pair, self.memory, side="right")))

    def _source(self, key: str, scorer: dict[str, Any]) -> Cache | None:
        folder = self.store.folder(key)
        try:
            if MANIFEST not in folder.names():
                return None
            recipe = parse_recipe(folder.read(RECIPE, MAX_JSON_BYTES), key, folder.where(RECIPE))
            return open_cache(self.store, key) if recipe["scorer"] == scorer else None
        except CacheMissing:  # removed since it was listed
            return None
        except CacheError as error:
            self.problems.append(str(error))
            return None

    def _shard(self, number: int, sid: int) -> Pairs | None:
        if (number, sid) in self._damaged:
            return None
        try:
            return self.sources[number].shard(sid)
        except CacheError as error:
            self._damaged.add((number, sid))
            self.problems.append(str(error))
            return None


def _digests(cache: Cache, problems: list[str]) -> U8:
    """(P, 16) pair digests in the order of the shards, remembered by the cache's output address."""
    path = memo_folder() / f"rows-{cache.digest}.npy"
    try:
        known = np.load(path, allow_pickle=False)
        if known.dtype == np.uint8 and known.shape == (cache.n_pairs, 16):
            return np.asarray(known, dtype=np.uint8)
    except (OSError, ValueError, EOFError):
        pass
    found = np.zeros((cache.n_pairs, 16), dtype=np.uint8)
    start, whole = 0, True
    for sid, n in enumerate(cache.shard_pairs):
        try:
            found[start : start + n] = cache.shard(sid).pair_digest
        except CacheError as error:  # its rows stay zero, which no pair's digest is
            problems.append(str(error))
            whole = False
        start += n
    if whole:
        buffer = io.BytesIO()
        np.save(buffer, found, allow_pickle=False)
        # A read-only home is no reason to fail: the next call reads the shards again.
        with contextlib.suppress(OSError):
            replace_file(path, buffer.getvalue())
    return found


def _bytes_per_pair(cache: Cache) -> float:
    """Uncompressed, of its first shard: about what a row takes."""
    try:
        pairs = cache.shard(0)
    except (CacheError, IndexError):
        return 0.0
    arrays = [pairs.input_ids, pairs.token_logps, *(a for f in pairs.features for a in (f.indices, f.acts))]
    if pairs.top_logits is not None:
        arrays += [pairs.top_logits.indices, pairs.top_logits.logps]
    return sum(array.nbytes for array in arrays) / max(len(pairs), 1)


def _heads(digests: U8) -> U64:
    return np.ascontiguousarray(digests[:, :8]).view("<u8").reshape(-1).astype(np.uint64)


def _joined(parts: list[tuple[I64, Pairs, str]]) -> Reused:
    if not parts:
        return Reused(np.empty(0, np.int64), None, {})
    places = np.concatenate([places for places, _, _ in parts])
    order = np.argsort(places)
    sources: dict[str, int] = {}
    for _, pairs, key in parts:
        sources[key] = sources.get(key, 0) + len(pairs)
    return Reused(places[order], Pairs.concat([pairs for _, pairs, _ in parts]).take(order), sources)
