"""
The pairs that say most about a feature, each of another prompt.

Dimension key:  K features   E entries
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from fpo.evaluation.pairs import Pairs, ShardGaps


class TopPair(NamedTuple):
    """A pair of the cache and its activations of one feature."""

    pair: int
    chosen: float
    rejected: float


class TopPairs:
    """The pairs of the largest gaps of some features, in the direction in which each leans."""

    def __init__(self, pairs: Pairs, features: Int[np.ndarray, " K"], leans: Int[np.ndarray, " K"], count: int) -> None:
        """leans: 1 where the largest gaps are looked for, -1 for the smallest. count: pairs of each feature."""
        self.pairs, self.count = pairs, count
        order = np.argsort(features, kind="stable")
        self.features, self.leans = features[order], leans[order]
        empty = np.empty(0, np.int64)
        self._kept = (empty, empty, np.empty(0), np.empty(0))

    def watching(self, shards: Iterable[ShardGaps]) -> Iterator[ShardGaps]:
        """The same shards, looked at on their way."""
        for shard in shards:
            self.add(shard)
            yield shard

    def add(self, shard: ShardGaps) -> None:
        """Keep those of this shard that are among the best so far."""
        known = np.isin(shard.features, self.features)[shard.place]
        place = np.searchsorted(self.features, shard.features[shard.place[known]])
        found = (place, shard.pair[known], shard.chosen[known], shard.rejected[known])
        joined = [np.concatenate(arrays) for arrays in zip(self._kept, found, strict=True)]
        best = self._best(*joined)
        self._kept = (joined[0][best], joined[1][best], joined[2][best], joined[3][best])

    def found(self) -> dict[int, list[TopPair]]:
        """By feature, the largest gap first; fewer where fewer pairs lean its way."""
        own: dict[int, list[TopPair]] = {}
        for place, *entry in zip(*(array.tolist() for array in self._kept), strict=True):
            own.setdefault(int(self.features[place]), []).append(TopPair(*entry))
        return {feature: own.get(feature, []) for feature in self.features.tolist()}

    def _best(
        self,
        place: Int[np.ndarray, " E"],
        pair: Int[np.ndarray, " E"],
        chosen: Float[np.ndarray, " E"],
        rejected: Float[np.ndarray, " E"],
    ) -> Int[np.ndarray, " kept"]:
        """Feature by feature the entries of the largest leaning gaps, of a prompt only the first."""
        leaning = self.leans[place] * (chosen - rejected)
        order = np.lexsort((pair, -leaning, place))
        order = order[leaning[order] > 0]
        key = place[order] * self.pairs.n_prompts + self.pairs.prompt[pair[order]]
        order = order[np.sort(np.unique(key, return_index=True)[1])]
        sizes = np.bincount(place[order], minlength=len(self.features))
        rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.asarray(order[rank < self.count])
