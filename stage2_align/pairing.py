"""
How groups become the pairs that an objective compares, and what each pair counts.

Dimension key:  G groups   K completions, group by group, best first   P pairs
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fpo.objectives import Pairing
from fpo.store import Groups


class Pairs(NamedTuple):
    """P pairs of completions, group by group."""

    completions: np.ndarray
    """(P, 2) which ones, chosen and rejected."""
    group: np.ndarray
    """(P,) the group that a pair is of."""

    def shares(self, n_groups: int) -> np.ndarray:
        """(P,) what a pair counts so that its group counts once: one over the group's pairs."""
        per_group = np.maximum(np.bincount(self.group, minlength=n_groups), 1)
        return np.asarray(1 / per_group[self.group], dtype=np.float32)


def pairs_of(groups: Groups, pairing: Pairing) -> Pairs:
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
    return Pairs(completions[order], group[order])


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
