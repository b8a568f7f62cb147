"""What a run reads of a cache: the base, the one column that its objective needs, and groups that are pairs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from store_servers import web_server
from tiny_world import TinyWorld, build_tiny_world

from fpo.commands.reports import column_lines
from fpo.errors import CacheDamaged, CacheMissing, DataError
from fpo.recipe import Recipe
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage1_cache.score import ReferenceScorer
from fpo.stage2_align import align, evaluate_run, policy
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.run import METRICS_FILE, read_run
from fpo.stage2_align.units import units_of
from fpo.store import column_name


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyWorld:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return build_tiny_world(tmp_path / "world", 24, 6)


def feature(world: TinyWorld, **fields: Any) -> dict[str, Any]:
    return {**world.raw_recipe()["features"][0], **fields}


def metrics(recipe: Recipe, store: Path, run: Path) -> list[dict[str, float]]:
    align(recipe, find_cache(recipe, store), run)
    return read_metrics(run / METRICS_FILE)


def test_an_objective_without_features_trains_from_the_base_that_another_recipe_built(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is scored again, with and without `features:` in its recipe, also when no column is there."""
    built = build_caches(world.recipe(), world.store)[0].cache
    monkeypatch.setattr(ReferenceScorer, "__init__", lambda *_, **__: pytest.fail("a reference was loaded"))
    bare = world.recipe(features=[], objective={"name": "dpo"})
    [hit, _] = build_caches(bare, world.store)
    assert (hit.cache.key, hit.cache.digest, hit.scored, hit.reused) == (built.key, built.digest, 0, 0)
    shutil.rmtree(world.store / built.key / "columns")
    for name, features in (("dpo", []), ("simpo", [feature(world)])):
        recipe = world.recipe(features=features, objective={"name": name}, training={"max_steps": 2})
        run = tmp_path / name
        assert align(recipe, find_cache(recipe, world.store), run).steps == 2
        assert (read_run(run)["cache"], read_run(run)["columns"]) == (built.key, [])
        evaluate_run(recipe, find_cache(recipe, world.store, held_out=True), run)
    with pytest.raises(CacheMissing, match=r"has no column of features at model\.layers\.1, top 16.*add it with: fpo"):
        find_cache(world.recipe(), world.store)


@pytest.mark.parametrize("held", [32, "all"])
def test_a_column_that_holds_more_gives_the_losses_of_one_that_holds_what_is_asked(
    world: TinyWorld, tmp_path: Path, held: int | str
) -> None:
    """All numbers to the last bit, but `unknown_sq`: what is cut away is added to a rounded sum."""
    union = {"name": "fpo", "feature_set": "union"}
    asked = world.recipe(features=[feature(world, top_k=16)], objective=union, training={"max_steps": 5})
    build_caches(asked, tmp_path / "exact")
    build_caches(world.recipe(features=[feature(world, top_k=held)]), tmp_path / "more")
    [served, _] = build_caches(asked, tmp_path / "more")
    assert (served.scored, served.reused) == (0, 0)
    cache = find_cache(asked, tmp_path / "more")
    assert column_name(cache.columns[0].held) == f"features at model.layers.1, top {held}"
    exact = metrics(asked, tmp_path / "exact", tmp_path / "run-exact")
    more = metrics(asked, tmp_path / "more", tmp_path / "run-more")
    assert len(exact) == 5
    assert min(row["features/unknown_sq"] for row in exact) > 0
    for one, other in zip(exact, more, strict=True):
        assert other.pop("features/unknown_sq") == pytest.approx(one.pop("features/unknown_sq"), rel=1e-6)
        assert other == one
    evaluations = [
        evaluate_run(asked, find_cache(asked, tmp_path / store, held_out=True), tmp_path / "run-exact")
        for store in ("exact", "more")
    ]
    assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-6)


def test_a_run_reads_no_column_but_the_one_of_its_hookpoint(world: TinyWorld, tmp_path: Path) -> None:
    hookpoints = ["model.layers.0", "model.layers.1"]
    features = [feature(world, hookpoint=hookpoint) for hookpoint in hookpoints]
    recipes = {
        hookpoint: world.recipe(features=features, objective={"hookpoints": [hookpoint]}, training={"max_steps": 1})
        for hookpoint in hookpoints
    }
    [report, _] = build_caches(recipes[hookpoints[0]], world.store)
    other = world.store / report.cache.key / "columns" / report.columns[0].key / "shards" / "000000.zarr.zip"
    content = bytearray(other.read_bytes())
    content[len(content) // 2] ^= 1
    other.write_bytes(content)
    run = tmp_path / "run"
    assert align(recipes[hookpoints[1]], find_cache(recipes[hookpoints[1]], world.store), run).steps == 1
    assert read_run(run)["columns"][0]["key"] == report.columns[1].key
    with pytest.raises(CacheDamaged, match=f"{report.columns[0].key}/shards/000000"):
        align(recipes[hookpoints[0]], find_cache(recipes[hookpoints[0]], world.store), tmp_path / "other")


def test_behind_a_url_nothing_is_fetched_but_the_base_and_the_column_that_is_read(
    world: TinyWorld, tmp_path: Path
) -> None:
    pytest.importorskip("obstore")
    hookpoints = ["model.layers.0", "model.layers.1"]
    features = [feature(world, hookpoint=hookpoint) for hookpoint in hookpoints]
    fpo = world.recipe(features=features, objective={"hookpoints": [hookpoints[1]]}, training={"max_steps": 1})
    dpo = world.recipe(features=features, objective={"name": "dpo"}, training={"max_steps": 1})
    [report, _] = build_caches(fpo, world.store)
    read = f"columns/{report.columns[1].key}/"
    # What the first run has fetched of the base lies on this machine's shelf for the second.
    for recipe, places in ((dpo, {""}), (fpo, {read})):
        with web_server(world.store) as server:
            align(recipe, find_cache(recipe, server.url), tmp_path / recipe.objective.name)
            fetched = [name for method, name in server.requests if method == "GET" and "shards/" in name]
        assert {name.split("shards/")[0] for name in fetched} == places


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ([1, 1, 2, 3], "cache {key} has 7 in 4 groups; name data with two or more completions"),
        ([1, 3, 2, 2], r"group 0 of cache {key} has 1; name data with two or more completions"),
    ],
    ids=["told-by-the-manifest", "told-by-a-shard"],
)
def test_groups_of_one_completion_are_refused(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], told: str
) -> None:
    """Before the model is loaded."""
    recipe = world.recipe(data=listed(tmp_path, sizes))
    build_caches(recipe, world.store)
    monkeypatch.setattr(policy, "load_model", lambda *_: pytest.fail("a model was loaded"))
    cache = find_cache(recipe, world.store)
    with pytest.raises(DataError, match=told.format(key=cache.key[:12])):
        align(recipe, cache, tmp_path / "run")
    assert not (tmp_path / "run" / METRICS_FILE).exists()


def listed(root: Path, sizes: list[int]) -> dict[str, Any]:
    """Data of groups with so many completions; the last one of each is the best."""
    rows = [
        {"prompt": f"w{n} w5", "completions": [f" w{n} w{m}" for m in range(size)], "scores": list(range(size))}
        for n, size in enumerate(sizes)
    ]
    (root / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": str(root / "lists.jsonl"), "split": "train", "eval_split": "train"}


PAIRS = {"best_rest": [(0, 1), (0, 2)], "best_worst": [(0, 2)], "adjacent": [(0, 1), (1, 2)]}
PAIRS["all"] = [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize(
    ("name", "learning_rate", "pairing"),
    [
        ("dpo", 0.3, "best_rest"),
        ("fpo", 1e-5, "all"),
        *(
            pytest.param("dpo", 0.3, pairing, marks=pytest.mark.campaign)
            for pairing in ("best_worst", "adjacent", "all")
        ),
    ],
)
def test_lists_train_as_the_pairs_that_they_are_made_of(
    world: TinyWorld, tmp_path: Path, name: str, learning_rate: float, pairing: str
) -> None:
    """
    Six groups of three, all in one step, against a file with their pairs written out: every group has as many pairs, so
    the mean over groups of the mean over their pairs is the mean over all pairs.
    """
    data = listed(tmp_path, [3] * 6)
    rows = [json.loads(line) for line in Path(data["source"]).read_text().splitlines()]
    written = [
        {"prompt": row["prompt"], "chosen": row["completions"][2 - better], "rejected": row["completions"][2 - worse]}
        for row in rows
        for better, worse in PAIRS[pairing]
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    training = {"max_steps": 3, "learning_rate": learning_rate, "optim": "sgd", "max_grad_norm": 0}
    losses = []
    for source, size in (("lists", 6), ("pairs", len(written))):
        recipe = world.recipe(
            data={**data, "source": str(tmp_path / f"{source}.jsonl")},
            objective={"name": name, "pairs": pairing},
            training={**training, "per_device_train_batch_size": size},
        )
        build_caches(recipe, world.store)
        rows_of_run = metrics(recipe, world.store, tmp_path / source)
        losses.append([row["loss"] for row in rows_of_run if "rewards/margins" in row])
        losses[-1].append(
            evaluate_run(recipe, find_cache(recipe, world.store, held_out=True), tmp_path / source)["eval_loss"]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0][-1] - math.log(2)) > 1e-4


def test_completions_of_equal_score_make_no_pair_in_a_list_and_one_in_a_pair(world: TinyWorld, tmp_path: Path) -> None:
    """Scores 2, 1, 1 | 3, 3, 0 | 1, 1: of all pairs of a list those of unequal score, and each group counts once."""
    lists = [
        {"prompt": "w1", "completions": [" w1", " w2", " w3"], "scores": [2, 1, 1]},
        {"prompt": "w2", "completions": [" w1", " w2", " w3"], "scores": [3, 3, 0]},
        {"prompt": "w3", "completions": [" w1", " w2"], "scores": [1, 1]},
    ]
    (tmp_path / "ties.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    recipe = world.recipe(data={"source": str(tmp_path / "ties.jsonl"), "eval_split": None})
    build_caches(recipe, world.store)
    groups = find_cache(recipe, world.store).shard(0)
    groups = groups.take(groups.group_id.argsort())
    pairs = units_of(groups, "all")
    assert pairs.completions.tolist() == [[0, 1], [0, 2], [3, 5], [4, 5], [6, 7]]
    assert pairs.group.tolist() == [0, 0, 1, 1, 2]
    assert pairs.shares(3).tolist() == [0.5, 0.5, 0.5, 0.5, 1]


def test_a_pairs_loss_is_multiplied_by_the_weight_that_the_data_gives_it(world: TinyWorld, tmp_path: Path) -> None:
    """
    Policy = reference, so every DPO loss is log 2; with weights 1, 2, 3, 1, 2, 3, ... their mean over all 24 pairs,
    one step, is 2 log 2.
    """
    rows = [json.loads(line) for line in (world.root / "pairs" / "train.jsonl").read_text().splitlines()]
    weighted = "".join(json.dumps({**row, "weight": 1 + number % 3}) + "\n" for number, row in enumerate(rows))
    (tmp_path / "weighted.jsonl").write_text(weighted)
    recipe = world.recipe(
        data={"source": str(tmp_path / "weighted.jsonl"), "eval_split": None},
        features=[],
        objective={"name": "dpo"},
        training={"per_device_train_batch_size": 24, "max_steps": 1},
    )
    build_caches(recipe, world.store)
    (row, *_) = metrics(recipe, world.store, tmp_path / "run")
    assert row["loss"] == pytest.approx(2 * math.log(2), rel=1e-6)
    assert row["rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("kept", "said"), [(96, "kl is exact"), (2, "kl is a lower bound, 95 other tokens count as one")]
)
def test_a_run_says_what_its_kl_is(world: TinyWorld, tmp_path: Path, kept: int, said: str) -> None:
    """Of 97 tokens."""
    recipe = world.recipe(objective={"name": "tdpo2"}, features=[], cache={"top_logits": kept})
    build_caches(recipe, tmp_path)
    (line,) = column_lines(find_cache(recipe, tmp_path))
    assert line.endswith(f"top {kept} logits: {said}")
