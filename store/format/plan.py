"""
Which groups share a shard: a pure function of the groups' sizes and a seed, so that any number of writers
agree on it without talking.

Groups are shuffled once, here: reading shards in blocks is then statistically a shuffle of all groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpo.store.format.ragged import I64, lengths_of, starts_of

SHARD_BYTES = 64 * 2**20
"""A shard is closed before its arrays take more, uncompressed."""

_BYTES_PER_GROUP = 8 + 4 + 4 + 8
"""group_id, n_completions, weight, the prompt's split."""
_BYTES_PER_COMPLETION = 16 + 8 + 4 + 4
"""completion_digest, split, score, ref_logps."""


def plan_shards(
    n_tokens: NDArray[np.integer[Any]],
    n_completions: NDArray[np.integer[Any]],
    seed: int,
    max_groups: int = 2048,
    max_tokens: int = 2**20,
    max_bytes: int = SHARD_BYTES,
) -> list[I64]:
    """
    The groups (positions) of every shard, in shard order.

    n_tokens, n_completions: (G,) of every group.
    seed: at least 0, below 2**64.
    A shard is closed before it exceeds a limit; a group that exceeds one by itself gets its own shard.
    """
    tokens, completions = np.asarray(n_tokens, dtype=np.int64), np.asarray(n_completions, dtype=np.int64)
    order = permutation(len(tokens), seed)
    # Ids, log-probs and a mask take 4 + 4 + 1 bytes a token at most.
    n_bytes = 9 * tokens + _BYTES_PER_GROUP + _BYTES_PER_COMPLETION * completions
    ends = _cut(max_groups, (tokens[order], max_tokens), (n_bytes[order], max_bytes))
    return [order[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)] if ends else []


def cut_shards(
    shard_groups: Sequence[int], n_bytes: NDArray[np.integer[Any]], max_bytes: int = SHARD_BYTES
) -> list[int]:
    """
    Groups of every shard of a column: those of the base's shards, each cut further where the column takes more.

    shard_groups: of the base. n_bytes: (G,) what the column takes of each group at most, in the order of the shards.
    """
    starts = starts_of(np.array(shard_groups, dtype=np.int64)).tolist()
    sizes = np.asarray(n_bytes, dtype=np.int64)
    found: list[int] = []
    for start, end in itertools.pairwise(starts):
        ends = _cut(max(end - start, 1), (sizes[start:end], max_bytes))
        found += lengths_of(np.array([0, *ends])).tolist() or [0]
    return found


def shards_within(base: Sequence[int], column: Sequence[int]) -> list[list[int]] | None:
    """Groups per shard of the base and of a column -> the column's shards within each of the base's; None if cut
    otherwise."""
    found: list[list[int]] = []
    sid = 0
    for left in base:
        first = sid
        # An empty shard of the base has one beside it, too.
        while sid < len(column) and (left > 0 or sid == first):
            left, sid = left - column[sid], sid + 1
        if left != 0 or sid == first:
            return None
        found.append(list(range(first, sid)))
    return found if sid == len(column) else None


def _cut(max_rows: int, *limits: tuple[I64, int]) -> list[int]:
    """Where each run of rows ends that exceeds neither so many rows nor a limit on a sum; at least one row each."""
    n = len(limits[0][0])
    running = [(starts_of(sizes), limit) for sizes, limit in limits]
    ends: list[int] = []
    start = 0
    while start < n:
        most = [int(np.searchsorted(sums, sums[start] + limit, side="right")) - 1 for sums, limit in running]
        start = min(max(min(start + max_rows, *most), start + 1), n)
        ends.append(start)
    return ends


def permutation(n: int, seed: int) -> I64:
    """
    A shuffle of 0..n-1 that no version of numpy will change: the order of n raw 64-bit Philox numbers,
    whose stream numpy guarantees (`Generator.permutation` it does not).
    """
    numbers = np.random.Philox(key=seed).random_raw(n)
    return np.argsort(numbers, kind="stable").astype(np.int64)
