"""The drift of features: against a plain loop, of an untouched policy, of one that was moved, and what the gap told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import D_SAE, TinyWorld, build_tiny_world
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fpo.cli import app
from fpo.evaluation.drift import AGREEMENT, agreement
from fpo.evaluation.drift_report import FEATURES_FILE, DriftQuestion, drift_report
from fpo.evaluation.sampling import Sampling
from fpo.scoring import load_sae
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align
from fpo.store import Cache

N_TEST = 24
STILL = {"learning_rate": 0.0, "max_steps": 1, "save_strategy": "no"}
DPO = {"name": "dpo", "beta": 0.5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = build_tiny_world(tmp_path_factory.mktemp("drift"), 40, N_TEST)
    build_caches(recipe_of(world), world.store)
    return world


def recipe_of(world: TinyWorld) -> Any:
    return world.recipe(objective=DPO, training=STILL)


def untouched(world: TinyWorld, folder: Path) -> Any:
    """The recipe of a run that moved nothing."""
    recipe = recipe_of(world)
    align(recipe, find_cache(recipe, world.store), folder)
    return recipe


def asked_of(world: TinyWorld, folder: Path, moved: Any = None, samples: int = 0) -> dict[str, Any]:
    """The one hookpoint's report of a run whose weights `moved` changes when they are saved."""
    recipe = untouched(world, folder)
    if moved is not None:
        weights = load_file(folder / "model.safetensors")
        moved(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    train, held_out = (find_cache(recipe, world.store, held_out=which) for which in (False, True))
    question = DriftQuestion(D_SAE, samples, Sampling(6, temperature=1.0))
    (found,) = drift_report(recipe, train, held_out, folder, None, question)["hookpoints"]
    return found


def drifts(report: dict[str, Any], side: str) -> np.ndarray:
    found = np.zeros(D_SAE)
    for row in report["features"]:
        found[row["feature"]] = row[side]
    return found


def scale_up(weights: dict[str, torch.Tensor]) -> None:
    """One weight matrix that the hookpoint stands behind."""
    weights["model.layers.1.mlp.down_proj.weight"] *= 3


def test_of_an_untouched_policy_nothing_drifts(world: TinyWorld, tmp_path: Path) -> None:
    """Both models are read by one code, and speak by the same numbers: not a bit differs."""
    report = asked_of(world, tmp_path, samples=12)
    assert report["features"] == []
    assert report["gap_against"]["chosen"]["r2"] == {"value": None, "low": None, "high": None}
    assert {point[side] for point in report["points"] for side in ("chosen", "rejected", "speech")} == {0.0}
    assert report["fit"]["policy"] == report["fit"]["reference"]
    assert not report["misfit"]


def test_drifts_are_those_of_a_plain_loop(world: TinyWorld, tmp_path: Path) -> None:
    """Transformers' own forward, one completion after the other, and the SAE over its positions."""
    report = asked_of(world, tmp_path / "run", scale_up)
    seen = [row["feature"] for row in report["features"]]
    assert len(seen) > 10
    cache = find_cache(recipe_of(world), world.store, held_out=True)
    for side, name in enumerate(("chosen", "rejected")):
        theirs = plain_means(world.root / "model", cache, side)
        drift = plain_means(tmp_path / "run", cache, side) - theirs
        np.testing.assert_allclose(drifts(report, name)[seen], drift[seen], atol=1e-5)
        np.testing.assert_allclose([row[f"reference_{name}"] for row in report["features"]], theirs[seen], atol=1e-5)


def plain_means(folder: Path, cache: Cache, side: int) -> np.ndarray:
    """(F,) mean over the held-out pairs of a side's pooled features."""
    model, sae = AutoModelForCausalLM.from_pretrained(folder).eval(), load_sae(str(cache_sae(cache)))
    cache.read_columns(())
    sums, given = np.zeros(D_SAE), []
    model.model.layers[1].register_forward_hook(lambda module, args, output: given.append(output))
    for sid in range(len(cache.shard_groups)):
        groups = cache.shard(sid)
        for row in range(len(groups)):
            parts = np.split(groups.input_ids, groups.splits[1:-1].astype(int))[3 * row : 3 * row + 3]
            ids = torch.from_numpy(np.concatenate([parts[0], parts[1 + side]]).astype(np.int64))
            with torch.no_grad():
                model(ids[None])
            output = given.pop()
            states = (output[0] if isinstance(output, tuple) else output).reshape(len(ids), -1)
            # A token is predicted where the one before it stands.
            sums += sae.encode(states[len(parts[0]) - 1 : -1]).mean(0).numpy()
    return sums / cache.n_groups


def cache_sae(cache: Cache) -> Path:
    return Path(str(cache.folder.where(""))).parents[1] / "sae"


def test_what_is_planted_in_one_weight_is_the_feature_that_drifts_most(world: TinyWorld, tmp_path: Path) -> None:
    """
    What a layer adds is down_proj h. With v the mean of h, down_proj + s u v^T / |v| adds s (v.h) / |v| to the residual
    stream along u, and u is the direction that feature 7 reads.
    """
    sae = load_sae(str(world.root / "sae"))
    direction = sae.weight_FD[7] / sae.weight_FD[7].norm()
    model = AutoModelForCausalLM.from_pretrained(world.root / "model")
    given: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with torch.no_grad():
        model(torch.arange(4, 94)[None])
    mean = given[0][0].mean(0)

    def plant(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.down_proj.weight"] += 3 * torch.outer(direction, mean) / mean.square().sum()

    report = asked_of(world, tmp_path, plant)
    for side in ("chosen", "rejected"):
        assert drifts(report, side).argmax() == 7
        row = next(row for row in report["features"] if row["feature"] == 7)
        assert row[f"{side}_low"] > 0


def test_a_gap_that_tells_the_drift_whole() -> None:
    """Drift 2 gap + 1 is told whole, by rank also where it bends; of five features nothing is told."""
    gap = np.random.default_rng(0).normal(size=400)
    line, bent = agreement(gap, 2 * gap + 1), agreement(gap, np.exp(gap))
    assert [line[name]["value"] for name in AGREEMENT] == pytest.approx([2, 1, 1])
    assert bent["rank_correlation"]["value"] == pytest.approx(1)
    assert bent["r2"]["value"] < 0.9
    assert agreement(gap[:5], gap[:5])["r2"]["value"] is None


@pytest.mark.long
def test_intervals_of_slope_and_rank_hold_nothing_as_often_as_they_say() -> None:
    """Of 60 repeats of noise 57 on average hold 0, and less than 51 do so once in 1300 times."""
    rng = np.random.default_rng(1)
    told = [agreement(*rng.normal(size=(2, 60))) for _ in range(60)]
    for name in ("slope", "rank_correlation"):
        assert sum(one[name]["low"] < 0 < one[name]["high"] for one in told) >= 51


def test_what_a_run_says_stays_in_it(world: TinyWorld, tmp_path: Path) -> None:
    report = asked_of(world, tmp_path, scale_up)
    kept = json.loads((tmp_path / FEATURES_FILE).read_text(encoding="utf-8"))
    assert kept["hookpoints"] == [report]


def test_the_command_tells_a_run_from_a_cache(world: TinyWorld, tmp_path: Path) -> None:
    """A run's features in JSON, in lines and on a page; what is asked of the other one is refused in one line."""
    untouched(world, tmp_path / "run")
    given, page = ["features", str(tmp_path / "run"), "--store", str(world.store)], tmp_path / "drift.html"
    done = CliRunner().invoke(app, [*given, "--json", "--samples", "12", "--max-new-tokens", "4", "--html", str(page)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "run" / FEATURES_FILE).read_text())
    assert found["hookpoints"][0]["spoken"] == 12
    assert "Gap against drift" in page.read_text()
    lines = CliRunner().invoke(app, given)
    assert "gap told" in lines.stdout
    for options, message in (
        (["--steer", "x.csv"], "--steer is for caches"),
        (["--hookpoint", "model.layers.9"], "no features at model.layers.9"),
    ):
        assert message in str(CliRunner().invoke(app, [*given, *options]).exception)
    of_cache = CliRunner().invoke(app, ["features", "0000", "--store", str(world.store), "--samples", "3"])
    assert "--checkpoint and --samples are for runs" in str(of_cache.exception)
