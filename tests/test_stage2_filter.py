"""What tells displacement before training: CHES by its definition, and runs that leave the worst share out."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_pairs import MemoryCache
from run_processes import run_two_processes
from store_cases import make_groups
from store_servers import web_server
from tiny_groups import sequences
from tiny_runs import assert_same_weights, cut
from tiny_world import TinyWorld, add_conversations, build_tiny_world
from transformers import AutoModelForCausalLM

from fpo.errors import CacheMissing, RecipeError, RunError
from fpo.recipe import Filter, Recipe, load_variants
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.displacement import GRAM, Ches, ches, without_worst
from fpo.stage2_align.measure import Measurement, ObjectiveMeter
from fpo.stage2_align.run import METRICS_FILE
from fpo.stage2_align.sweep import align_in_turn
from fpo.stage2_align.units import units_of
from fpo.store import Cache, Groups, HiddenGram

policies = importlib.import_module("fpo.stage2_align.policy")

GROUPS = 36
DPO: dict[str, Any] = {"features": [], "objective": {"name": "dpo", "beta": 0.5}}
# A group is a shard, so that a filter leaves nothing of most of them, and of whole blocks of eight.
ONE_EACH = {"hidden_gram": True, "shard_pairs": 1}
TRAINING = {"learning_rate": 1e-3, "num_train_epochs": 2, "save_steps": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = build_tiny_world(tmp_path_factory.mktemp("world"), GROUPS, 7)
    build_caches(recipe_of(world), world.store)
    return world


@pytest.fixture(scope="module")
def model(world: TinyWorld) -> Any:
    return AutoModelForCausalLM.from_pretrained(world.root / "model").eval()


def recipe_of(world: TinyWorld, drop: float | None = None, by: str = "ches", **training: Any) -> Recipe:
    chosen = None if drop is None else {"drop": drop, "by": by}
    return world.recipe(**DPO, cache=ONE_EACH, data={"filter": chosen}, training={**TRAINING, **training})


def whole(cache: Cache) -> Groups:
    """All groups by their ids, with their gram."""
    cache.read_columns([GRAM])
    groups = Groups.concat([cache.shard(sid) for sid in range(len(cache.shard_groups))])
    cache.read_columns([])
    return groups.take(np.argsort(groups.group_id))


@torch.no_grad()
def written_out(model: Any, groups: Groups) -> list[Ches]:
    """
    Of each group and each of its completions i against each j, from transformers' own forwards: with S the sum and m
    the mean of the last hidden states over the positions that predict a completion's tokens, from the prompt's last
    token to the sequence's last but one, S_i S_j - S_i S_i and m_i m_j - m_i m_i.
    """
    sums, means = [], []
    for one, (_, tokens, prompt) in enumerate(sequences(groups.input_ids, groups.splits, groups.n_completions)):
        hidden = model(tokens[None], output_hidden_states=True).hidden_states[-1][0].double()
        states = hidden[max(prompt, 1) - 1 : len(tokens) - 1]
        if groups.score_mask is not None:
            counts = groups.score_mask[groups.scored_splits[one] : groups.scored_splits[one + 1]]
            states = states[torch.from_numpy(counts != 0)]
        sums.append(states.sum(0).numpy())
        means.append(states.sum(0).numpy() / max(len(states), 1))
    ends = np.cumsum(groups.n_completions)[:-1]
    return [Ches(*map(_against, both)) for both in zip(np.split(sums, ends), np.split(means, ends), strict=True)]


def _against(vectors: np.ndarray) -> np.ndarray:
    products = vectors @ vectors.T
    return products - np.diag(products)[:, None]


def assert_ches(cache: Cache, model: Any, kind: Any, places: list[tuple[int, int]]) -> None:
    """Of these pairs of every group, a pair named by the places of chosen and rejected."""
    groups = whole(cache)
    units, direct = units_of(groups, kind), written_out(model, groups)
    found = ches(groups, units)
    for name in Ches._fields:
        expected = [getattr(one, name)[place] for one in direct for place in places]
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-4, atol=1e-4)
        assert np.std(expected) > 1


def test_ches_is_its_definition(world: TinyWorld, model: Any) -> None:
    assert_ches(find_cache(recipe_of(world), world.store), model, "best_rest", [(0, 1)])


def test_ches_is_of_what_counts_alone(tmp_path: Path) -> None:
    """In conversations what the user says in the middle of a completion is in neither the sums nor the lengths."""
    world = build_tiny_world(tmp_path, 1, 1)
    recipe = world.recipe(**DPO, cache={"hidden_gram": True}, data=add_conversations(world, 12, 3))
    cache = build_caches(recipe, world.store)[0].cache
    groups = whole(cache)
    assert groups.score_mask is not None
    assert 0 < groups.score_mask.mean() < 1
    assert_ches(cache, AutoModelForCausalLM.from_pretrained(world.root / "model"), "best_rest", [(0, 1)])


@pytest.mark.parametrize(
    ("pairs", "places"), [("best_rest", [(0, 1), (0, 2)]), ("all", [(0, 1), (0, 2), (1, 2)]), ("best_worst", [(0, 2)])]
)
def test_ches_is_of_the_pairs_that_the_objective_makes(
    tmp_path: Path, model: Any, pairs: str, places: list[tuple[int, int]]
) -> None:
    """Of groups of three; the filter goes by a group's mean over them."""
    world, recipe = lists(tmp_path, pairs)
    cache = build_caches(recipe, world.store)[0].cache
    assert_ches(cache, model, pairs, places)
    found = without_worst(cache, recipe.objective.units, Filter(drop=0.25, by="ches"))
    means = [np.mean([one.raw[place] for place in places]) for one in written_out(model, whole(cache))]
    cache.keep(found.kept)
    assert whole(cache).group_id.tolist() == sorted(np.argsort(means)[:6])
    assert (cache.n_groups, cache.n_completions) == (6, 18)


def lists(root: Path, pairs: str) -> tuple[TinyWorld, Recipe]:
    """Eight groups of three completions."""
    world, rng = build_tiny_world(root, 1, 1), np.random.default_rng(0)
    texts = [[" ".join(f"w{n}" for n in rng.integers(0, 90, size)) for size in rng.integers(1, 9, 4)] for _ in range(8)]
    rows = [{"prompt": prompt, "completions": said, "scores": [3, 2, 1]} for prompt, *said in texts]
    (root / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(root / "lists.jsonl"), "split": "train", "eval_split": None}
    objective = {"name": "dpo", "pairs": pairs}
    return world, world.recipe(features=[], objective=objective, data=data, cache={**ONE_EACH, "shard_pairs": 3})


class SixtyAlike(MemoryCache):
    """A hundred pairs, of which those from the 40th on have the same score, the largest."""

    def __init__(self) -> None:
        groups = make_groups([(2, (2, 2))] * 100)
        between = np.minimum(np.arange(100), 40)
        products = np.stack([np.zeros(100), between, between, np.zeros(100)], axis=1).ravel()
        column = HiddenGram(np.arange(0, 401, 4, dtype=np.uint64), products.astype(np.float32))
        super().__init__([groups.with_columns([column]).take(rows) for rows in np.split(np.arange(100), [7, 70])])
        self.columns = ()

    def prefetch(self, sids: list[int]) -> None:
        """All are there."""


@pytest.mark.parametrize(("drop", "dropped"), [(0.29, 29), (0.07, 7), (0.001, 0), (0.999, 99)])
def test_a_share_is_as_many_groups_as_it_says_and_of_equals_the_first_stay(drop: float, dropped: int) -> None:
    """In binary 0.29 of 100 is 28.999999999999996 and 0.07 of 100 is 7.000000000000001; a part of a group stays."""
    found = without_worst(SixtyAlike(), "best_rest", Filter(drop=drop, by="ches"))  # type: ignore[arg-type]
    kept = np.concatenate([rows + first for rows, first in zip(found.kept.rows, (0, 7, 70), strict=True)])
    assert found.n_dropped == dropped
    assert kept.tolist() == list(range(100 - dropped))
    assert found.kept.n_completions == 2 * len(kept)
    assert found.above == min(40, len(kept) - 1)


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> dict[bool, list[int]]:
    """The groups of every batch that was measured: with gradients, and held out without."""
    seen: dict[bool, list[int]] = {True: [], False: []}
    measure = ObjectiveMeter.measure

    def noting(meter: ObjectiveMeter, scores: Any, batch: dict[str, Any], world: int = 1) -> Measurement:
        seen[torch.is_grad_enabled()] += batch["group_id"].tolist()
        return measure(meter, scores, batch, world)

    monkeypatch.setattr(ObjectiveMeter, "measure", noting)
    return seen


@pytest.mark.parametrize("by", ["ches", "length_normalised_ches"])
def test_exactly_the_worst_share_is_left_out(
    world: TinyWorld, model: Any, tmp_path: Path, trained_on: dict[bool, list[int]], by: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """
    0.9 of 36 groups is 32; the four with the smallest scores train, each once an epoch. The cache is the same one, and
    all held-out groups are evaluated.
    """
    recipe = recipe_of(world, 0.9, by, eval_strategy="epoch")
    cache, held_out = find_cache(recipe, world.store), find_cache(recipe, world.store, held_out=True)
    assert cache.key == find_cache(recipe_of(world), world.store).key
    direct = written_out(model, whole(cache))
    field = "raw" if by == "ches" else "normalised"
    scores = np.array([getattr(one, field)[0, 1] for one in direct])
    stay = np.argsort(scores)[:4]
    report = align(recipe, cache, tmp_path, held_out=held_out)
    assert sorted(trained_on[True]) == sorted([*stay, *stay])
    assert sorted(trained_on[False]) == sorted([*range(7)] * 2)
    assert report.steps == 2
    assert f"data.filter: 32 of 36 groups are left out, whose {by} is {scores[stay].max():.4g} or more\n" in (
        capsys.readouterr().err
    )


def test_a_resumed_run_equals_one_never_interrupted(world: TinyWorld, tmp_path: Path) -> None:
    """9 of 36 groups, 3 steps an epoch."""
    recipe = recipe_of(world, 0.75, save_steps=2)
    assert align(recipe, find_cache(recipe, world.store), tmp_path / "straight").steps == 6
    align(recipe, find_cache(recipe, world.store), tmp_path / "resumed")
    cut(tmp_path / "resumed", 4)
    assert align(recipe, find_cache(recipe, world.store), tmp_path / "resumed", resume=True).steps == 6
    one, other = (read_metrics(tmp_path / name / METRICS_FILE) for name in ("straight", "resumed"))
    assert one == other
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (0.25, 0.5, "data.filter.drop: 0.25, the recipe says 0.5"),
        (None, 0.25, "data.filter.drop: None, the recipe says 0.25"),
        (0.25, None, "data.filter.drop: 0.25, the recipe says None"),
    ],
)
def test_a_resumed_run_leaves_out_what_it_left_out_before(
    world: TinyWorld, tmp_path: Path, before: float | None, now: float | None, said: str
) -> None:
    first, second = recipe_of(world, before, max_steps=3), recipe_of(world, now, max_steps=3)
    align(first, find_cache(first, world.store), tmp_path)
    cut(tmp_path, 3)
    with pytest.raises(RunError, match=f"this run began with {said}; give another --output$"):
        align(second, find_cache(second, world.store), tmp_path, resume=True)


def test_runs_from_one_cache_leave_out_what_each_of_them_says(world: TinyWorld, tmp_path: Path) -> None:
    """A sweep has its cache open all the time: 4, 9 and 36 groups, and the last run is the one that it is alone."""
    file = world.recipe_file(**DPO, cache=ONE_EACH, training={**TRAINING, "num_train_epochs": 1})
    variants = load_variants(file, ["data.filter={drop: 0.9},{drop: 0.75},null"])
    cache = find_cache(variants[0].recipe, world.store)
    for variant, steps in zip(variants, (1, 3, 9), strict=True):
        assert align_in_turn(variant.recipe, cache, tmp_path / variant.name).steps == steps
    align(variant.recipe, find_cache(variant.recipe, world.store), tmp_path / "alone")
    assert_same_weights(tmp_path / variant.name, tmp_path / "alone")
    with pytest.raises(RecipeError, match=r"a sweep trains from one cache, and 5, 6 need several"):
        load_variants(file, ["data.max_length=5,6"])


def test_behind_a_url_the_same_groups_are_left_out(world: TinyWorld, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    recipe = recipe_of(world, 0.9)
    align(recipe, find_cache(recipe, world.store), tmp_path / "folder")
    with web_server(world.store) as server:
        align(recipe, find_cache(recipe, server.url), tmp_path / "url")
    assert_same_weights(tmp_path / "folder", tmp_path / "url")


@pytest.mark.long
def test_two_processes_leave_out_what_one_does(world: TinyWorld, tmp_path: Path) -> None:
    settings = {**TRAINING, "optim": "sgd", "max_steps": 3}
    recipe = recipe_of(world, 0.5, **settings)
    align(recipe, find_cache(recipe, world.store), tmp_path / "one")
    raw = {"data": {"filter": {"drop": 0.5, "by": "ches"}}, "training": {**settings, "per_device_train_batch_size": 2}}
    run_two_processes(world.recipe_file(**DPO, cache=ONE_EACH, **raw), world.store, tmp_path / "two")
    one, two = (read_metrics(tmp_path / name / METRICS_FILE) for name in ("one", "two"))
    # Log-probs of about 100 nats are rounded to 1e-5, and rewards are their differences.
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({**DPO, "cache": {}}, r"cache\.hidden_gram: data\.filter tells pairs apart .* set it to true"),
        ({"features": [], "objective": {"name": "kto"}}, r"data\.filter: .* kto takes no pairs; leave it out"),
        (
            {"features": [], "objective": {"name": "plackett_luce"}},
            r"data\.filter: .* plackett_luce takes no pairs; leave it out",
        ),
        ({**DPO, "data": {"filter": {"drop": 1}}}, r"data\.filter\.drop: .* less than 1"),
    ],
    ids=["no-hidden-gram", "single-completions", "lists", "everything"],
)
def test_a_filter_that_could_not_be_is_refused_in_a_line(world: TinyWorld, sections: dict[str, Any], said: str) -> None:
    asked = {"cache": {"hidden_gram": True, "mismatched": True}, "data": {"filter": {"drop": 0.1}}, **sections}
    with pytest.raises(RecipeError, match=said) as refused:
        world.recipe(**asked)
    assert len([line for line in str(refused.value).splitlines() if "filter" in line]) == 1


def test_a_cache_without_the_column_says_what_adds_it(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is loaded."""
    without = world.recipe(**DPO, cache={"shard_pairs": 9})
    cache = build_caches(without, tmp_path / "store")[0].cache
    monkeypatch.setattr(policies, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(CacheMissing, match=r"has no column of hidden gram.*; add it with: fpo cache RECIPE"):
        align(recipe_of(world, 0.1), cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()
