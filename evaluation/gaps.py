"""
The gap of every feature: what chosen completions have of it that rejected ones have not, how sure that is, and what of
it remains where both are as long. One pass over the features of a cache, of which sums stay: nothing here is as large
as pairs x features.

With weights w of the pairs that add up to 1, gaps g of a feature and length gaps x:

    gap        D = sum w g
    effect     d = D / sd, sd^2 = sum w (g - D)^2 n / (n - 1), n = 1 / sum w^2: Cohen's d_z of paired differences,
               Lakens 2013, https://doi.org/10.3389/fpsyg.2013.00863
    error      se^2 = C / (C - 1) sum over C prompts of ( sum over a prompt's pairs of w (g - D) )^2: cluster-robust,
               Liang and Zeger 1986, https://doi.org/10.1093/biomet/73.1.13; with a pair per prompt sd / sqrt(n)
    z          the normal deviate of D / se, of C - 1 degrees of freedom; the interval is D +- t se
    at equal length   the intercept a of the weighted least squares g = a + b x, its error clustered in the same way

a = sum h g and b = sum k g with weights that know lengths alone, so that both add up as D does:

    k = w (x - m) / s,   h = w - m k,   m = sum w x,   s = sum w (x - m)^2

Dimension key:  P pairs   C prompts   F d_sae   E entries of a shard   U features that occur in it
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from fpo.evaluation.pairs import Pairs, Progress, ShardGaps, read_gaps
from fpo.evaluation.significance import false_discovery, normal_score, t_quantile, two_sided
from fpo.store import Cache

MIN_PROMPTS = 10
"""A feature that fires for fewer prompts is not tested: it could not pass, and each test costs the others."""

HELD_ENTRIES = 2**23
"""
Entries that wait for the rest of their prompt's pairs in other shards: about 0.7 GiB at the peak. Where there are more,
the cache is read several times, each time for a part of the prompts.
"""

Sums = dict[str, NDArray[np.float64]]
F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A linear statistic of each feature's gaps."""

    value: Float[np.ndarray, " F"]
    error: Float[np.ndarray, " F"]
    """Standard error, clustered by prompt."""
    df: int
    """Degrees of freedom of the error."""

    @cached_property
    def z(self) -> Float[np.ndarray, " F"]:
        """The normal deviate of value / error; infinite where all gaps are equal and not 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(self.value == 0, 0.0, self.value / self.error)
        return np.where(np.isinf(t), t, normal_score(np.where(np.isinf(t), 0.0, t), self.df))

    @cached_property
    def reach(self) -> Float[np.ndarray, " F"]:
        """The interval is value +- reach."""
        return np.asarray(t_quantile(self.df) * self.error)


@dataclass(frozen=True, eq=False)
class Gaps:
    """What the pairs of a cache, or some of them, say of each of the SAE's F features."""

    n_pairs: int
    n_prompts: int
    gap: Estimate
    equal_length: Estimate
    """The gap of a pair whose sides are as long as each other."""
    slope: Float[np.ndarray, " F"]
    """What the gap grows by where chosen is e times as long."""
    sd: Float[np.ndarray, " F"]
    """Of the pairs' gaps."""
    halves: Float[np.ndarray, "2 F"]
    """The gap in either half of the prompts."""
    acts: Float[np.ndarray, "2 F"]
    """Mean activation of chosen and of rejected."""
    fires: Float[np.ndarray, "2 F"]
    """Share of the pairs whose chosen (rejected) completion has the feature among those kept."""
    n_fired: Int[np.ndarray, " F"]
    """Pairs of which either side has it."""
    n_prompts_fired: Int[np.ndarray, " F"]
    cut: Float[np.ndarray, " F"]
    """How far the gap may be from that of all activations, since those that a top k left out count as 0."""
    lost_share: tuple[float, float]
    """Share of the squared activations of chosen and of rejected completions that it left out, in the mean."""
    lost_any: tuple[float, float]
    """Share of them that lack anything."""

    @cached_property
    def effect(self) -> Float[np.ndarray, " F"]:
        """d; NaN where no gap differs from another."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.sd > 0, self.gap.value / self.sd, np.nan)

    @cached_property
    def tested(self) -> Bool[np.ndarray, " F"]:
        """Whether it fires often enough. Which side it fires on does not enter, so tests stay what they are."""
        return np.asarray(self.n_prompts_fired >= MIN_PROMPTS)

    @property
    def n_tests(self) -> int:
        return int(self.tested.sum())

    @cached_property
    def p(self) -> Float[np.ndarray, " F"]:
        """Two-sided; NaN where it is not tested."""
        return np.where(self.tested, two_sided(self.gap.z), np.nan)

    @cached_property
    def adjusted(self) -> Float[np.ndarray, " F"]:
        """Benjamini-Hochberg over the features that are tested."""
        return false_discovery(self.p)

    @property
    def sign_holds(self) -> Bool[np.ndarray, " F"]:
        """Whether both halves lean the same way."""
        return np.asarray(self.halves[0] * self.halves[1] > 0)

    def discoveries(self, rate: float) -> Int[np.ndarray, " n"]:
        """The features whose adjusted p is at most `rate`, the surest first."""
        found = np.flatnonzero(self.adjusted <= rate)
        return np.asarray(found[np.argsort(-np.abs(self.gap.z[found]), kind="stable")])


def feature_gaps(
    cache: Cache, column: int, d_sae: int, asked: Sequence[Pairs], scored: Progress = lambda groups: None
) -> list[Gaps]:
    """
    The gaps of all features over each of these pairs of the cache, read once for all of them.

    column  place of a column of features in `cache.columns`
    asked   `read_pairs` of the cache, and `among` some of them
    """
    sums = [_GapSums(pairs, d_sae) for pairs in asked]
    rounds, turn = 0, 0
    while turn == 0 or turn < rounds:
        waiting = None if turn == 0 else asked[0].waiting(turn, rounds)
        for shard in read_gaps(cache, column, asked[0], waiting, scored):
            rounds = rounds or _rounds(asked, shard)
            for one in sums:
                one.add(shard, turn, rounds)
        for one in sums:
            one.close()
        turn += 1
    return [one.gaps() for one in sums]


def _rounds(asked: Sequence[Pairs], shard: ShardGaps) -> int:
    """How often the cache is read, at least once, where its shards are like this one."""
    waiting = sum(int((~pairs.within_a_shard[pairs.prompt] & (pairs.weight > 0)).sum()) for pairs in asked)
    return 1 + waiting * len(shard.pair) // (max(len(shard.own), 1) * HELD_ENTRIES)


class _GapSums:
    """What is summed of the gaps of some pairs."""

    def __init__(self, pairs: Pairs, d_sae: int) -> None:
        self.pairs = pairs
        weight, x = pairs.weight, pairs.length_gap
        self.mean_x = float(weight @ x)
        spread = float(weight @ (x - self.mean_x) ** 2)
        self.slope = weight * (x - self.mean_x) / spread if spread > 0 else np.zeros_like(weight)
        self.level = weight - self.mean_x * self.slope
        self.per_prompt = [self._of_prompts(part) for part in (weight, self.level, self.level * x)]
        self.sums: Sums = defaultdict(lambda: np.zeros(d_sae))
        self.cut, self.lost, self.trimmed = np.zeros(2), np.zeros(2), np.zeros(2)
        self.held: list[tuple[NDArray[np.int64], F64]] = []

    def add(self, shard: ShardGaps, turn: int, rounds: int) -> None:
        """The shard's entries; those of prompts that wait for other shards in their turn."""
        counting = np.flatnonzero(self.pairs.weight[shard.pair] > 0)
        pair, place, gap = shard.pair[counting], shard.place[counting], shard.gap[counting]
        if turn == 0:
            self._add_plain(shard, counting)
        prompt = self.pairs.prompt[pair]
        parts = np.stack([self.pairs.weight[pair] * gap, self.level[pair] * gap])
        key = prompt << 32 | shard.features[place]
        whole = self.pairs.within_a_shard[prompt]
        if turn == 0:
            self._add_prompts(*_merged(key[whole], parts[:, whole]))
        waits = ~whole & (prompt % rounds == turn)
        if waits.any():
            self.held.append((key[waits], parts[:, waits]))

    def close(self) -> None:
        """No more entries of the prompts of this turn."""
        if self.held:
            keys = np.concatenate([keys for keys, _ in self.held])
            parts = np.concatenate([parts for _, parts in self.held], axis=1)
            self.held.clear()
            keys, parts = _merged(keys, parts)
            for start in range(0, len(keys), 2**20):
                self._add_prompts(keys[start : start + 2**20], parts[:, start : start + 2**20])

    def gaps(self) -> Gaps:
        """What the sums come to."""
        pairs, sums = self.pairs, self.sums
        of_prompts, of_levels, of_slopes = self.per_prompt
        n_prompts = int((of_prompts > 0).sum())
        D, a, b = sums["gap"], sums["level"], sums["slope"]
        spread = sums["prompt_gap_sq"] - 2 * D * sums["prompt_gap_weight"] + D**2 * (of_prompts @ of_prompts)
        # The sum over prompts of (H - a u - b v)^2, H of the gaps, u of the weights h and v of h x.
        around = sums["prompt_level_sq"] - 2 * (a * sums["prompt_level_level"] + b * sums["prompt_level_slope"])
        around += a**2 * (of_levels @ of_levels) + b**2 * (of_slopes @ of_slopes) + 2 * a * b * (of_levels @ of_slopes)
        n = 1 / float((pairs.weight**2).sum())
        variance = np.maximum(sums["gap_sq"] - D**2, 0.0) * n / max(n - 1, 1e-9)
        second = float(pairs.weight[pairs.half == 1].sum())
        halves = np.stack([(D - sums["second"]) / max(1 - second, 1e-300), sums["second"] / max(second, 1e-300)])
        missing = self.cut[:, None] - np.stack([sums["chosen_cut"], sums["rejected_cut"]])
        return Gaps(
            n_pairs=int((pairs.weight > 0).sum()),
            n_prompts=n_prompts,
            gap=_estimate(D, spread, n_prompts, 1),
            equal_length=_estimate(a, around, n_prompts, 2),
            slope=b,
            sd=np.sqrt(variance),
            halves=halves,
            acts=np.stack([sums["chosen"], sums["rejected"]]),
            fires=np.stack([sums["chosen_fires"], sums["rejected_fires"]]),
            n_fired=sums["pairs"].astype(np.int64),
            n_prompts_fired=sums["prompts"].astype(np.int64),
            cut=np.maximum(missing.max(axis=0), 0.0),
            lost_share=(float(self.lost[0]), float(self.lost[1])),
            lost_any=(float(self.trimmed[0]), float(self.trimmed[1])),
        )

    def _of_prompts(self, values: F64) -> F64:
        return _bins(self.pairs.prompt, values, self.pairs.n_prompts)

    def _add_plain(self, shard: ShardGaps, counting: NDArray[np.int64]) -> None:
        """What adds up over pairs one by one."""
        pair, place, gap = shard.pair[counting], shard.place[counting], shard.gap[counting]
        chosen, rejected = shard.chosen[counting], shard.rejected[counting]
        weight = self.pairs.weight[pair]
        cut = shard.cut[pair - shard.own[0]] * weight[:, None] if len(shard.own) else np.zeros((0, 2))
        own = self.pairs.weight[shard.own]
        self.cut += own @ shard.cut
        self.lost += own @ shard.lost
        self.trimmed += own @ (shard.lost > 0)
        values = {
            "gap": weight * gap,
            "gap_sq": weight * gap**2,
            "second": weight * gap * (self.pairs.half[pair] == 1),
            "level": self.level[pair] * gap,
            "slope": self.slope[pair] * gap,
            "chosen": weight * chosen,
            "rejected": weight * rejected,
            "chosen_fires": weight * (chosen != 0),
            "rejected_fires": weight * (rejected != 0),
            "chosen_cut": cut[:, 0] * (chosen != 0),
            "rejected_cut": cut[:, 1] * (rejected != 0),
            "pairs": np.ones(len(gap)),
        }
        self._add(shard.features, {name: _bins(place, v, len(shard.features)) for name, v in values.items()})

    def _add_prompts(self, keys: NDArray[np.int64], parts: F64) -> None:
        """What adds up over prompts: squares, and products with what a prompt weighs."""
        prompt = keys >> 32
        features, place = np.unique(keys & 0xFFFFFFFF, return_inverse=True)
        of_prompts, of_levels, of_slopes = (values[prompt] for values in self.per_prompt)
        gap, level = parts
        values = {
            "prompt_gap_sq": gap**2,
            "prompt_gap_weight": gap * of_prompts,
            "prompt_level_sq": level**2,
            "prompt_level_level": level * of_levels,
            "prompt_level_slope": level * of_slopes,
            "prompts": np.ones(len(keys)),
        }
        self._add(features, {name: _bins(place, v, len(features)) for name, v in values.items()})

    def _add(self, features: NDArray[np.int64], sums: Sums) -> None:
        for name, values in sums.items():
            self.sums[name][features] += values


def _estimate(value: F64, spread: F64, n_prompts: int, parameters: int) -> Estimate:
    """spread: sum over prompts of the squares of what they add to the value beyond what is expected of them."""
    df = max(n_prompts - parameters, 1)
    # Rounding may leave a little below 0 where all gaps are equal.
    return Estimate(value, np.sqrt(np.maximum(spread, 0.0) * n_prompts / df), df)


def _bins(places: NDArray[np.int64], values: F64, n: int) -> F64:
    return np.asarray(np.bincount(places, values, minlength=n), dtype=np.float64)


def _merged(keys: NDArray[np.int64], parts: F64) -> tuple[NDArray[np.int64], F64]:
    """Entries of one prompt and feature added up: (E,) keys, (n, E) parts."""
    order = np.argsort(keys)
    keys = keys[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.stack([np.add.reduceat(part[order], first) if len(first) else part for part in parts])
