"""Every objective from one cache: what it is at the reference itself, and what scores it asks of the data."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import TinyWorld, build_tiny_world
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fpo.errors import DataError
from fpo.objectives import OBJECTIVES
from fpo.scoring import Packed, install_scoring
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align, evaluate_run
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.measure import ObjectiveMeter, batch_metrics
from fpo.stage2_align.policy import load_policy
from fpo.stage2_align.run import METRICS_FILE
from fpo.stage2_align.stream import PairStream
from fpo.stage2_align.sums import MetricSums

# The package exports a function of the module's name.
aligning = importlib.import_module("fpo.stage2_align.align")

GAP = 3.0
LOG_2 = math.log(2)
# With the default settings, where all logratios are 0 (so are u and r) and scores are GAP apart.
AT_THE_REFERENCE = {
    "dpo": LOG_2,
    "fpo": LOG_2,
    "hinge": 1.0,
    "ipo": (1 / 0.2) ** 2,
    "exo_pair": 0.5 * math.log(0.25 / (0.999 * 0.001)),
    "nca_pair": 2 * LOG_2,
    "robust": LOG_2,
    "bco_pair": 2 * LOG_2,
    "sppo_hard": 2 * (1 / 0.2) ** 2,
    "aot": LOG_2,
    "aot_unpaired": LOG_2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LOG_2 + 0.5,
    "cal_dpo": LOG_2 + (1 / 0.004) ** 2,
    "odpo": math.log(1 + GAP),
    "tdpo1": LOG_2,
    "tdpo2": LOG_2,
    "ld_dpo": LOG_2,
    "sampo": LOG_2,
    "ada_dpo": 0.1 * LOG_2 + 0.1 * (0.1 - LOG_2),
    "mixture": LOG_2 + 1.0,
    "kto": 0.5,
    "plackett_luce": LOG_2,
    "info_nca": LOG_2,
}


def scored_world(root: Path, chosen: float = GAP, rejected: float = 0.0) -> TinyWorld:
    """The tiny world with these scores in every row."""
    world = build_tiny_world(root, 12, 4)
    for path in (world.root / "pairs").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        scored = [{**row, "score_chosen": chosen, "score_rejected": rejected} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in scored), encoding="utf-8")
    return world


EVERYTHING = {"top_logits": 8, "mismatched": True}
"""What all objectives together ask of a cache beside features."""


def settings(name: str) -> dict[str, Any]:
    """An objective with what it cannot do without."""
    return {"name": name, **({"terms": [{"name": "dpo"}, {"name": "hinge"}]} if name == "mixture" else {})}


class NoFloat64(TorchDispatchMode):
    """Apple GPUs do not have it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert not any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result))
        return result


def test_every_objective_is_what_its_formula_says_where_the_policy_is_the_reference(tmp_path: Path) -> None:
    """All from one cache and its columns: the base's key is the same for all of them."""
    world = scored_world(tmp_path / "world")
    build_caches(world.recipe(cache=EVERYTHING), world.store)
    model = load_policy(world.recipe(), ObjectiveMeter.of(world.recipe()), tmp_path / "run")
    install_scoring(model, ("model.layers.1",))
    found, keys = {}, set()
    for name in OBJECTIVES:
        recipe = world.recipe(objective=settings(name), cache=EVERYTHING)
        cache = find_cache(recipe, world.store)
        keys.add(cache.key)
        batch: Any = next(iter(PairStream(cache, seed=0, per_device=8, objective=recipe.objective)))
        meter = ObjectiveMeter.of(recipe)
        with NoFloat64():
            scores = model(**Packed.of(batch)._asdict())
            measurement = meter.measure(scores, batch)
            MetricSums().add(batch_metrics(measurement, scores, batch))
        losses = measurement.value.losses
        assert losses.shape == (16 if name == "kto" else 8,)
        (gradient,) = torch.autograd.grad(losses.mean(), scores.token_logps)
        assert gradient.isfinite().all()
        assert gradient.norm() > 0
        found[name] = losses.mean().item()
    assert len(keys) == 1
    assert {name: found[name] for name in AT_THE_REFERENCE} == pytest.approx(AT_THE_REFERENCE, rel=1e-4)
    # Where the policy itself enters: from the cached log-probs, which are its own.
    plain: Any = next(iter(PairStream(find_cache(world.recipe(), world.store), seed=0, per_device=8)))
    scores = model(**Packed.of(plain)._asdict())
    logps = plain["ref_logps"].view(-1, 2)
    means = logps / plain["counts"].view(-1, 2)
    nll = float(-logps[:, 0].sum() / plain["counts"][::2].sum())
    difference = torch.nn.functional.logsigmoid(0.1 * (logps[:, 0] - logps[:, 1]))
    apart = (scores.token_logps - scores.log_sum_squares).detach().split(plain["lengths"].tolist())
    weights = torch.stack([tokens.mean() for tokens in apart]).view(-1, 2).sum(1).exp().clamp(max=1)
    odds = means - torch.log(1 - means.exp())
    simpo = -float(torch.sigmoid(2 * (means[:, 0] - means[:, 1]) - 0.5).log().mean())
    # Every segment costs log 2; a pair has as many as its shorter completion has tokens.
    segments = plain["counts"].view(-1, 2).amin(1).float().mean().item()
    # Drawn with a share of 0.4: each pair relabelled with a label of its own has 0.1 * log(2)^2 less.
    relabelled = (LOG_2 - found["sail_dp"]) / (0.1 * LOG_2**2)
    assert relabelled * 8 == pytest.approx(round(relabelled * 8), abs=1e-3)
    assert {name: loss for name, loss in found.items() if name not in {*AT_THE_REFERENCE, "sail_dp"}} == pytest.approx(
        {
            "sft": nll,
            "cpo": nll - float(difference.mean()),
            "orpo": nll - 0.1 * float(torch.sigmoid(odds[:, 0] - odds[:, 1]).log().mean()),
            "asft": float(-2 * means[:, 0].mean() - torch.log(1 - means[:, 1].exp()).mean()),
            "wpo": LOG_2 * float(weights.mean()),
            "simpo": simpo,
            "simpo_kl": simpo,
            "adpo": segments * LOG_2,
        },
        rel=1e-4,
    )


def test_a_policy_is_asked_for_its_distributions_where_the_objective_weighs_by_them(tmp_path: Path) -> None:
    """Weights are at most 1, and a random model's below."""
    world = build_tiny_world(tmp_path / "world", 12, 4)
    recipe = world.recipe(features=[], objective={"name": "wpo"}, training={"max_steps": 1, "learning_rate": 0.0})
    build_caches(recipe, world.store)
    align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    [row] = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert 0 < row["loss"] < LOG_2
    metrics = evaluate_run(recipe, find_cache(recipe, world.store, held_out=True), tmp_path / "run")
    assert 0 < metrics["eval_loss"] < LOG_2


def test_a_margin_from_scores_trains_and_evaluates(tmp_path: Path) -> None:
    """-log sigmoid(0 - log 3) = log(1 + 3)"""
    world = scored_world(tmp_path / "world", chosen=5.0, rejected=2.0)
    recipe = world.recipe(features=[], objective={"name": "odpo"}, training={"max_steps": 2, "learning_rate": 0.0})
    build_caches(recipe, world.store)
    align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    logged = [row["loss"] for row in read_metrics(tmp_path / "run" / METRICS_FILE)]
    assert logged == pytest.approx([math.log(4)] * 2, rel=1e-5)
    metrics = evaluate_run(recipe, find_cache(recipe, world.store, held_out=True), tmp_path / "run")
    assert metrics["eval_loss"] == pytest.approx(math.log(4), rel=1e-5)


@pytest.mark.parametrize(
    ("scores", "said"), [(None, "nan for chosen and nan for rejected"), ((1.0, 4.0), "1 for chosen and 4 for rejected")]
)
def test_data_whose_scores_give_no_margin_is_refused_before_a_model_is_loaded(
    tmp_path: Path, scores: tuple[float, float] | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aligning, "load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    world = build_tiny_world(tmp_path / "world", 12, 4) if scores is None else scored_world(tmp_path / "world", *scores)
    recipe = world.recipe(features=[], objective={"name": "odpo"}, training={"max_steps": 1})
    build_caches(recipe, world.store)
    with pytest.raises(DataError, match=rf"takes a margin from scores, and group \d+ of cache \w+ has {said}; name"):
        align(recipe, find_cache(recipe, world.store), tmp_path / "run")
