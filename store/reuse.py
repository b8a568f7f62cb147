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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fpo.canonical import sha256_hex
from fpo.errors import CacheError, CacheMissing
from fpo.memo import keep, memo_folder
from fpo.store.cache import Cache
from fpo.store.format.manifest import MANIFEST, MAX_RECIPE_BYTES, RECIPE, parse_recipe
from fpo.store.format.pairs import I64, U8, U64, Pairs, starts_of
from fpo.store.local import Store
from fpo.store.origin import Origin

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


@dataclass(frozen=True)
class Source:
    """A complete cache of the scorer: what is kept of it while it is not being read."""

    key: str
    digest: str
    """Its output address."""
    shard_pairs: tuple[int, ...]
    computed_here: tuple[bool, ...]
    """Per shard, see `origin`: only these are copied from."""
    facts: dict[str, Any]
    """Of its manifest."""

    @property
    def starts(self) -> I64:
        """(S+1,) row at which each shard starts."""
        return starts_of(np.array(self.shard_pairs, dtype=np.int64))


class ReusableRows:
    """
    The pairs that were computed in a store for one scorer. What was fetched from elsewhere is left out: its numbers
    are for those who chose them by name. Sources are opened one at a time, and looking is not using them.
    """

    def __init__(
        self,
        store: Store | Path | str,
        scorer: dict[str, Any],
        memory: int = GATHER_BYTES,
        keys: Sequence[str] | None = None,
    ) -> None:
        """
        scorer: the part of the recipe that says how pairs are scored.
        keys: the caches to look into; None for all.
        Caches that cannot be read are left out, and named in `problems`.
        """
        self.store = store if isinstance(store, Store) else Store(store)
        self.memory = memory
        self.problems: list[str] = []
        """What kept rows from being reused, one line each. They are computed instead: nothing damaged is copied."""
        self.foreign: list[str] = []
        """Keys of caches of this scorer of which at least a shard was not computed here."""
        self._origin = Origin(self.store)
        found = (self._source(key, scorer) for key in sorted(self.store.keys()) if keys is None or key in keys)
        self.sources = [source for source in found if source is not None]
        self._damaged: set[tuple[int, int]] = set()
        self._row_bytes: dict[int, float] = {}

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
        found = found[: self._how_many([source[source >= 0] for source, _ in found])]
        rows: list[list[tuple[I64, Pairs, str]]] = [[] for _ in found]
        for number, source in enumerate(self.sources):
            needed = np.concatenate([row[at == number] for at, row in found])
            if not len(needed):
                continue
            starts = source.starts
            with self._opened(number) as cache:
                for sid in np.unique(np.searchsorted(starts, needed, side="right") - 1).tolist():
                    pairs = self._shard(cache, number, sid)
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
        rows = [_own_rows(source) for source in self.sources]
        digests = [self._digests(number) for number in range(len(self.sources))]
        every = np.concatenate([np.empty((0, 16), np.uint8), *digests])
        source = np.repeat(np.arange(len(digests)), [len(part) for part in digests])
        row = np.concatenate([np.empty(0, np.int64), *rows])
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

    def _how_many(self, found: list[I64]) -> int:
        """Shards whose reusable rows, from these sources, fit into memory; all of them where there are few."""
        used = np.unique(np.concatenate(found)).tolist()
        per_pair = max((self._bytes_per_pair(number) for number in used), default=0.0)
        counts = np.cumsum([len(source) for source in found])
        return max(1, int(np.searchsorted(counts * per_pair, self.memory, side="right")))

    def _source(self, key: str, scorer: dict[str, Any]) -> Source | None:
        folder = self.store.folder(key)
        try:
            if MANIFEST not in folder.names():
                return None
            recipe = parse_recipe(folder.read(RECIPE, MAX_RECIPE_BYTES), key, folder.where(RECIPE))
            if recipe["scorer"] != scorer:
                return None
            cache = Cache(folder, key)
            ours = tuple(self._origin.computed_here(folder, key, cache.manifest.shards))
        except CacheMissing:  # removed since it was listed
            return None
        except CacheError as error:
            self.problems.append(str(error))
            return None
        if not all(ours):
            self.foreign.append(key)
        return Source(key, cache.digest, tuple(cache.shard_pairs), ours, cache.manifest.facts) if any(ours) else None

    @contextlib.contextmanager
    def _opened(self, number: int) -> Iterator[Cache | None]:
        """A source, which nobody removes meanwhile; None where it is not what it was."""
        source = self.sources[number]
        use = self.store.use(source.key, counts=False)
        try:
            cache = Cache(self.store.folder(source.key), source.key)
        except CacheError as error:
            self.problems.append(str(error))
            cache = None
        try:
            yield cache if cache is not None and cache.digest == source.digest else None
        finally:
            use.end()

    def _shard(self, cache: Cache | None, number: int, sid: int) -> Pairs | None:
        if cache is None or (number, sid) in self._damaged:
            return None
        try:
            return cache.shard(sid)
        except CacheError as error:
            self._damaged.add((number, sid))
            self.problems.append(str(error))
            return None

    def _digests(self, number: int) -> U8:
        """(R, 16) pair digests of the rows that were computed here, in their order; remembered."""
        source = self.sources[number]
        path = memo_folder() / f"rows-{sha256_hex(source.digest.encode() + bytes(source.computed_here))}.npy"
        n_rows = len(_own_rows(source))
        try:
            known = np.load(path, allow_pickle=False)
            if known.dtype == np.uint8 and known.shape == (n_rows, 16):
                return np.asarray(known, dtype=np.uint8)
        except (OSError, ValueError, EOFError):
            pass
        found = np.zeros((n_rows, 16), dtype=np.uint8)
        start, whole = 0, True
        with self._opened(number) as cache:
            for sid, ours in enumerate(source.computed_here):
                if not ours:
                    continue
                pairs = self._shard(cache, number, sid)
                if pairs is not None:
                    found[start : start + len(pairs)] = pairs.pair_digest
                whole = whole and pairs is not None  # else its rows stay zero, which no pair's digest is
                start += source.shard_pairs[sid]
        if whole:
            buffer = io.BytesIO()
            np.save(buffer, found, allow_pickle=False)
            # A read-only home is no reason to fail: the next call reads the shards again.
            with contextlib.suppress(OSError):
                keep(path, buffer.getvalue())
        return found

    def _bytes_per_pair(self, number: int) -> float:
        """Uncompressed, of its first shard that was computed here: about what a row takes."""
        if number not in self._row_bytes:
            with self._opened(number) as cache:
                pairs = self._shard(cache, number, self.sources[number].computed_here.index(True))
            self._row_bytes[number] = 0.0 if pairs is None else _row_bytes(pairs)
        return self._row_bytes[number]


def _own_rows(source: Source) -> I64:
    """Rows of the shards that were computed here. Their records were written here, so their counts are true."""
    starts = source.starts
    own = [np.arange(starts[sid], starts[sid + 1]) for sid, ours in enumerate(source.computed_here) if ours]
    return np.concatenate([np.empty(0, np.int64), *own])


def _row_bytes(pairs: Pairs) -> float:
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
