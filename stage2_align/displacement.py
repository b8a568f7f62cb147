"""
Displacement: what a prompt's completions share pulls both of them down. The score that tells it before training is

    CHES = <S_chosen, S_rejected> - |S_chosen|^2

S the sum of a completion's last hidden states over the positions that predict it, of the reference: Definition 2 of
https://arxiv.org/abs/2410.08847, as its code has it. The larger, the more alike the two look to the model. Normalised
by length each sum is divided by how many positions it is over.

Dimension key:  U pairs   G groups   K completions
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fpo.objectives import UnitKind
from fpo.recipe import Filter
from fpo.stage2_align.units import Units, units_of
from fpo.store import Cache, Groups, HiddenGram, Kept

GRAM = {"kind": "hidden_gram"}


class Ches(NamedTuple):
    """Of each pair."""

    raw: Float[np.ndarray, " U"]
    normalised: Float[np.ndarray, " U"]
    """By length."""


def holds_gram(cache: Cache) -> bool:
    """Whether the cache has what displacement is told from."""
    return any(column.spec == GRAM for column in cache.held_columns([GRAM]))


def ches(groups: Groups, units: Units) -> Ches:
    """Of these pairs of groups whose only column is their hidden gram."""
    (gram,) = groups.columns
    assert isinstance(gram, HiddenGram)
    n = groups.n_completions.astype(np.int64)[units.group]
    start = gram.splits[units.group].astype(np.int64)
    chosen, rejected = (units.completions - groups.completion_starts[units.group][:, None]).T
    both = gram.products[start + chosen * n + rejected].astype(np.float64)
    own = gram.products[start + chosen * n + chosen].astype(np.float64)
    sizes = np.maximum(groups.counted[units.completions], 1).astype(np.float64)
    return Ches(both - own, both / sizes.prod(1) - own / sizes[:, 0] ** 2)


class Filtered(NamedTuple):
    """What a filter leaves out."""

    kept: Kept
    n_dropped: int
    above: float
    """The largest score of those that stay."""


def without_worst(cache: Cache, kind: UnitKind, wanted: Filter) -> Filtered:
    """
    The groups of a cache but the share with the largest scores, of a group the mean over its pairs; one without a pair
    stays. Raises CacheMissing where the cache has no hidden gram, with what adds it.
    """
    reads = cache.columns
    cache.read_columns([GRAM])
    cache.prefetch(range(len(cache.shard_groups)))
    scores, completions = [], []
    for sid in range(len(cache.shard_groups)):
        groups = cache.shard(sid)
        units = units_of(groups, kind)
        found = ches(groups, units)
        score = found.raw if wanted.by == "ches" else found.normalised
        per_group = np.bincount(units.group, minlength=len(groups))
        means = np.bincount(units.group, score, minlength=len(groups)) / np.maximum(per_group, 1)
        scores.append(np.where(per_group > 0, means, -np.inf))
        completions.append(groups.n_completions)
    cache.columns = reads
    every = np.concatenate(scores)
    # As it is written: 0.29 of 100 is 29, and a little less in binary.
    n_dropped = int(len(every) * Fraction(str(wanted.drop)))
    # Equal scores: the first ones stay.
    stays = np.ones(len(every), dtype=bool)
    stays[np.argsort(every, kind="stable")[len(every) - n_dropped :]] = False
    parts = np.split(stays, np.cumsum([len(part) for part in scores])[:-1])
    n_completions = int(np.concatenate(completions)[stays].sum())
    kept = Kept([np.flatnonzero(part) for part in parts], n_completions)
    return Filtered(kept, n_dropped, float(every[stays].max(initial=-np.inf)))
