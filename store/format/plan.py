"""
Which pairs share a shard: a pure function of the pairs' sizes and a seed, so that any number of writers
agree on it without talking.

Pairs are shuffled once, here: reading shards in blocks is then statistically a shuffle of all pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpo.store.format.pairs import I64, scored_lengths, starts_of

_FIXED_BYTES_PER_PAIR = 8 + 16 + 3 * 8 + 2 * 4
"""pair_id, pair_digest, three splits, ref_logps."""


def plan_shards(
    lengths: NDArray[np.integer[Any]],
    feature_bytes: NDArray[np.integer[Any]],
    seed: int,
    max_pairs: int = 2048,
    max_tokens: int = 2**20,
    max_bytes: int = 64 * 2**20,
) -> list[I64]:
    """
    The pair ids of every shard, in shard order.

    lengths: (P, 3) tokens of prompt, chosen and rejected.
    feature_bytes: (P,) upper bound of what features and extras of the pair take, uncompressed.
    seed: at least 0, below 2**64.
    A shard is closed before it exceeds a limit; a pair that exceeds one by itself gets its own shard.
    """
    counts = np.asarray(lengths, dtype=np.int64).reshape(-1, 3)
    order = permutation(len(counts), seed)
    tokens = counts.sum(axis=1)
    n_bytes = 4 * tokens + 4 * scored_lengths(counts).sum(axis=1) + _FIXED_BYTES_PER_PAIR
    n_bytes += np.asarray(feature_bytes, dtype=np.int64)
    token_starts, byte_starts = starts_of(tokens[order]), starts_of(n_bytes[order])
    shards = []
    start = 0
    while start < len(order):
        ends = (
            start + max_pairs,
            int(np.searchsorted(token_starts, token_starts[start] + max_tokens, side="right")) - 1,
            int(np.searchsorted(byte_starts, byte_starts[start] + max_bytes, side="right")) - 1,
        )
        end = min(max(min(ends), start + 1), len(order))
        shards.append(order[start:end])
        start = end
    return shards


def permutation(n: int, seed: int) -> I64:
    """
    A shuffle of 0..n-1 that no version of numpy will change: the order of n raw 64-bit Philox numbers,
    whose stream numpy guarantees (`Generator.permutation` it does not).
    """
    numbers = np.random.Philox(key=seed).random_raw(n)
    return np.argsort(numbers, kind="stable").astype(np.int64)
