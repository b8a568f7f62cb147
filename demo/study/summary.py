"""
What the study's runs say together: means with 95 % intervals, and differences of methods on the same seeds, stories
and pairs. Reads the run folders as they are, so a study that is under way can be looked at.

Dimension key:  S seeds   N stories or pairs, the same for every policy
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fpo.demo.study.plan import ABLATIONS, METHODS, SEEDS, Ablation, Choice, Method, Place
from fpo.demo.study.run import ablations, at_one_rate, field_trials, methods, rate_trials
from fpo.demo.study.work import Result, Work
from fpo.errors import RunError
from fpo.evaluation.drift_report import FEATURES_FILE
from fpo.evaluation.estimates import Mean
from fpo.evaluation.held_out import finite
from fpo.evaluation.significance import t_quantile

ITEMS = {"gold": "gold", "kl": "kl", "accuracy": "margins"}
"""Measures that are means over stories or pairs, by where their values stand."""
WHOLE = ("reward_accuracy", "distinct_3", "entropy", "entropy_of_data", "both_fall", "chosen", "rejected", "tokens")
"""Measures of a policy as a whole."""

FEW = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Student's t at 97.5 % by degrees of freedom, where `t_quantile` is rough."""
SPOKEN_OF = ("gold", "distinct_3", "entropy", "tokens")
"""Measures of the reference."""

Measured = dict[str, Any]


def summary(place: Place) -> dict[str, Any]:
    """Everything that is told of the study, in JSON types. RunError where nothing is tuned yet."""
    if not place.chosen.is_file():
        raise RunError(f"{place.root}: no study that has been tuned here; run it with: python -m fpo.demo.study")
    best: dict[str, Choice] = json.loads(place.chosen.read_text(encoding="utf-8"))
    reference: Result = json.loads(place.reference.read_text(encoding="utf-8"))
    planned = list(ablations(place, best["fpo"]))
    tried = _done([*field_trials(place), *rate_trials(place, best)])
    final, changed = _done(methods(place, best)), _done(planned)
    tuned, level = _by_method(final), _by_method(_done(at_one_rate(place, best)))
    of_ablations = {of.name: [one for one in changed if one["ablation"] == of.name] for of in ABLATIONS}
    every = {one["folder"]: one["seconds"] for one in (*tried, *_done(at_one_rate(place, best)), *final, *changed)}
    return {
        "reference": measured([reference], SPOKEN_OF),
        "runs": {
            "done": len(every),
            "seconds": sum(every.values()),
            "methods": len(final),
            "one_rate": sum(map(len, level.values())),
            "ablations": len(changed),
        },
        "planned": {"methods": len(METHODS) * len(SEEDS), "ablations": len(planned)},
        "chosen": best,
        "tried": [point(one) for one in tried],
        "methods": told(METHODS, tuned),
        "against_fpo": against(METHODS, tuned, tuned["fpo"]),
        "one_rate": told(METHODS, level),
        "one_rate_against_fpo": against(METHODS, level, level["fpo"]),
        "ablations": told(ABLATIONS, of_ablations),
        "against_base": [
            found | {"base": of.base}
            for of in ABLATIONS
            for found in against([of], of_ablations, of_ablations.get(of.base, []))
        ],
        "features": [features(method, level[method.name]) for method in METHODS],
    }


def _by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    return {method.name: [one for one in results if one["method"] == method.name] for method in METHODS}


def _done(works: Iterable[Work]) -> list[Result]:
    """The results that are there, each with the folder that it is from."""
    return [work.read() | {"folder": str(work.folder)} for work in works if work.is_done]


def point(result: Result) -> Measured:
    """One policy alone: intervals are over stories and pairs."""
    facts = {name: result[name] for name in ("method", "objective", "rate", "seed", "seconds")}
    effect = effect_interval(result["margin_effect"], len(result["margins"]))
    return facts | {"effect": effect._asdict()} | measured([result], tuple(ITEMS))


def effect_interval(effect: float, n: int) -> Mean:
    """
    Of a mean in units of its spread over n pairs: se^2 = (1 + effect^2 / 2) / n, Hedges and Olkin 1985, "Statistical
    Methods for Meta-Analysis".
    """
    reach = 1.96 * ((1 + effect**2 / 2) / n) ** 0.5
    return Mean(effect, effect - reach, effect + reach)


def told(kinds: Sequence[Method | Ablation], found: Mapping[str, Sequence[Result]]) -> list[Measured]:
    """Every measure of those of which there is a training."""
    return [_told(of, found[of.name]) for of in kinds if found[of.name]]


def _told(of: Method | Ablation, results: Sequence[Result]) -> Measured:
    first = results[0]
    facts = {"name": of.name, "label": of.label, "seeds": [one["seed"] for one in results]}
    return facts | {"objective": first["objective"], "rate": first["rate"]} | measured(results, (*ITEMS, *WHOLE))


def measured(results: Sequence[Result], names: Sequence[str]) -> Measured:
    """Measures of one method over its seeds."""
    return {name: _mean(items(results, name)) for name in names}


def items(results: Sequence[Result], name: str) -> Float[np.ndarray, "S N"]:
    """What was measured story by story or pair by pair; of a policy as a whole there is one item."""
    if name in WHOLE:
        return np.array([[one[name]] for one in results], dtype=np.float64)
    values = np.array([one[ITEMS[name]] for one in results], dtype=np.float64)
    # A pair of which nothing is known counts as half right.
    return (np.sign(values) + 1) / 2 if name == "accuracy" else values


def _mean(values: Float[np.ndarray, "S N"]) -> Measured:
    found: dict[str, Any] = finite(interval(values)._asdict())
    return found


def interval(values: Float[np.ndarray, "S N"]) -> Mean:
    """
    The mean over S trainings and N items that all of them were measured on, both drawn by chance:

        reach^2 = (t_{S-1})^2 var(means of trainings) / S + (t_{N-1})^2 var(means of items) / N

    A crossed design's two sources of error, each with its own Student's t; that of trainings holds some of the items'
    already, so the interval is rather too wide. What there is one of, training or item, adds nothing; of one of both
    there is no interval.
    """
    mean = float(values.mean())
    if values.size == 1:
        return Mean(mean, np.nan, np.nan)
    reach_2 = sum(_reach(values.mean(axis)) ** 2 for axis in (0, 1))
    reach = float(np.sqrt(reach_2))
    return Mean(mean, mean - reach, mean + reach)


def _reach(means: Float[np.ndarray, " N"]) -> float:
    n = len(means)
    return 0.0 if n == 1 else FEW.get(n - 1, t_quantile(n - 1)) * float(means.std(ddof=1)) / n**0.5


def against(
    kinds: Sequence[Method | Ablation], found: Mapping[str, Sequence[Result]], base: Sequence[Result]
) -> list[Measured]:
    """Differences of every other to `base`, seed by seed and item by item, where they have two seeds in common."""
    ours = {one["seed"]: one for one in base}
    compared = []
    for of in kinds:
        theirs = {one["seed"]: one for one in found[of.name]}
        seeds = sorted(theirs.keys() & ours.keys())
        if found[of.name] is base or len(seeds) < 2:
            continue
        sides = [theirs[seed] for seed in seeds], [ours[seed] for seed in seeds]
        apart = {name: _mean(np.subtract(*(items(side, name) for side in sides))) for name in (*ITEMS, *WHOLE)}
        compared.append({"name": of.name, "label": of.label, "seeds": seeds} | apart)
    return compared


def features(method: Method, results: Sequence[Result]) -> Measured:
    """How well the gap in the training pairs told the drift, of the runs where both were measured."""
    files = [Path(one["folder"]) / FEATURES_FILE for one in results]
    found = [json.loads(file.read_text(encoding="utf-8"))["hookpoints"][0] for file in files if file.is_file()]
    told: Measured = {"name": method.name, "label": method.label, "runs": len(found)}
    if found:
        for side in ("chosen", "rejected", "speech"):
            ranks = [one["gap_against"][side]["rank_correlation"] for one in found]
            over_seeds = _mean(np.array([[rank["value"]] for rank in ranks], dtype=np.float64))
            # Of one run the interval is over features.
            told[side] = over_seeds if len(ranks) > 1 else ranks[0]
    return told
