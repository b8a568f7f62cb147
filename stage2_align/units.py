"""
How groups become what an objective gives a loss for, and what each of these units counts.

Dimension key:  G groups   K completions, group by group, best first   U units   n completions of a unit
                T tokens of the units' completions that count
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fpo.objectives import Pairing, UnitKind
from fpo.store import Column, Features, Groups, Mismatched
from fpo.store.format.ragged import gather, lengths_of, starts_of


class Units(NamedTuple):
    """Units, group by group."""

    completions: np.ndarray
    """(U, n) which ones: chosen and rejected, one alone, or a group's, best first and padded with the first."""
    group: np.ndarray
    """(U,) the group that a unit is of."""
    present: np.ndarray
    """(U, n) which places hold a completion; all but those of groups."""

    def shares(self, n_groups: int) -> np.ndarray:
        """(U,) what a unit counts so that its group counts once: one over the group's units."""
        per_group = np.maximum(np.bincount(self.group, minlength=n_groups), 1)
        return np.asarray(1 / per_group[self.group], dtype=np.float32)


class UnitTokens(NamedTuple):
    """The tokens of units that count, unit by unit and completion by completion."""

    rows: np.ndarray
    """(T,) which of the groups' tokens that count."""
    side: np.ndarray
    """(T,) unit * n + place of the completion."""
    place: np.ndarray
    """(T,) place among its completion's tokens that count."""


def units_of(groups: Groups, kind: UnitKind) -> Units:
    """The units of these groups."""
    if kind == "completions":
        completions = np.arange(len(groups.completion_digest))[:, None]
        return Units(completions, _owners(groups), np.ones_like(completions, dtype=bool))
    if kind == "groups":
        places = np.arange(int(groups.n_completions.max(initial=1)))
        present = places < groups.n_completions[:, None]
        starts = groups.completion_starts[:-1, None]
        return Units(np.where(present, starts + places, starts), np.arange(len(groups)), present)
    return _pairs_of(groups, kind)


def desirable(groups: Groups) -> np.ndarray:
    """
    (K,) whether the data prefers a completion: one alone by its label, of two the chosen one, of more those of the best
    score.
    """
    n = groups.n_completions[_owners(groups)]
    best = np.zeros(len(n), dtype=bool)
    best[groups.completion_starts[:-1]] = True
    top = np.repeat(groups.score[groups.completion_starts[:-1]], groups.n_completions)
    return np.select([n == 1, n == 2], [groups.score == 1, best], best | (groups.score == top))


def unit_tokens(groups: Groups, units: Units) -> UnitTokens:
    """The tokens of these units' completions one by one."""
    counted = starts_of(groups.counted)
    rows, splits = gather(counted, units.completions.reshape(-1))
    lengths = lengths_of(splits)
    side = np.repeat(np.arange(len(lengths)), lengths)
    return UnitTokens(rows, side, np.arange(len(rows)) - splits.astype(np.int64)[side])


def draws(groups: Groups, units: Units, n_tokens: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Uniform numbers in [0, 1), (U,) one per unit and (T,) one per token. They depend on the run's seed, the epoch and
    the group's id alone: not on how groups are cut into forwards or onto processes, nor on when a run was resumed.

    n_tokens  (U,) tokens of each unit
    """
    per_group = np.bincount(units.group, 1 + n_tokens, minlength=len(groups)).astype(np.int64)
    found = np.concatenate(
        [np.empty(0)]
        + [
            # The raw stream of PCG64 is the same with every version of numpy; 53 bits of it fill a float64.
            (np.random.PCG64(np.random.SeedSequence([seed, epoch, int(group)])).random_raw(int(n)) >> 11) * 2.0**-53
            for group, n in zip(groups.group_id, per_group, strict=True)
        ]
    ).astype(np.float32)
    # float32 may round up to 1.
    found = np.minimum(found, np.nextafter(np.float32(1), np.float32(0)))
    heads = starts_of(1 + n_tokens)[:-1]
    return found[heads], np.delete(found, heads)


def with_mismatched(groups: Groups, column: Mismatched) -> Groups:
    """
    The groups with their mismatched completion behind their own, to be forwarded with them. It belongs to no unit; what
    is known of it is `ref_logps`.
    """
    ends = groups.completion_starts[1:]
    segments = ends + np.arange(1, len(groups) + 1)
    sizes = column.lengths
    # The first token behind an empty prompt is not scored.
    begun = np.arange(sizes.sum()) > np.repeat(starts_of(sizes)[:-1], sizes)
    scored = begun | (np.repeat(groups.lengths[0], sizes) > 0)
    places = np.repeat(groups.scored_splits[ends], sizes)[scored]
    mask, counts = groups.score_mask, column.score_mask[scored]
    if mask is not None or not counts.all():
        own = np.ones(len(groups.token_logps), np.uint8) if mask is None else mask
        mask = np.insert(own, places, counts)
    tokens = np.repeat(groups.splits[segments].astype(np.int64), sizes)
    return replace(
        groups,
        n_completions=groups.n_completions + np.uint32(1),
        completion_digest=np.insert(groups.completion_digest, ends, 0, axis=0),
        input_ids=np.insert(groups.input_ids, tokens, column.input_ids),
        splits=starts_of(np.insert(lengths_of(groups.splits), segments, sizes)).astype(np.uint64),
        score=np.insert(groups.score, ends, np.float32(np.nan)),
        ref_logps=np.insert(groups.ref_logps, ends, column.ref_logps),
        token_logps=np.insert(groups.token_logps, places, np.float32(0)),
        score_mask=mask,
        columns=tuple(_with_empty_rows(own, ends) for own in groups.columns if own is not column),
    )


def _with_empty_rows(column: Column, places: np.ndarray) -> Column:
    """A column of completions with a row of nothing before each of these."""
    assert isinstance(column, Features)
    nothing = Features(
        splits=np.zeros(2, np.uint64),
        indices=column.indices[:0],
        acts=column.acts[:0],
        active=np.zeros(1, np.uint32),
        tail_sq=np.zeros(1, np.float32),
    )
    rows = np.insert(np.arange(len(column)), places, len(column))
    return Features.concat([column, nothing]).take(rows)


def _owners(groups: Groups) -> np.ndarray:
    """(K,) the group of each completion."""
    return np.repeat(np.arange(len(groups)), groups.n_completions)


def _pairs_of(groups: Groups, pairing: Pairing) -> Units:
    """
    The pairs of these groups. A group of two is one pair, whatever its scores; of a longer one, completions of equal
    score make none, since neither is preferred.
    """
    n = groups.n_completions.astype(np.int64)
    starts, found, owners = groups.completion_starts, [], []
    for size in np.unique(n).tolist():
        rows = np.flatnonzero(n == size)
        places = _places(size, pairing)
        found.append((starts[rows][:, None, None] + places[None]).reshape(-1, 2))
        owners.append(np.repeat(rows, len(places)))
    completions = np.concatenate([np.empty((0, 2), np.int64), *found])
    group = np.concatenate([np.empty(0, np.int64), *owners])
    chosen, rejected = groups.score[completions].T
    kept = np.flatnonzero((n[group] == 2) | (chosen != rejected))
    order = kept[np.argsort(group[kept], kind="stable")]
    return Units(completions[order], group[order], np.ones((len(order), 2), dtype=bool))


def _places(n: int, pairing: Pairing) -> np.ndarray:
    """(pairs, 2) places of chosen and rejected in a group of n completions."""
    match pairing:
        case "best_rest":
            pairs = [(0, other) for other in range(1, n)]
        case "best_worst":
            pairs = [(0, n - 1)] if n > 1 else []
        case "adjacent":
            pairs = [(place, place + 1) for place in range(n - 1)]
        case "all":
            pairs = [(better, worse) for better in range(n) for worse in range(better + 1, n)]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
