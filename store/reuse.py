"""
Rows that need not be computed: another complete cache of the same scorer holds them already, in its base (log-probs)
or in a column that covers the one asked for.

A completion is found by the digest of its tokens, prompt included, so it does not matter from which dataset, in which
group or under which label it was scored. Caches are shuffled, so each shard to be written may need rows of every shard
that exists: several are gathered in one pass over the sources, as many as fit into memory.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fpo.canonical import sha256_hex
from fpo.errors import CacheError, CacheMissing
from fpo.memo import keep, memo_folder
from fpo.store.beside import HeldColumn, OpenColumn, serving
from fpo.store.cache import Cache
from fpo.store.format.columns import KINDS, Column, HiddenGram, Mismatched, Per, Spec
from fpo.store.format.groups import Groups
from fpo.store.format.manifest import COLUMNS, MANIFEST, MAX_RECIPE_BYTES, RECIPE, parse_recipe
from fpo.store.format.ragged import F32, I64, U8, U32, U64, starts_of
from fpo.store.local import Store
from fpo.store.origin import Origin

GATHER_BYTES = 2**30
"""About how much of the gathered rows is in memory at a time, uncompressed."""

Want = Spec | None
"""A column's spec; None stands for the base's log-probs."""


@dataclass(frozen=True, eq=False)
class TokenLogps(Column):
    """The base's log-probs as rows: one per completion, an entry per scored token."""

    PER = "completion"
    ENTRIES = ("logps",)

    logps: F32
    """(C,) nats."""


def rows_per(want: Want) -> Per:
    """What a row of this column belongs to."""
    return "completion" if want is None else KINDS[want["kind"]].PER


def is_mismatched(want: Want) -> bool:
    """Whether this is the column whose rows no other cache's completions are: each is of two groups."""
    return want is not None and KINDS[want["kind"]] is Mismatched


@dataclass(frozen=True)
class Copied:
    """The rows of one column of one shard that were copied."""

    positions: I64
    """(R,) where they belong among the shard's rows, ascending."""
    rows: Column | None
    """In that order; None where there are none."""
    sources: dict[str, int]
    """How many came from which cache (key)."""

    def missing(self, n: int) -> I64:
        """Positions of the rows, of n, that have to be computed."""
        return np.setdiff1d(np.arange(n), self.positions).astype(np.int64)

    def merge(self, n: int, computed: Column | None) -> Column:
        """
        All n rows: copied and computed ones at their places.

        computed: the rows at `missing(n)`, in that order; None where nothing is missing.
        """
        parts = [part for part in (self.rows, computed) if part is not None]
        places = np.concatenate([self.positions, self.missing(n)])
        return type(parts[0]).concat(parts).take(np.argsort(places))


NOTHING = Copied(np.empty(0, np.int64), None, {})


@dataclass(frozen=True)
class Wanting:
    """A shard that is to be written: whose rows it needs."""

    digests: U8
    """(K, 16) of its completions."""
    n_completions: U32
    """(G,)"""


@dataclass(frozen=True)
class Source:
    """A complete cache of the scorer: what is kept of it while it is not being read."""

    key: str
    digest: str
    """Its output address."""
    shard_completions: tuple[int, ...]
    computed_here: tuple[bool, ...]
    """Per shard, see `origin`: only these are copied from."""
    usable: tuple[tuple[bool, ...], ...]
    """Per want, the shards whose rows of it were all computed here."""
    facts: tuple[dict[str, Any], ...]
    """Per want, of the manifest that seals it; {} where there is none."""

    @property
    def starts(self) -> I64:
        """(S+1,) completion at which each shard starts."""
        return starts_of(np.array(self.shard_completions, dtype=np.int64))


class Reusable:
    """
    The rows that were computed in a store for one scorer. What was fetched from elsewhere is left out: its numbers
    are for those who chose them by name. Sources are opened one at a time, and looking is not using them.
    """

    def __init__(
        self,
        store: Store | Path | str,
        scorer: dict[str, Any],
        wants: Sequence[Want],
        *,
        apart_from: str | None = None,
        memory: int = GATHER_BYTES,
        keys: Sequence[str] | None = None,
    ) -> None:
        """
        scorer: the part of a cache's recipe that says how its groups are scored.
        wants: what is to be copied, columns and the base's log-probs.
        apart_from: the cache that is being filled.
        keys: the caches to look into; None for all.
        Caches that cannot be read are left out, and named in `problems`.
        """
        self.store = store if isinstance(store, Store) else Store(store)
        self.wants = tuple(wants)
        self.memory = memory
        self.problems: list[str] = []
        """What kept rows from being reused, one line each. They are computed instead: nothing damaged is copied."""
        self.foreign: list[str] = []
        """Keys of caches of this scorer of which at least a shard was not computed here."""
        self._origin = Origin(self.store)
        self._scorer = scorer
        known = [key for key in sorted(self.store.keys()) if (keys is None or key in keys) and key != apart_from]
        self.sources = [source for source in map(self._source, known) if source is not None]
        self._damaged: set[tuple[int, int]] = set()
        self._row_bytes: dict[int, float] = {}
        self._digests_of = [self._digests(number) for number in range(len(self.sources))]
        self._indexes = [self._index(want) for want in range(len(self.wants))]

    def held(self, want: int, shard: Wanting) -> int:
        """How many of the shard's rows of `wants[want]` stand in some source."""
        return int((self._find(want, shard).source >= 0).sum())

    def gather(self, wanted: Sequence[Wanting]) -> list[list[Copied]]:
        """
        For the first of these shards - of as many as fit into memory, at least one - what can be copied of each want.
        Every shard read is verified, every row's digest compared.
        """
        if not wanted:
            return []
        found = [[self._find(want, shard) for want in range(len(self.wants))] for shard in wanted]
        found = found[: self._how_many(found)]
        rows: list[list[list[tuple[I64, Column, str]]]] = [[[] for _ in self.wants] for _ in found]
        for number, source in enumerate(self.sources):
            asked = self._asked(number, found)
            if not asked:
                continue
            with self._opened(number) as cache:
                for sid, wants in asked:
                    groups = self._shard(cache, number, sid, wants)
                    if groups is None:
                        continue
                    for target, finds in enumerate(found):
                        for want, column in zip(wants, _columns(groups, [self.wants[w] for w in wants]), strict=True):
                            picked = finds[want].picked(number, source.starts[sid : sid + 2], groups, column)
                            if picked is not None:
                                rows[target][want].append((*picked, source.key))
        return [[_joined(parts) for parts in target] for target in rows]

    def _find(self, want: int, shard: Wanting) -> _Found:
        """Where each row of a want of a shard stands."""
        heads, known, source, row = self._indexes[want]
        nowhere = np.full(len(shard.digests), -1, dtype=np.int64)
        if len(heads):
            at = np.minimum(np.searchsorted(heads, _heads(shard.digests)), len(heads) - 1)
            # Two completions that share the first eight bytes only are not the same: the second one is computed.
            same = (known[at] == shard.digests).all(axis=1)
            found = _Found(np.where(same, source[at], nowhere), np.where(same, row[at], nowhere), shard.digests)
        else:
            found = _Found(nowhere, nowhere, shard.digests)
        return found if rows_per(self.wants[want]) == "completion" else found.by_group(shard, self.wants[want])

    def _asked(self, number: int, found: Sequence[Sequence[_Found]]) -> list[tuple[int, list[int]]]:
        """The shards of a source that are needed, and for which wants."""
        starts = self.sources[number].starts
        needed: dict[int, set[int]] = {}
        for finds in found:
            for want, one in enumerate(finds):
                rows = one.row[one.source == number]
                for sid in np.unique(np.searchsorted(starts, rows, side="right") - 1).tolist():
                    needed.setdefault(sid, set()).add(want)
        return [(sid, sorted(needed[sid])) for sid in sorted(needed)]

    def _index(self, want: int) -> tuple[U64, U8, I64, I64]:
        """First eight bytes of every digest, ascending; the digests, source and row there in the same order."""
        digests, sources, rows = [np.empty((0, 16), np.uint8)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for number, source in enumerate(self.sources):
            own = _rows_of(source, source.computed_here)
            usable = np.isin(own, _rows_of(source, source.usable[want]))
            digests.append(self._digests_of[number][usable])
            rows.append(own[usable])
            sources.append(np.full(int(usable.sum()), number, dtype=np.int64))
        every = np.concatenate(digests)
        heads = _heads(every)
        order = np.argsort(heads, kind="stable")
        return heads[order], every[order], np.concatenate(sources)[order], np.concatenate(rows)[order]

    def _how_many(self, found: Sequence[Sequence[_Found]]) -> int:
        """Shards whose reusable rows fit into memory; all of them where there are few."""
        used = {int(number) for finds in found for one in finds for number in np.unique(one.source) if number >= 0}
        per_row = max((self._bytes_per_row(number) for number in used), default=0.0)
        counts = np.cumsum([max(int((one.source >= 0).sum()) for one in finds) for finds in found])
        return max(1, int(np.searchsorted(counts * per_row, self.memory, side="right")))

    def _source(self, key: str) -> Source | None:
        folder = self.store.folder(key)
        try:
            if MANIFEST not in folder.names():
                return None
            recipe = parse_recipe(folder.read(RECIPE, MAX_RECIPE_BYTES), key, folder.where(RECIPE))
            if recipe["scorer"] != self._scorer:
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
        if not any(ours):
            return None
        held = cache.held_columns()
        wants = [self._column(cache, held, spec, ours) for spec in self.wants]
        return Source(
            key,
            cache.digest,
            tuple(entry.n_completions for entry in cache.manifest.shards),
            ours,
            *zip(*wants, strict=True),
        )

    def _column(
        self, cache: Cache, held: Sequence[HeldColumn], spec: Want, ours: tuple[bool, ...]
    ) -> tuple[tuple[bool, ...], dict[str, Any]]:
        """The shards whose rows of a want were computed here, and the facts of the manifest that seals them."""
        if spec is None:
            return ours, cache.manifest.facts
        # A mismatched completion is another group's, whom no digest of a row names.
        column = None if is_mismatched(spec) else serving(held, spec)
        nothing = (tuple(False for _ in ours), dict[str, Any]())
        if column is None:
            return nothing
        folder = self.store.folder(cache.key).inside(f"{COLUMNS}/{column.key}")
        try:
            beside = OpenColumn(folder, column, spec, cache.shard_groups)
            here = self._origin.computed_here(folder, column.key, beside.sealed.manifest.shards)
        except CacheError as error:
            self.problems.append(str(error))
            return nothing
        usable = tuple(own and all(here[at] for at in sids) for own, sids in zip(ours, beside.within, strict=True))
        return usable, beside.sealed.manifest.facts

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

    def _shard(self, cache: Cache | None, number: int, sid: int, wants: Sequence[int]) -> Groups | None:
        """With the columns of these wants beside it."""
        if cache is None or (number, sid) in self._damaged:
            return None
        try:
            specs = [spec for spec in (self.wants[want] for want in wants) if spec is not None]
            if [column.wanted for column in cache.columns] != specs:
                cache.read_columns(specs)
            return cache.shard(sid)
        except CacheError as error:
            self._damaged.add((number, sid))
            self.problems.append(str(error))
            return None

    def _digests(self, number: int) -> U8:
        """(R, 16) digests of the completions that were computed here, in their order; remembered."""
        source = self.sources[number]
        path = memo_folder() / f"rows-{sha256_hex(source.digest.encode() + bytes(source.computed_here))}.npy"
        n_rows = len(_rows_of(source, source.computed_here))
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
                groups = self._shard(cache, number, sid, [])
                if groups is not None:
                    found[start : start + len(groups.completion_digest)] = groups.completion_digest
                whole = whole and groups is not None  # else its rows stay zero, which no completion's digest is
                start += source.shard_completions[sid]
        if whole:
            buffer = io.BytesIO()
            np.save(buffer, found, allow_pickle=False)
            # A read-only home is no reason to fail: the next call reads the shards again.
            with contextlib.suppress(OSError):
                keep(path, buffer.getvalue())
        return found

    def _bytes_per_row(self, number: int) -> float:
        """Uncompressed, of its first shard that was computed here with all its columns: about what a row takes."""
        if number not in self._row_bytes:
            source = self.sources[number]
            wants = [want for want, usable in enumerate(source.usable) if any(usable)]
            first = source.computed_here.index(True)
            with self._opened(number) as cache:
                groups = self._shard(cache, number, first, [want for want in wants if source.usable[want][first]])
            self._row_bytes[number] = 0.0 if groups is None else _row_bytes(groups)
        return self._row_bytes[number]


@dataclass(frozen=True)
class _Found:
    """Where the R rows of a want of one shard stand."""

    source: I64
    """(R,) which one, -1 where none has it."""
    row: I64
    """(R,) the completion there; of a group, one of its completions."""
    digests: U8
    """(R, 16) of that completion."""
    members: tuple[I64, ...] | None = None
    """Where a row needs all completions of its group: their places there."""

    def by_group(self, shard: Wanting, spec: Want) -> _Found:
        """Of completions -> of the groups that they are in."""
        starts = starts_of(shard.n_completions)
        together = spec is not None and issubclass(KINDS[spec["kind"]], HiddenGram)
        there = np.where(self.source >= 0, np.arange(len(self.source)), len(self.source))
        lead = np.minimum.reduceat(there, starts[:-1]) if len(starts) > 1 else np.empty(0, np.int64)
        held = lead < len(self.source)
        if together and len(lead):
            low, high = np.minimum.reduceat(self.source, starts[:-1]), np.maximum.reduceat(self.source, starts[:-1])
            held &= (low == high) & (low >= 0)
        safe = np.where(held, lead, 0)
        return _Found(
            np.where(held, self.source[safe], -1) if len(lead) else lead,
            np.where(held, self.row[safe], -1) if len(lead) else lead,
            self.digests[safe],
            tuple(np.split(self.row, starts[1:-1])) if together else None,
        )

    def picked(self, number: int, bounds: I64, groups: Groups, column: Column) -> tuple[I64, Column] | None:
        """
        The rows that a source's shard gives, and their places among the R; None where it gives none.

        bounds: the shard's completions in its source; groups, column: what it holds.
        """
        places = np.flatnonzero((self.source == number) & (self.row >= bounds[0]) & (self.row < bounds[1]))
        local = self.row[places] - bounds[0]
        same = (groups.completion_digest[local] == self.digests[places]).all(axis=1)
        places, local = places[same], local[same]
        if column.PER == "completion":
            return (places, column.take(local)) if len(places) else None
        theirs = np.searchsorted(groups.completion_starts, local, side="right") - 1
        if self.members is None or not isinstance(column, HiddenGram):
            return (places, column.take(theirs)) if len(places) else None
        grams = [
            _gram(column, groups, int(group), self.members[place] - bounds[0])
            for place, group in zip(places, theirs, strict=True)
        ]
        kept = [(place, gram) for place, gram in zip(places, grams, strict=True) if gram is not None]
        if not kept:
            return None
        return np.array([place for place, _ in kept], np.int64), HiddenGram.concat([gram for _, gram in kept])


def _gram(column: HiddenGram, groups: Groups, group: int, members: I64) -> HiddenGram | None:
    """The products of these completions, all of which must be in this group."""
    start, end = groups.completion_starts[group : group + 2]
    if members.min() < start or members.max() >= end:
        return None
    at = members - start
    products = column.take([group]).products.reshape(end - start, end - start)[np.ix_(at, at)]
    return HiddenGram(np.array([0, products.size], np.uint64), np.ascontiguousarray(products).reshape(-1))


def _columns(groups: Groups, wants: Sequence[Want]) -> list[Column]:
    """What a shard holds for each of these wants; its columns are those that are none of the base."""
    beside = iter(groups.columns)
    return [token_rows(groups) if spec is None else next(beside) for spec in wants]


def token_rows(groups: Groups) -> TokenLogps:
    """The base's log-probs as rows."""
    return TokenLogps(groups.scored_splits.astype(np.uint64), groups.token_logps)


def _rows_of(source: Source, shards: Sequence[bool]) -> I64:
    """Completions of these shards. Records of computed shards were written here, so their counts are true."""
    starts = source.starts
    own = [np.arange(starts[sid], starts[sid + 1]) for sid, ours in enumerate(shards) if ours]
    return np.concatenate([np.empty(0, np.int64), *own])


def _row_bytes(groups: Groups) -> float:
    n_bytes = groups.input_ids.nbytes + groups.token_logps.nbytes + sum(column.nbytes for column in groups.columns)
    return n_bytes / max(len(groups.completion_digest), 1)


def _heads(digests: U8) -> U64:
    return np.ascontiguousarray(digests[:, :8]).view("<u8").reshape(-1).astype(np.uint64)


def _joined(parts: list[tuple[I64, Column, str]]) -> Copied:
    if not parts:
        return NOTHING
    places = np.concatenate([places for places, _, _ in parts])
    order = np.argsort(places)
    sources: dict[str, int] = {}
    for _, rows, key in parts:
        sources[key] = sources.get(key, 0) + len(rows)
    rows = type(parts[0][1]).concat([rows for _, rows, _ in parts])
    return Copied(places[order], rows.take(order), sources)
