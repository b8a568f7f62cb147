"""
`fpo store verify --recompute`: score random pairs of a cache again and hold them against what it says. The only check
that can find numbers that were wrong when they were written, or a machine whose numbers are others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from errors import CacheConflict, CacheDamaged
from recipe import Recipe
from scoring import LOGPS_TOLERANCE, extremes
from stage1_cache.build import reference_scorer
from stage1_cache.identity import cache_identities
from store import Cache, Features, Pairs, differences


@dataclass(frozen=True)
class RecomputeReport:
    """How far random pairs of a cache are from what the reference says now."""

    pairs: int
    worst: float
    """Largest mean |difference| of a pair's token log-probs, nats."""
    worst_features: float
    """Largest difference of a stored activation, as a part of the mean activation; 0 without features."""
    tolerance: float


def recompute(recipe: Recipe, cache: Cache, count: int, seed: int, batch_tokens: int = 8192) -> RecomputeReport:
    """
    Score `count` random pairs of `cache` with the reference and SAEs of `recipe` and compare.

    Raises CacheConflict where the recipe's scorer is not the cache's, CacheDamaged naming the first pair that differs
    by more than the tolerance of the reference's arithmetic.
    """
    named = cache_identities(recipe)[0].scorer
    differing = differences(cache.recipe["scorer"], named)
    if differing:
        raise CacheConflict(f"the recipe does not score as cache {cache.key[:12]} was scored\n  {differing[0]}")
    tolerance = LOGPS_TOLERANCE[recipe.reference.arithmetic.precision]
    scorer = reference_scorer(recipe, batch_tokens, named)
    worst = worst_features = 0.0
    total = 0
    for where, stored in _sample(cache, count, seed):
        few = stored.take(extremes(stored.lengths))
        scorer.check(few.input_ids, few.splits)
        again = scorer.score(stored.pair_id, stored.pair_digest, stored.input_ids, stored.splits)
        apart = np.abs(again.token_logps - stored.token_logps)
        bounds = stored.completion_splits[::2]
        for row, (start, end) in enumerate(itertools.pairwise(bounds)):
            mean = float(apart[start:end].mean()) if end > start else 0.0
            if not mean <= tolerance:
                raise CacheDamaged(
                    f"cache {cache.key[:12]}, shard {where}: pair {stored.pair_id[row]} scores {mean:.3g} nats per "
                    f"token away from what the cache says (at most {tolerance:g})\n"
                    f"  chosen {again.ref_logps[row, 0]:.4f} now, {stored.ref_logps[row, 0]:.4f} in the cache"
                )
            worst = max(worst, mean)
        worst_features = max([worst_features, *_feature_differences(stored, again)])
        total += len(stored)
    return RecomputeReport(total, worst, worst_features, tolerance)


def _sample(cache: Cache, count: int, seed: int) -> Iterator[tuple[int, Pairs]]:
    """Random pairs, shard by shard."""
    rows = np.random.default_rng(seed).choice(cache.n_pairs, min(count, cache.n_pairs), replace=False)
    starts = np.concatenate([[0], np.cumsum(cache.shard_pairs)])
    shard_of = np.searchsorted(starts, rows, side="right") - 1
    for sid in np.unique(shard_of):
        yield int(sid), cache.shard(int(sid)).take(np.sort(rows[shard_of == sid] - starts[sid]))


def _feature_differences(stored: Pairs, again: Pairs) -> Iterator[float]:
    """Per hookpoint, the largest difference where both keep a feature, as a part of the mean activation."""
    for old, new in zip(stored.features, again.features, strict=True):
        _, left, right = np.intersect1d(_places(old), _places(new), return_indices=True)
        if len(left):
            yield float(np.abs(old.acts[left] - new.acts[right]).max() / old.acts.mean())


def _places(features: Features) -> np.ndarray:
    """One number per kept feature: completion and index."""
    splits = features.splits.astype(np.int64)
    sizes = splits[1:] - splits[:-1]
    return np.repeat(np.arange(len(sizes)), sizes) * 2**32 + features.indices.astype(np.int64)
