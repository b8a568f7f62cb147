"""The study's statistics, choices and page, on numbers made by hand; its runs: test_demo_study_whole.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpo.demo.study.page import filled, said
from fpo.demo.study.plan import ABLATIONS, METHODS, SEEDS, Place
from fpo.demo.study.run import ablations, chosen, field_trials, methods, rate_trials
from fpo.demo.study.summary import WHOLE, against, effect_interval, interval, items
from fpo.demo.study.work import distinct, effect
from fpo.recipe import dump_recipe

PLACE = Place(Path("world"), Path("study"))
CHOICES = {method.name: {"objective": next(method.settings()), "rate": 1e-4} for method in METHODS}


def result(method: str, effect: float, **more: Any) -> dict[str, Any]:
    return {"method": method, "margin_effect": effect, "objective": {"name": method}, "rate": 1e-4, **more}


def test_an_interval_adds_what_trainings_and_what_stories_differ_by():
    """
    Ten trainings of means 0, 1, ..., 9 that all stories share: sd 3.0277, t 2.2622 of 9 degrees of freedom, so
    2.2622 * 3.0277 / sqrt(10) = 2.1659, and stories add nothing. Turned round, stories differ and trainings do not.
    """
    seeds = np.repeat(np.arange(10.0)[:, None], 4, axis=1)
    for values in (seeds, seeds.T):
        found = interval(values)
        assert found.value == 4.5
        assert found.high - found.value == pytest.approx(2.1659, rel=1e-3)
    both = seeds + np.repeat(np.arange(4.0)[None], 10, axis=0)
    # Stories 0, 1, 2, 3: sd 1.2910, t 3.1824 of 3 degrees of freedom, 3.1824 * 1.2910 / 2 = 2.0543.
    reach = math.hypot(2.1659, 2.0543)
    assert interval(both).high - interval(both).value == pytest.approx(reach, rel=0.01)


def test_of_one_training_and_one_number_there_is_no_interval():
    assert all(map(math.isnan, interval(np.array([[3.0]]))[1:]))
    assert interval(np.array([[1.0, 3.0]])).high > 3.0, "of one training, stories alone"


def test_an_interval_of_few_seeds_is_students():
    """Of 2, 3 and 5 trainings: 12.706, 4.303 and 2.776 standard errors."""
    for n, t in ((2, 12.706), (3, 4.303), (5, 2.776)):
        values = np.arange(float(n))[:, None]
        assert interval(values).high - values.mean() == pytest.approx(t * values.std(ddof=1) / math.sqrt(n))


def test_accuracy_counts_a_tie_as_half():
    """Margins 1, -2, 0 and 3: (1 + 0 + 0.5 + 1) / 4."""
    assert items([{"margins": [1.0, -2.0, 0.0, 3.0]}], "accuracy").mean() == pytest.approx(2.5 / 4)


def test_effect_is_a_mean_in_units_of_its_spread():
    """Of 1, 2, 3: mean 2, standard deviation 1."""
    assert effect(np.array([1.0, 2.0, 3.0])) == pytest.approx(2.0)
    assert effect(np.array([0.0, 0.0])) == 0.0


def test_an_effect_has_an_interval_that_shrinks_with_the_pairs():
    """Effect 1 of 150 pairs: 1.96 sqrt(1.5 / 150) = 0.196."""
    assert effect_interval(1.0, 150) == pytest.approx((1.0, 0.804, 1.196))


def test_distinct_counts_different_runs_of_words():
    """a b c, b c a | a b c: two of three are different."""
    assert distinct(["a b c a", "a b c"], 3) == pytest.approx(2 / 3)


def test_differences_are_taken_seed_by_seed_and_story_by_story():
    """Seeds 0 and 1 of both: 0.5 - 0.25 and 0.75 - 0.5, everywhere 0.25, by no chance. Seed 2 is alone."""
    whole = dict.fromkeys(WHOLE, 1.0)

    def trained(seed: int, gold: float) -> dict[str, Any]:
        return {"seed": seed, "gold": [gold, gold + 0.5], "kl": [1.0, 2.0], "margins": [1.0, -1.0], **whole}

    base = [trained(0, 0.25), trained(1, 0.5)]
    found = {method.name: [] for method in METHODS} | {
        "fpo": base,
        "dpo": [trained(1, 0.75), trained(0, 0.5), trained(2, 9.0)],
    }
    (difference,) = against(METHODS, found, base)
    assert difference["label"] == "DPO"
    assert difference["seeds"] == [0, 1]
    assert difference["gold"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert difference["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_tuning_goes_by_held_out_pairs_whatever_the_gold_reward_is():
    tried = [result("dpo", 0.4, gold=[1.0], beta=1), result("dpo", 0.5, gold=[-1.0]), result("fpo", 0.1, gold=[0.0])]
    tried[1]["rate"] = 3e-5
    found = chosen(tried)
    assert found["dpo"]["rate"] == 3e-5
    assert chosen([{**one, "gold": [-one["gold"][0]]} for one in tried]) == found
    assert chosen([{name: one[name] for name in one if name != "gold"} for one in tried]) == found


def test_every_method_has_the_same_budget():
    tried = [*field_trials(PLACE), *rate_trials(PLACE, CHOICES)]
    counts = {method.name: sum(work.facts["method"] == method.name for work in tried) for method in METHODS}
    assert set(counts.values()) == {6}
    final = list(methods(PLACE, CHOICES))
    assert len(final) == len(METHODS) * len(SEEDS)


def test_no_two_trainings_share_a_folder_and_none_is_done_twice():
    works = [*field_trials(PLACE), *rate_trials(PLACE, CHOICES), *methods(PLACE, CHOICES)]
    works += ablations(PLACE, CHOICES["fpo"])
    recipes = {work.folder: dump_recipe(work.recipe) for work in works}
    assert all(recipes[work.folder] == dump_recipe(work.recipe) for work in works)
    assert len(set(recipes.values())) == len(recipes)


def test_an_ablation_keeps_what_it_does_not_change():
    fpo = {"objective": {"name": "fpo", "k": 32, "beta": 50.0, "alpha": 20.0}, "rate": 3e-5}
    found = {work.facts["ablation"]: work.recipe for work in ablations(PLACE, fpo) if work.facts["seed"] == 0}
    assert set(found) == {ablation.name for ablation in ABLATIONS}
    for name, recipe in found.items():
        assert recipe.training["learning_rate"] == 3e-5
        assert recipe.objective.model_dump()["beta"] == {"beta-100": 100.0, "beta-200": 200.0}.get(name, 50.0)
    assert found["alpha-20"].objective.model_dump() == {**found["alpha-200"].objective.model_dump(), "alpha": 20.0}


def test_a_number_is_told_with_its_interval():
    mean = {"value": -0.125, "low": -0.225, "high": -0.025}
    assert said(mean, "+.2f") == "\N{MINUS SIGN}0.12 ± 0.10"
    assert said({"value": 0.5, "low": None, "high": None}, ".1%") == "50.0%"


def test_the_page_keeps_what_people_wrote():
    text = "mine\n<!-- table a -->\nold\nolder\n<!-- end -->\nalso mine\n<!-- table b -->\n<!-- end -->\n"
    new = filled(text, {"a": "| 1 |", "b": "| 2 |"})
    assert new == "mine\n<!-- table a -->\n| 1 |\n<!-- end -->\nalso mine\n<!-- table b -->\n| 2 |\n<!-- end -->\n"
    assert filled(new, {"a": "| 1 |", "b": "| 2 |"}) == new
    with pytest.raises(KeyError):
        filled("<!-- table c -->\n<!-- end -->", {})
