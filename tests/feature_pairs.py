"""Caches of pairs in memory whose features a test says itself: dense rows in, what `open_cache` gives out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from store_cases import make_groups

from fpo.store import Features, Groups, PromptFeatures
from fpo.store.format.ragged import starts_of


class MemoryCache:
    """What reads of a cache, of groups that stand in memory."""

    key = "ca" * 32

    def __init__(self, shards: Sequence[Groups]) -> None:
        self._shards = list(shards)
        self.shard_groups = [len(shard) for shard in shards]
        self.n_groups = sum(self.shard_groups)
        self.n_completions = sum(len(shard.completion_digest) for shard in shards)

    def read_columns(self, wanted: Any) -> None:
        """All are there."""

    def shard(self, sid: int) -> Groups:
        return self._shards[sid]


def sparse(dense: np.ndarray, top_k: int | None = None, kind: type[Features] = Features) -> Features:
    """(R, F) activations as a column of their largest `top_k`, or of all that are not zero."""
    kept = dense != 0
    if top_k is not None:
        smallest = -np.sort(-dense, axis=1)[:, top_k - 1 : top_k]
        kept &= dense >= smallest
    rows, indices = np.nonzero(kept)
    return kind(
        splits=starts_of(np.bincount(rows, minlength=len(dense))).astype(np.uint64),
        indices=indices.astype(np.uint32),
        acts=dense[kept].astype(np.float32),
        active=(dense != 0).sum(1).astype(np.uint32),
        tail_sq=(np.where(kept, 0, dense) ** 2).sum(1).astype(np.float32),
    )


def pairs_of(
    acts: np.ndarray,
    prompt: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    of_prompts: np.ndarray | None = None,
    shards: int = 1,
    top_k: int | None = None,
) -> MemoryCache:
    """
    acts        (P, 2, F) of chosen and rejected
    prompt      (P,) which prompt each answers; by default each its own
    tokens      (P, 2) lengths, by default all 3
    of_prompts  (P, F) activations of the prompts, a second column
    """
    P = len(acts)
    prompt = np.arange(P) if prompt is None else prompt
    tokens = np.full((P, 2), 3) if tokens is None else tokens
    groups = make_groups([(2, tuple(own)) for own in tokens])
    ids = groups.input_ids.copy()
    first = groups.splits[groups.completion_starts[:-1] + np.arange(P)].astype(np.int64)
    ids[first], ids[first + 1] = prompt // 100, prompt % 100
    columns: list[Any] = [sparse(acts.reshape(2 * P, -1), top_k)]
    if of_prompts is not None:
        columns.append(sparse(of_prompts, kind=PromptFeatures))
    weight = np.ones(P) if weight is None else weight
    groups = replace(groups, input_ids=ids, weight=weight.astype(np.float32)).with_columns(columns)
    return MemoryCache([groups.take(rows) for rows in np.array_split(np.arange(P), shards)])
