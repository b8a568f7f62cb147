"""
`fpo store verify --recompute`: score random groups of a cache again and hold them against what it says. The only check
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
from fpo.stage1_cache.identity import CacheIdentity, cache_identities
from fpo.stage1_cache.places import with_module_paths
from fpo.stage1_cache.score import TokenGroups, take
from fpo.store import Cache, Features, Groups, TokenLogps, column_name, differences, serving
from fpo.store.format.groups import summed_logps

FEATURES_TOLERANCE = {"float32": 0.05, "bfloat16": 0.2, "float16": 0.1}
"""
Largest distance of a completion's activations, as a part of their size. On stories260K with TopK and JumpReLU SAEs, 60
pairs, all of bfloat16's noise (against float32) is 0.12 at most, 0.03 in the middle; other batches on one machine
differ by 0. Rounding moves an activation a little, but a threshold or the SAE's own top-k may drop one altogether.
"""


@dataclass(frozen=True)
class RecomputeReport:
    """How far random groups of a cache are from what the reference says now."""

    groups: int
    worst: float
    """Largest mean |difference| of a completion's token log-probs, nats."""
    worst_features: float
    """Largest distance of a completion's activations, as a part of their size; 0 without features."""
    tolerance: float
    feature_tolerance: float
    left_out: tuple[str, ...]
    """Columns beside the cache that were not scored again: what is no feature, or not the recipe's."""


def recompute(recipe: Recipe, cache: Cache, count: int, seed: int, batch_tokens: int = 8192) -> RecomputeReport:
    """
    Score `count` random groups of `cache` with the reference and SAEs of `recipe` and compare: log-probs, and the
    features of the recipe that stand beside the base.

    Raises CacheConflict where the recipe's scorer is not the cache's, CacheDamaged naming the completion that differs
    most of the first shard where one differs by more than the tolerance of the reference's arithmetic.
    """
    identity = identity_of_scorer(recipe, cache)
    recipe = identity.recipe
    precision = recipe.reference.arithmetic.precision
    tolerance, feature_tolerance = LOGPS_TOLERANCE[precision], FEATURES_TOLERANCE[precision]
    held = cache.held_columns(identity.specs)
    specs = [spec for spec in identity.specs if spec["kind"] == "features" and serving(held, spec) is not None]
    cache.read_columns(specs)
    scorer = reference_scorer(recipe, batch_tokens, identity, specs)
    worst = worst_features = 0.0
    total = 0
    for where, stored in _sample(cache, count, seed):
        groups = TokenGroups(stored.input_ids, stored.splits, stored.n_completions, stored.score_mask)
        scorer.check(take(groups, extremes(stored.splits, stored.n_completions)))
        logps, *columns = scorer.score(groups, [None, *specs])
        assert isinstance(logps, TokenLogps)
        means = _mean_differences(stored, logps)
        at = int(means.argmax())
        # Another engine's log-probs differ from these; how far is what is asked.
        if not means[at] <= tolerance and recipe.reference.scored_by is None:
            raise CacheDamaged(
                f"cache {cache.key[:12]}, shard {where}: {_named(stored, at)} scores {means[at]:.3g} nats per token "
                f"away from what the cache says (at most {tolerance:g})\n"
                f"  {_summed(stored, logps)[at]:.4f} now, {stored.ref_logps[at]:.4f} in the cache"
            )
        worst = max(worst, float(means[at]))
        for spec, old, new in zip(specs, stored.columns, columns, strict=True):
            assert isinstance(old, Features)
            assert isinstance(new, Features)
            apart = feature_distances(old, new)
            at = int(apart.argmax())
            if not apart[at] <= feature_tolerance:
                raise CacheDamaged(
                    f"cache {cache.key[:12]}, shard {where}: the activations of {_named(stored, at)} at "
                    f"{spec['hookpoint']} are {100 * apart[at]:.3g} % away from what the cache says (at most "
                    f"{100 * feature_tolerance:g} %)"
                )
            worst_features = max(worst_features, float(apart[at]))
        total += len(stored)
    again = [serving(held, spec) for spec in specs]
    left_out = tuple(column_name(column.spec) for column in held if column not in again)
    return RecomputeReport(total, worst, worst_features, tolerance, feature_tolerance, left_out)


def identity_of_scorer(recipe: Recipe, cache: Cache) -> CacheIdentity:
    """What the recipe stands for. Raises CacheConflict where its scorer is not the cache's."""
    identity = cache_identities(with_module_paths(recipe))[0]
    differing = differences(cache.recipe["scorer"], identity.scorer)
    if differing:
        raise CacheConflict(f"the recipe does not score as cache {cache.key[:12]} was scored\n  {differing[0]}")
    return identity


def _named(groups: Groups, completion: int) -> str:
    """group 17, completion 1 of 2"""
    row = int(np.searchsorted(groups.completion_starts, completion, side="right")) - 1
    place = completion - int(groups.completion_starts[row]) + 1
    return f"group {groups.group_id[row]}, completion {place} of {groups.n_completions[row]},"


def _summed(stored: Groups, logps: TokenLogps) -> np.ndarray:
    return summed_logps(logps.logps, stored.scored_splits, stored.score_mask)


def feature_distances(old: Features, new: Features) -> np.ndarray:
    """
    (K,) per completion: the distance of two sets of pooled activations, as a part of the larger one's size.

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


def _mean_differences(stored: Groups, again: TokenLogps) -> np.ndarray:
    """(K,) mean |difference| of a completion's token log-probs, nats; 0 where none is scored."""
    apart = np.concatenate([[0.0], np.cumsum(np.abs(again.logps - stored.token_logps), dtype=np.float64)])
    bounds = stored.scored_splits
    means: np.ndarray = (apart[bounds[1:]] - apart[bounds[:-1]]) / np.maximum(bounds[1:] - bounds[:-1], 1)
    return means


def _sample(cache: Cache, count: int, seed: int) -> Iterator[tuple[int, Groups]]:
    """Random groups, shard by shard."""
    rows = np.random.default_rng(seed).choice(cache.n_groups, min(count, cache.n_groups), replace=False)
    starts = np.concatenate([[0], np.cumsum(cache.shard_groups)])
    shard_of = np.searchsorted(starts, rows, side="right") - 1
    for sid in np.unique(shard_of):
        yield int(sid), cache.shard(int(sid)).take(np.sort(rows[shard_of == sid] - starts[sid]))
