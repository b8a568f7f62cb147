"""
Parts of the pairs whose gaps are looked at apart: topics, which are features of the prompt, and sources, which a column
of the data names.

Dimension key:  P pairs   T topics
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from fpo.errors import CacheConflict
from fpo.evaluation.gaps import MIN_PROMPTS
from fpo.evaluation.pairs import PAIRING, Pairs, Progress
from fpo.recipe import Recipe
from fpo.stage1_cache.identity import cache_identities
from fpo.stage2_align.units import units_of
from fpo.store import Cache, PromptFeatures, cache_key

MOST_PARTS = 8
"""Topics, and sources, that are looked at: each holds as many sums as all pairs together do."""
MOST_COMMON = 0.25
"""A prompt feature that fires in more of the pairs is no topic: it is what prompts look like."""
MOST_SHARED = 0.5
"""Two prompt features that fire together in more of the pairs in which either does are one topic."""


class Part(NamedTuple):
    """Some of the pairs."""

    kind: Literal["topic", "source"]
    name: str
    """Of a topic the prompt feature, of a source what the data calls it."""
    rows: Bool[np.ndarray, " P"]


def topics(cache: Cache, column: int, d_sae: int, pairs: Pairs, scored: Progress = lambda groups: None) -> list[Part]:
    """
    The most common features of the prompts that are no common ground, each unlike those before it and in pairs enough
    for a feature to be tested.

    column  place of a column of prompt features in `cache.columns`
    """
    common = _common(cache, column, d_sae, pairs, scored)
    rows = np.zeros((len(pairs), len(common)), dtype=bool)
    for sid in range(len(cache.shard_groups)):
        first, of_group, prompts = _prompt_features(cache, column, sid, pairs)
        group = np.repeat(np.arange(len(prompts)), prompts.lengths)
        place = np.searchsorted(common, prompts.indices)
        known = np.isin(prompts.indices, common)
        fires = np.zeros((len(prompts), len(common)), dtype=bool)
        fires[group[known], place[known]] = True
        rows[first : first + len(of_group)] = fires[of_group]
        scored(len(prompts))
    weights = np.where(rows.sum(axis=0) >= MIN_PROMPTS, pairs.weight @ rows, 0.0)
    chosen: list[int] = []
    for place in np.argsort(-weights, kind="stable")[: np.count_nonzero(weights)].tolist():
        if len(chosen) < MOST_PARTS and all(
            _overlap(rows, place, other, pairs.weight) < MOST_SHARED for other in chosen
        ):
            chosen.append(place)
    return [Part("topic", str(common[place]), rows[:, place].copy()) for place in chosen]


def sources(pairs: Pairs, names: Sequence[str]) -> list[Part]:
    """The most common sources; `names` are those of the rows of the data, by number."""
    own = [names[int(row)] for row in pairs.group_id.tolist()]
    array = np.array(own, dtype=object)
    common = sorted(Counter(own).items(), key=lambda item: (-item[1], item[0]))[:MOST_PARTS]
    return [Part("source", name, array == name) for name, _ in common]


def data_column(recipe: Recipe, cache: Cache, name: str) -> list[str]:
    """
    What a column of the cache's data says of each row. Raises CacheConflict where the cache was not made from the
    recipe's data, DataError where there is no such column.
    """
    for identity in cache_identities(recipe):
        if cache_key(identity.key_recipe) == cache.key:
            return identity.column(name)
    raise CacheConflict(
        f"the recipe is not that of cache {cache.key[:12]}, so the rows of its data are others; give the recipe that "
        "the cache was made from"
    )


def _common(cache: Cache, column: int, d_sae: int, pairs: Pairs, scored: Progress) -> Int[np.ndarray, " T"]:
    """Candidates: the features that fire in most pairs, of those that fire in at most `MOST_COMMON`; ascending."""
    shares = np.zeros(d_sae)
    for sid in range(len(cache.shard_groups)):
        first, of_group, prompts = _prompt_features(cache, column, sid, pairs)
        weight = np.bincount(of_group, pairs.weight[first : first + len(of_group)], minlength=len(prompts))
        np.add.at(shares, prompts.indices, np.repeat(weight, prompts.lengths))
        scored(len(prompts))
    fit = np.flatnonzero((shares > 0) & (shares <= MOST_COMMON))
    return np.sort(fit[np.argsort(-shares[fit], kind="stable")[: 8 * MOST_PARTS]])


def _prompt_features(
    cache: Cache, column: int, sid: int, pairs: Pairs
) -> tuple[int, Int[np.ndarray, " p"], PromptFeatures]:
    """Of a shard its first pair, the group of each of its pairs, and the features of its groups' prompts."""
    groups = cache.shard(sid)
    found = groups.columns[column]
    assert isinstance(found, PromptFeatures)
    return int(pairs.splits[sid]), units_of(groups, PAIRING).group, found


def _overlap(rows: Bool[np.ndarray, "P T"], one: int, other: int, weight: Float[np.ndarray, " P"]) -> float:
    both, either = rows[:, one] & rows[:, other], rows[:, one] | rows[:, other]
    return float(weight @ both) / max(float(weight @ either), 1e-300)
