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
from fpo.demo.study.run import ablations, field_trials, methods, rate_trials
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

SPOKEN_OF = ("gold", "distinct_3", "entropy", "tokens")
"""Measures of the reference."""

Measured = dict[str, Any]
Curve = Float[np.ndarray, " 3"]


def summary(place: Place) -> dict[str, Any]:
    """Everything that is told of the study, in JSON types. RunError where nothing is tuned yet."""
    if not place.chosen.is_file():
        raise RunError(f"{place.root}: no study that has been tuned here; run it with: python -m fpo.demo.study")
    best: dict[str, Choice] = json.loads(place.chosen.read_text(encoding="utf-8"))
    reference: Result = json.loads(place.reference.read_text(encoding="utf-8"))
    planned = list(ablations(place, best["fpo"]))
    tried = _done([*field_trials(place), *rate_trials(place, best)])
    final, changed = _done(methods(place, best)), _done(planned)
    points = [point(one) for one in tried]
    curve = price([*points, point(reference | {"margins": [0.0]})])
    of_methods = {method.name: [one for one in final if one["method"] == method.name] for method in METHODS}
    of_ablations = {of.name: [one for one in changed if one["ablation"] == of.name] for of in ABLATIONS}
    every = {one["folder"]: one["seconds"] for one in (*tried, *final, *changed)}
    return {
        "reference": measured([reference], SPOKEN_OF),
        "runs": {"done": len(every), "seconds": sum(every.values()), "methods": len(final), "ablations": len(changed)},
        "planned": {"methods": len(METHODS) * len(SEEDS), "ablations": len(planned)},
        "chosen": best,
        "tried": points,
        "price": curve.tolist(),
        "methods": [_told(method, of_methods[method.name], curve) for method in METHODS if of_methods[method.name]],
        "ablations": [_told(of, of_ablations[of.name], curve) for of in ABLATIONS if of_ablations[of.name]],
        "against_fpo": _against(of_methods, "fpo", curve),
        "features": [features(method, of_methods[method.name]) for method in METHODS],
    }


def _done(works: Iterable[Work]) -> list[Result]:
    """The results that are there, each with the folder that it is from."""
    return [work.read() | {"folder": str(work.folder)} for work in works if work.is_done]


def point(result: Result) -> Measured:
    """One policy alone: intervals are over stories and pairs."""
    facts = {name: result.get(name) for name in ("method", "objective", "rate", "seed", "margin_effect", "seconds")}
    return facts | {name: _mean(items([result], name)) for name in ITEMS}


def _told(of: Method | Ablation, results: Sequence[Result], curve: Curve) -> Measured:
    first = results[0]
    facts = {"name": of.name, "label": of.label, "seeds": [one["seed"] for one in results]}
    facts |= {"objective": first["objective"], "rate": first["rate"]}
    return facts | measured(results, (*ITEMS, *WHOLE)) | {"above_price": _mean(above(results, curve))}


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
    return 0.0 if n == 1 else t_quantile(n - 1) * float(means.std(ddof=1)) / n**0.5


def _against(found: Mapping[str, list[Result]], base: str, curve: Curve) -> list[Measured]:
    """Of every other method its difference to `base`, seed by seed and item by item."""
    compared = []
    for method in METHODS:
        theirs, ours = ({one["seed"]: one for one in found[name]} for name in (method.name, base))
        seeds = sorted(theirs.keys() & ours.keys())
        if method.name == base or len(seeds) < 2:
            continue
        sides = [theirs[seed] for seed in seeds], [ours[seed] for seed in seeds]
        apart = {name: np.subtract(*(items(side, name) for side in sides)) for name in (*ITEMS, *WHOLE)}
        apart["above_price"] = np.subtract(*(above(side, curve) for side in sides))
        facts = {"name": method.name, "label": method.label, "seeds": seeds}
        compared.append(facts | {name: _mean(values) for name, values in apart.items()})
    return compared


def price(points: Sequence[Measured]) -> Curve:
    """
    What a KL buys whoever pays it: gold = a + b d + c d^2 with d = sqrt(KL), by least squares over policies. The form
    is that of Gao et al. 2023, https://arxiv.org/abs/2210.10760, for best of n.
    """
    d = np.sqrt([max(one["kl"]["value"], 0.0) for one in points])
    gold = np.array([one["gold"]["value"] for one in points])
    return np.asarray(np.linalg.lstsq(np.stack([np.ones_like(d), d, d**2], 1), gold)[0])


def above(results: Sequence[Result], curve: Curve) -> Float[np.ndarray, "S N"]:
    """Gold reward of every story beyond what the policy's KL buys; the curve counts as known."""
    d = np.sqrt(np.maximum(items(results, "kl").mean(1, keepdims=True), 0.0))
    return np.asarray(items(results, "gold") - (curve[0] + curve[1] * d + curve[2] * d**2))


def features(method: Method, results: Sequence[Result]) -> Measured:
    """How well the gap in the training pairs told the drift, of the runs where both were measured."""
    files = [Path(one["folder"]) / FEATURES_FILE for one in results]
    found = [json.loads(file.read_text(encoding="utf-8"))["hookpoints"][0] for file in files if file.is_file()]
    told: Measured = {"name": method.name, "label": method.label, "runs": len(found)}
    if found:
        for side in ("chosen", "rejected", "speech"):
            ranks = [[one["gap_against"][side]["rank_correlation"]["value"]] for one in found]
            told[side] = _mean(np.array(ranks, dtype=np.float64))
    return told
