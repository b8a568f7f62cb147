"""
What a policy says of held-out pairs, one by one: intervals of its metrics, subsets, length, and which pairs lose
likelihood on both sides. A group of several pairs counts once, as it does in the metrics.

Dimension key:  U pairs   G groups
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt
from numpy.typing import NDArray

from fpo.evaluation.correlation import pearson, spearman
from fpo.evaluation.estimates import Mean, clustered_mean
from fpo.evaluation.pairs import prompt_digests
from fpo.objectives import UnitKind
from fpo.stage2_align.displacement import GRAM, Ches, ches, holds_gram
from fpo.stage2_align.measure import Measurement
from fpo.stage2_align.stream import Batch
from fpo.stage2_align.units import units_of
from fpo.store import Cache

WORST = 20
"""Pairs that are named."""

F64 = NDArray[np.float64]


class Pairs(NamedTuple):
    """Of each pair, in the order of their groups' ids."""

    group: UInt[np.ndarray, " U"]
    """Row in the dataset."""
    prompt: UInt[np.ndarray, " U"]
    """A digest."""
    share: Float[np.ndarray, " U"]
    """What part of its group it is."""
    tokens: Int[np.ndarray, "U 2"]
    loss: Float[np.ndarray, " U"]
    rewards: Float[np.ndarray, "U 2"]
    logratios: Float[np.ndarray, "U 2"]
    """Policy minus reference, nats per completion."""
    ches: Ches | None
    """None where the cache has no hidden gram."""

    @property
    def margin(self) -> Float[np.ndarray, " U"]:
        return np.asarray(self.rewards[:, 0] - self.rewards[:, 1])

    @property
    def right(self) -> Bool[np.ndarray, " U"]:
        """Whether chosen has the larger reward."""
        return np.asarray(self.margin > 0)

    @property
    def both_fall(self) -> Bool[np.ndarray, " U"]:
        """Whether both completions are less likely than they are to the reference."""
        return np.asarray((self.logratios < 0).all(1))

    def mean(self, values: Shaped[np.ndarray, " U"], among: Bool[np.ndarray, " U"] | None = None) -> Mean:
        """Over the groups, with the interval that holds where groups share a prompt; `among` some of the pairs."""
        rows = np.arange(len(values)) if among is None else np.flatnonzero(among)
        groups, place, first = _places(self.group[rows])
        share = np.bincount(place, self.share[rows], minlength=groups)
        of_groups = np.bincount(place, self.share[rows] * values[rows].astype(np.float64), minlength=groups) / share
        return clustered_mean(of_groups, self.prompt[rows][first])


@dataclass
class PairNotes:
    """Collects what was measured, batch by batch."""

    cache: Cache
    kind: UnitKind
    """How the objective makes pairs of groups."""
    noted: list[tuple[NDArray[Any], ...]] = field(default_factory=list)

    def note(self, measurement: Measurement, batch: Batch) -> None:
        """What was measured of a batch."""
        evidence, value = measurement.evidence, measurement.value
        parts = (batch["group_id"], batch["share"], value.losses, value.rewards, _logratios(evidence))
        self.noted.append(tuple(part.detach().cpu().numpy() for part in parts))

    def pairs(self) -> Pairs:
        """All of them, with what the cache says of their prompts and lengths."""
        group, share, loss, rewards, logratios = (np.concatenate(parts) for parts in zip(*self.noted, strict=True))
        # Of one group, pairs stand in one order here and there.
        order = np.argsort(group, kind="stable")
        known = _of_cache(self.cache, self.kind)
        assert np.array_equal(group[order].astype(np.uint64), known.group)
        return Pairs(
            known.group,
            known.prompt,
            share[order].astype(np.float64),
            known.tokens,
            loss[order].astype(np.float64),
            rewards[order].astype(np.float64),
            logratios[order].astype(np.float64),
            known.ches,
        )


class _Known(NamedTuple):
    """What a cache says of its pairs, in the order of their groups' ids."""

    group: UInt[np.ndarray, " U"]
    prompt: UInt[np.ndarray, " U"]
    tokens: Int[np.ndarray, "U 2"]
    ches: Ches | None


def _of_cache(cache: Cache, kind: UnitKind) -> _Known:
    reads, gram = cache.columns, holds_gram(cache)
    cache.read_columns([GRAM] if gram else [])
    cache.prefetch(range(len(cache.shard_groups)))
    parts, scores = [], []
    for sid in range(len(cache.shard_groups)):
        groups = cache.shard(sid)
        units = units_of(groups, kind)
        parts.append(
            (groups.group_id[units.group], prompt_digests(groups)[units.group], groups.counted[units.completions])
        )
        if gram:
            scores.append(ches(groups, units))
    cache.columns = reads
    group, prompt, tokens = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(group, kind="stable")
    found = Ches(*(np.concatenate(arrays)[order] for arrays in zip(*scores, strict=True))) if gram else None
    return _Known(group[order], prompt[order], tokens[order], found)


def _logratios(evidence: Any) -> Any:
    return evidence.policy.logps - evidence.reference.logps


def report(pairs: Pairs, subsets: list[str] | None = None) -> dict[str, Any]:
    """
    What there is to say of them, in JSON types.

    subsets  of every row of the dataset, by number, what it belongs to
    """
    said = {
        "pairs": len(pairs.group),
        "prompts": len(np.unique(pairs.prompt)),
        "intervals": {
            "eval_loss": pairs.mean(pairs.loss)._asdict(),
            "eval_rewards/accuracies": pairs.mean(pairs.right).clipped(0, 1)._asdict(),
            "eval_rewards/margins": pairs.mean(pairs.margin)._asdict(),
            "eval_rewards/chosen": pairs.mean(pairs.rewards[:, 0])._asdict(),
            "eval_rewards/rejected": pairs.mean(pairs.rewards[:, 1])._asdict(),
        },
        "length": _length(pairs),
        "displacement": _displacement(pairs),
    }
    if len(np.unique(pairs.group)) < len(pairs.group):
        said["all_right"] = _all_right(pairs, np.ones(len(pairs.group), dtype=bool))._asdict()
    if subsets is not None:
        said["subsets"] = _by_subset(pairs, np.array(subsets)[pairs.group.astype(np.int64)])
    found: dict[str, Any] = finite(said)
    return found


def _length(pairs: Pairs) -> dict[str, Any]:
    """How far the reward is one of length; within prompts alone nothing is known, so `n` counts those."""
    longer = (pairs.tokens[:, 0] - pairs.tokens[:, 1]).astype(np.float64)
    n = len(np.unique(pairs.prompt))
    parts = {"chosen_shorter": longer < 0, "as_long": longer == 0, "chosen_longer": longer > 0}
    return {
        "margin_against_length": pearson(pairs.margin, longer, n)._asdict(),
        "by_rank": spearman(pairs.margin, longer, n)._asdict(),
        **{name: _part(pairs, part) for name, part in parts.items()},
    }


def _displacement(pairs: Pairs) -> dict[str, Any]:
    """Which pairs lose likelihood on both sides, and how well CHES tells how much chosen loses."""
    both, (chosen, rejected) = pairs.both_fall, pairs.logratios.T
    worst = np.argsort(chosen, kind="stable")[:WORST]
    said: dict[str, Any] = {
        "chosen_falls": pairs.mean(chosen < 0).clipped(0, 1)._asdict(),
        "both_fall": pairs.mean(both).clipped(0, 1)._asdict(),
        "chosen": pairs.mean(chosen)._asdict(),
        "rejected": pairs.mean(rejected)._asdict(),
        "chosen_where_both_fall": pairs.mean(chosen, both)._asdict(),
        "rejected_where_both_fall": pairs.mean(rejected, both)._asdict(),
        "worst": [
            {"row": int(pairs.group[pair]), "chosen": float(chosen[pair]), "rejected": float(rejected[pair])}
            for pair in worst[chosen[worst] < 0]
        ],
    }
    if pairs.ches is not None:
        n = len(np.unique(pairs.prompt))
        per_token = chosen / np.maximum(pairs.tokens[:, 0], 1)
        said["ches"] = spearman(pairs.ches.raw, chosen, n)._asdict()
        said["length_normalised_ches"] = spearman(pairs.ches.normalised, per_token, n)._asdict()
    return said


def _by_subset(pairs: Pairs, subset: NDArray[np.str_]) -> list[dict[str, Any]]:
    several = len(np.unique(pairs.group)) < len(pairs.group)
    return [
        {
            "subset": str(name),
            **_part(pairs, subset == name),
            **({"all_right": _all_right(pairs, subset == name)._asdict()} if several else {}),
        }
        for name in np.unique(subset)
    ]


def _part(pairs: Pairs, part: Bool[np.ndarray, " U"]) -> dict[str, Any]:
    """Accuracy on some of the pairs, and how many groups they are of."""
    return {
        "n": len(np.unique(pairs.group[part])),
        "accuracy": pairs.mean(pairs.right, part).clipped(0, 1)._asdict(),
    }


def _all_right(pairs: Pairs, part: Bool[np.ndarray, " U"]) -> Mean:
    """Share of groups of which every pair is ordered rightly: RewardBench 2's accuracy, where chosen beats all."""
    groups, place, first = _places(pairs.group[part])
    wrong = np.bincount(place, ~pairs.right[part], minlength=groups)
    return clustered_mean((wrong == 0).astype(np.float64), pairs.prompt[part][first]).clipped(0, 1)


def _places(group: UInt[np.ndarray, " U"]) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """How many groups, of each pair which, and of each group its first pair."""
    _, first, place = np.unique(group, return_index=True, return_inverse=True)
    return len(first), place, first


def finite(value: Any) -> Any:
    """JSON knows no NaN: what cannot be told is null."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
