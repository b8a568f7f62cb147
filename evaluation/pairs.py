"""
The pairs of a cache: how they are made of groups, what each counts, and what its features differ by.

A group of two is a pair, a longer one the pairs of its best completion with each other one, which together count as
one pair does (`best_rest`, as objectives have it where nothing else is said). A row of nothing but one completion
makes none.

Dimension key:  P pairs   C prompts   S shards   E entries of a shard   U features that occur in it
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int, UInt
from numpy.typing import NDArray

from fpo.errors import DataError
from fpo.objectives import Pairing
from fpo.stage2_align.units import units_of
from fpo.store import Cache, Features, Groups
from fpo.store.format.ragged import starts_of

PAIRING: Pairing = "best_rest"

Progress = Callable[[int], object]
"""Is told how many more groups were read."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs of a cache in the order of its shards; about 60 bytes each, their features apart."""

    group_id: UInt[np.ndarray, " P"]
    weight: Float[np.ndarray, " P"]
    """What a pair counts: its group's weight, shared by the group's pairs. They add up to 1."""
    prompt: Int[np.ndarray, " P"]
    """Which prompt it answers: pairs of one prompt are no independent observations."""
    digest: UInt[np.ndarray, " C"]
    """Of each prompt: decides halves and folds, whatever the order of the data."""
    tokens: Int[np.ndarray, "P 2"]
    """Tokens of chosen and rejected that count."""
    splits: Int[np.ndarray, " S+1"]
    """Where each shard's pairs start."""

    def __len__(self) -> int:
        return len(self.group_id)

    @property
    def n_prompts(self) -> int:
        """C."""
        return len(self.digest)

    @cached_property
    def length_gap(self) -> Float[np.ndarray, " P"]:
        """Difference of the log lengths, chosen minus rejected; a completion of no token counts as one of one."""
        logs = np.log(np.maximum(self.tokens, 1))
        return np.asarray(logs[:, 0] - logs[:, 1])

    @property
    def half(self) -> Int[np.ndarray, " P"]:
        """0 or 1, by the prompt."""
        return np.asarray((self.digest & 1).astype(np.int64)[self.prompt])

    @cached_property
    def within_a_shard(self) -> Bool[np.ndarray, " C"]:
        """Whether all pairs of a prompt stand in one shard."""
        shard = np.repeat(np.arange(len(self.splits) - 1), np.diff(self.splits))
        first = np.full(self.n_prompts, len(self.splits))
        last = np.full(self.n_prompts, -1)
        np.minimum.at(first, self.prompt, shard)
        np.maximum.at(last, self.prompt, shard)
        return np.asarray(first == last)

    def waiting(self, turn: int, rounds: int) -> Bool[np.ndarray, " P"]:
        """The pairs of prompts in several shards that are this turn's, of so many."""
        return np.asarray(~self.within_a_shard[self.prompt] & (self.prompt % rounds == turn))

    def among(self, rows: Bool[np.ndarray, " P"]) -> Pairs:
        """The same with these pairs alone counting; the others weigh nothing."""
        weight = np.where(rows, self.weight, 0.0)
        return replace(self, weight=weight / max(float(weight.sum()), np.finfo(np.float64).tiny))


@dataclass(frozen=True, eq=False)
class ShardGaps:
    """What the features of a shard's pairs are, an entry for each pair and feature that either side has."""

    pair: Int[np.ndarray, " E"]
    """Of all pairs of the cache."""
    place: Int[np.ndarray, " E"]
    """Of the feature in `features`."""
    features: Int[np.ndarray, " U"]
    """Those that occur, ascending."""
    chosen: Float[np.ndarray, " E"]
    rejected: Float[np.ndarray, " E"]
    """Activations, 0 where the cache does not hold the feature of that side."""
    own: Int[np.ndarray, " p"]
    """All pairs that were asked for of this shard, with entries or not; ascending."""
    cut: Float[np.ndarray, "p 2"]
    """Most that any activation can be which was cut from chosen or rejected; 0 where nothing was cut."""
    lost: Float[np.ndarray, "p 2"]
    """Share of the squared activations of either side that was cut."""

    @property
    def gap(self) -> Float[np.ndarray, " E"]:
        return np.asarray(self.chosen - self.rejected)


def read_pairs(cache: Cache, scored: Progress = lambda groups: None) -> Pairs:
    """The pairs of a cache, from its base alone. Raises DataError where it has none."""
    cache.read_columns(())
    parts: list[tuple[NDArray[np.generic], ...]] = []
    for sid in range(len(cache.shard_groups)):
        groups = cache.shard(sid)
        units = units_of(groups, PAIRING)
        prompts = prompt_digests(groups)[units.group]
        weight = groups.weight[units.group].astype(np.float64) * units.shares(len(groups))
        parts.append((groups.group_id[units.group], weight, prompts, groups.counted[units.completions]))
        scored(len(groups))
    sizes = [len(part[0]) for part in parts]
    if sum(sizes) == 0:
        raise DataError(
            f"cache {cache.key[:12]} has no pairs: {cache.n_completions:,} completions in {cache.n_groups:,} groups, "
            "and a gap is what a chosen completion has and a rejected one to the same prompt has not"
        )
    group_id, weight, prompts, tokens = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    digest, prompt = np.unique(prompts, return_inverse=True)
    return Pairs(group_id, weight / weight.sum(), prompt, digest, tokens, starts_of(sizes))


def read_gaps(
    cache: Cache,
    column: int,
    pairs: Pairs,
    only: Bool[np.ndarray, " P"] | None = None,
    scored: Progress = lambda groups: None,
) -> Iterator[ShardGaps]:
    """
    The gaps of all shards, one after the other.

    column  place of a column of features in `cache.columns`
    only    leaves the other pairs out
    """
    for sid in range(len(cache.shard_groups)):
        groups = cache.shard(sid)
        features = groups.columns[column]
        assert isinstance(features, Features)
        own = np.arange(pairs.splits[sid], pairs.splits[sid + 1])
        if only is not None:
            own = own[only[own]]
        completions = units_of(groups, PAIRING).completions[own - pairs.splits[sid]]
        yield shard_gaps(features, completions, own)
        scored(len(groups))


def shard_gaps(column: Features, completions: Int[np.ndarray, "p 2"], own: Int[np.ndarray, " p"]) -> ShardGaps:
    """The gaps of these pairs, `own` of all of the cache; `completions` are the rows of their sides, chosen first."""
    sides = [column.take(completions[:, place]) for place in (0, 1)]
    keys = [np.repeat(np.arange(len(side)) << 32, side.lengths) | side.indices.astype(np.int64) for side in sides]
    found, at = np.unique(np.concatenate(keys), return_inverse=True)
    acts = [
        np.bincount(places, side.acts, minlength=len(found))
        for places, side in zip(np.split(at, [len(keys[0])]), sides, strict=True)
    ]
    features, place = np.unique(found & 0xFFFFFFFF, return_inverse=True)
    cut = np.stack([_most_cut(side) for side in sides], axis=1)
    lost = np.stack([_lost(side) for side in sides], axis=1)
    return ShardGaps(own[found >> 32], place, features, acts[0], acts[1], own, cut, lost)


def prompt_digests(groups: Groups) -> UInt[np.ndarray, " G"]:
    """8 bytes of each group's prompt: equal ids, equal digest. Groups without a prompt have none in common."""
    starts = groups.splits[groups.completion_starts[:-1] + np.arange(len(groups))].astype(np.int64)
    ids = groups.input_ids.astype("<u4", copy=False)
    rows = zip(starts.tolist(), groups.lengths[0].tolist(), groups.group_id.astype("<u8"), strict=True)
    named = (ids[start : start + size].tobytes() if size else b"no prompt" + own.tobytes() for start, size, own in rows)
    digests = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in named)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def _most_cut(side: Features) -> Float[np.ndarray, " p"]:
    """
    A bound on every activation that was cut: no larger than the smallest that was kept, nor than the root of the sum of
    all their squares.
    """
    smallest = np.full(len(side), np.inf)
    rows = np.repeat(np.arange(len(side)), side.lengths)
    np.minimum.at(smallest, rows, side.acts)
    return np.asarray(np.minimum(smallest, np.sqrt(side.tail_sq.astype(np.float64))))


def _lost(side: Features) -> Float[np.ndarray, " p"]:
    rows = np.repeat(np.arange(len(side)), side.lengths)
    tail = side.tail_sq.astype(np.float64)
    whole = tail + np.bincount(rows, side.acts.astype(np.float64) ** 2, minlength=len(side))
    return np.asarray(tail / np.where(whole > 0, whole, 1))
