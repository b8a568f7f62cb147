"""
`fpo store verify --recompute`: score random pairs of a cache again and hold them against what it says. The only check
that can find numbers that were wrong when they were written, or a machine whose numbers are others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fpo.errors import CacheConflict, CacheDamaged
from fpo.recipe import Recipe
from fpo.scoring import LOGPS_TOLERANCE, extremes
from fpo.stage1_cache.build import reference_scorer
from fpo.stage1_cache.identity import cache_identities
from fpo.store import Cache, Features, Pairs, differences

FEATURES_TOLERANCE = {"float32": 0.05, "bfloat16": 0.2, "float16": 0.1}
"""
Largest distance of a completion's activations, as a part of their size. On stories260K with TopK and JumpReLU SAEs, 60
pairs, all of bfloat16's noise (against float32) is 0.12 at most, 0.03 in the middle; other batches on one machine
differ by 0. Rounding moves an activation a little, but a threshold or the SAE's own top-k may drop one altogether.
"""


@dataclass(frozen=True)
class RecomputeReport:
    """How far random pairs of a cache are from what the reference says now."""

    pairs: int
    worst: float
    """Largest mean |difference| of a pair's token log-probs, nats."""
    worst_features: float
    """Largest distance of a completion's activations, as a part of their size; 0 without features."""
    tolerance: float
    feature_tolerance: float


def recompute(recipe: Recipe, cache: Cache, count: int, seed: int, batch_tokens: int = 8192) -> RecomputeReport:
    """
    Score `count` random pairs of `cache` with the reference and SAEs of `recipe` and compare.

    Raises CacheConflict where the recipe's scorer is not the cache's, CacheDamaged naming the pair that differs most
    of the first shard where one differs by more than the tolerance of the reference's arithmetic.
    """
    named = cache_identities(recipe)[0].scorer
    differing = differences(cache.recipe["scorer"], named)
    if differing:
        raise CacheConflict(f"the recipe does not score as cache {cache.key[:12]} was scored\n  {differing[0]}")
    precision = recipe.reference.arithmetic.precision
    tolerance, feature_tolerance = LOGPS_TOLERANCE[precision], FEATURES_TOLERANCE[precision]
    scorer = reference_scorer(recipe, batch_tokens, named)
    worst = worst_features = 0.0
    total = 0
    for where, stored in _sample(cache, count, seed):
        few = stored.take(extremes(stored.splits, stored.n_completions))
        scorer.check(few.input_ids, few.splits)
        again = scorer.score(stored.pair_id, stored.pair_digest, stored.input_ids, stored.splits)
        means = _mean_differences(stored, again)
        row = int(means.argmax())
        if not means[row] <= tolerance:
            raise CacheDamaged(
                f"cache {cache.key[:12]}, shard {where}: pair {stored.pair_id[row]} scores {means[row]:.3g} nats per "
                f"token away from what the cache says (at most {tolerance:g})\n"
                f"  chosen {again.ref_logps[row, 0]:.4f} now, {stored.ref_logps[row, 0]:.4f} in the cache"
            )
        worst = max(worst, float(means[row]))
        for feature, old, new in zip(recipe.features, stored.features, again.features, strict=True):
            apart = feature_distances(old, new)
            at = int(apart.argmax())
            if not apart[at] <= feature_tolerance:
                raise CacheDamaged(
                    f"cache {cache.key[:12]}, shard {where}: the activations of pair {stored.pair_id[at // 2]}, "
                    f"{('chosen', 'rejected')[at % 2]}, at {feature.hookpoint} are {100 * apart[at]:.3g} % away from "
                    f"what the cache says (at most {100 * feature_tolerance:g} %)"
                )
            worst_features = max(worst_features, float(apart[at]))
        total += len(stored)
    return RecomputeReport(total, worst, worst_features, tolerance, feature_tolerance)


def feature_distances(old: Features, new: Features) -> np.ndarray:
    """
    (2P,) per completion: the distance of two sets of pooled activations, as a part of the larger one's size.

    A feature that only one side keeps may have been cut from the other, so it is at most as large there as the
    smallest that is kept: noise decides which of two equals is cut, and that is no distance.
    """
    return np.array([_distance(old, new, completion) for completion in range(len(old.splits) - 1)])


def _distance(old: Features, new: Features, completion: int) -> float:
    (a, a_tail), (b, b_tail) = (_kept(features, completion) for features in (old, new))
    square = (np.sqrt(a_tail) - np.sqrt(b_tail)) ** 2
    square += sum((a[index] - b[index]) ** 2 for index in a.keys() & b.keys())
    for one, other, cut in ((a, b, b_tail), (b, a, a_tail)):
        # Nothing was cut where the tail is empty: what is not kept is 0.
        known = min(other.values(), default=0.0) if cut > 0 else 0.0
        square += sum(max(value - known, 0.0) ** 2 for index, value in one.items() if index not in other)
    size = max(sum(value**2 for value in kept.values()) + tail for kept, tail in ((a, a_tail), (b, b_tail)))
    return float(np.sqrt(square / size)) if size else 0.0


def _kept(features: Features, completion: int) -> tuple[dict[int, float], float]:
    """Index -> activation of one completion, and the sum of squares of what was cut."""
    start, end = (int(bound) for bound in features.splits[completion : completion + 2])
    kept = zip(features.indices[start:end].tolist(), features.acts[start:end].tolist(), strict=True)
    return dict(kept), float(features.tail_sq.reshape(-1)[completion])


def _mean_differences(stored: Pairs, again: Pairs) -> np.ndarray:
    """(P,) mean |difference| of a pair's token log-probs, nats; 0 where none is scored."""
    apart = np.concatenate([[0.0], np.cumsum(np.abs(again.token_logps - stored.token_logps), dtype=np.float64)])
    bounds = stored.completion_splits[::2]
    means: np.ndarray = (apart[bounds[1:]] - apart[bounds[:-1]]) / np.maximum(bounds[1:] - bounds[:-1], 1)
    return means


def _sample(cache: Cache, count: int, seed: int) -> Iterator[tuple[int, Pairs]]:
    """Random pairs, shard by shard."""
    rows = np.random.default_rng(seed).choice(cache.n_pairs, min(count, cache.n_pairs), replace=False)
    starts = np.concatenate([[0], np.cumsum(cache.shard_pairs)])
    shard_of = np.searchsorted(starts, rows, side="right") - 1
    for sid in np.unique(shard_of):
        yield int(sid), cache.shard(int(sid)).take(np.sort(rows[shard_of == sid] - starts[sid]))
