"""Adapters: each setting does what its paper says, is saved, and opens with plain PEFT as what was trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_stage2_run import run, stopped_at
from test_stage2_saved import ordinary_logps, trained
from tiny_models import tiny_model
from tiny_world import TinyWorld, build_tiny_world
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fpo.errors import RecipeError
from fpo.recipe import Lora, Recipe
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align, evaluate_run
from fpo.stage2_align.adapters import with_lora
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.measure import ObjectiveMeter
from fpo.stage2_align.policy import load_policy
from fpo.stage2_align.run import METRICS_FILE

peft = pytest.importorskip("peft")

FAST = {"max_steps": 4, "learning_rate": 1e-2, "save_steps": 2, "per_device_train_batch_size": 4}
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = build_tiny_world(tmp_path_factory.mktemp("world"), 16, 4)
    build_caches(world.recipe(), world.store)
    return world


def adapted(world: TinyWorld, training: dict[str, Any] | None = None, **lora: Any) -> Recipe:
    lora = {"r": 4, "alpha": 8, "target_modules": ATTENTION, **lora}
    return world.recipe(policy={"lora": lora}, training={**FAST, **(training or {})})


def policy(world: TinyWorld, folder: Path, **lora: Any) -> Any:
    recipe = adapted(world, **lora)
    return load_policy(recipe, ObjectiveMeter.of(recipe), folder)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_the_update_is_scaled_by_the_rank_or_by_its_root(
    world: TinyWorld, tmp_path: Path, rslora: bool, scale: float
) -> None:
    """
    y = W x + s B A x, s = alpha / r, or alpha / sqrt(r) with rslora.
    """
    layer = policy(world, tmp_path, rslora=rslora).base_model.model.model.layers[0].self_attn.q_proj
    x, b = torch.randn(5, 32), torch.randn(32, 4)
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(b)
        update = layer(x) - x @ layer.base_layer.weight.T
    torch.testing.assert_close(update, scale * x @ layer.lora_A["default"].weight.T @ b.T, rtol=1e-4, atol=1e-4)


def test_dora_trains_a_magnitude_beside_the_direction(world: TinyWorld, tmp_path: Path) -> None:
    """
    W' = m (W + s B A) / |W + s B A|, row by row; m begins as |W|, so that W' begins as W.
    """
    recipe = adapted(world, dora=True)
    report = align(recipe, find_cache(recipe, world.store), tmp_path)
    assert report.parity == pytest.approx(0, abs=1e-6)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = [name for name in tensors if name.endswith("q_proj.lora_magnitude_vector")]
    assert len(names) == 3
    before = load_file(world.root / "model" / "model.safetensors")
    for name in names:
        path = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        weight, m = before[f"{path}.weight"], tensors[name]
        assert (m - weight.norm(dim=1)).abs().max() > 1e-3
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).merge_and_unload()
    a, b = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
    direction = weight + (8 / 4) * b @ a
    expected = m[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(opened.get_submodule(path).weight.data, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "lora",
    [
        {"rslora": True},
        {"dora": True},
        {"dropout": 0.5},
        {"dropout": 0.5, "dora": True},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"modules_to_save": ["norm"], "dora": True, "rslora": True},
    ],
    ids=str,
)
def test_a_saved_adapter_opens_with_plain_peft_as_what_was_trained(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any]
) -> None:
    recipe = adapted(world, **lora)
    cache = find_cache(recipe, world.store)
    expected = trained(recipe, cache, tmp_path, monkeypatch)
    pairs = cache.shard(0)
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(ordinary_logps(opened, pairs), expected, rtol=1e-5, atol=1e-5)
    assert (expected - torch.from_numpy(pairs.token_logps)).abs().mean() > 1e-3
    held_out = find_cache(recipe, world.store, held_out=True)
    logps = ordinary_logps(opened, held_out.shard(0))
    sums = torch.stack([part.sum() for part in logps.split(held_out.shard(0).lengths[1].tolist())]).view(-1, 2)
    metrics = evaluate_run(recipe, held_out, tmp_path)
    assert metrics["eval_logps/chosen"] == pytest.approx(float(sums[:, 0].mean()), rel=1e-5)


def test_modules_that_are_trained_whole_are_saved_beside_the_adapter(world: TinyWorld, tmp_path: Path) -> None:
    recipe = adapted(world, modules_to_save=["lm_head"])
    align(recipe, find_cache(recipe, world.store), tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    before = load_file(world.root / "model" / "model.safetensors")["lm_head.weight"]
    assert saved.shape == before.shape
    assert (saved - before).abs().max() > 1e-3


def test_a_run_with_dropout_that_is_resumed_equals_one_that_never_stopped(world: TinyWorld, tmp_path: Path) -> None:
    """
    The branch is zero until the first step, so with dropout too the policy is the reference and the loss log 2. A
    checkpoint holds where the random numbers were.
    """
    recipe = adapted(world, dropout=0.5)
    report = align(recipe, find_cache(recipe, world.store), tmp_path / "straight")
    straight = read_metrics(tmp_path / "straight" / METRICS_FILE)
    assert report.parity == pytest.approx(0, abs=1e-6)
    assert straight[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    stopped_at(world, recipe, tmp_path / "run", 2)
    assert run(world, recipe, tmp_path / "run", resume=True) == straight
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    without = run(world, adapted(world), tmp_path / "without")
    assert without[-1]["loss"] != pytest.approx(straight[-1]["loss"], abs=1e-4)


def test_a_look_at_the_held_out_groups_draws_no_number_that_dropout_would_have_drawn(
    world: TinyWorld, tmp_path: Path
) -> None:
    recipe = adapted(world, {"eval_strategy": "steps", "eval_steps": 1}, dropout=0.5)
    held_out = find_cache(recipe, world.store, held_out=True)
    align(recipe, find_cache(recipe, world.store), tmp_path / "evaluated", held_out=held_out)
    rows = read_metrics(tmp_path / "evaluated" / METRICS_FILE)
    assert [row["eval_loss"] for row in rows if "eval_loss" in row]
    plain = run(world, adapted(world, dropout=0.5), tmp_path / "plain")
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in plain]


def test_activation_checkpointing_drops_the_same_inputs_again(world: TinyWorld, tmp_path: Path) -> None:
    plain = run(world, adapted(world, dropout=0.5), tmp_path / "plain")
    again = run(world, adapted(world, {"activation_checkpointing": True}, dropout=0.5), tmp_path / "again")
    assert [row["grad_norm"] for row in again] == pytest.approx([row["grad_norm"] for row in plain], rel=1e-4)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lm_haed"], "policy.lora.modules_to_save: no module is called lm_haed; nearest is lm_head"),
        (["embed_tokens"], "policy.lora.modules_to_save: embed_tokens shares its weights with lm_head; leave it out"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused_by_name(tmp_path: Path, names: list[str], message: str) -> None:
    tied = tiny_model("llama", tie_word_embeddings=True)
    with pytest.raises(RecipeError, match=message):
        with_lora(tied, Lora(modules_to_save=names), str(tmp_path), None)
    both = with_lora(tied, Lora(modules_to_save=["norm"]), str(tmp_path), None)
    assert {name.split(".")[-3] for name, weight in both.named_parameters() if weight.requires_grad} >= {"lora_A"}


def test_a_base_of_four_bits_is_reference_and_policy_alike(tmp_path: Path) -> None:
    """QLoRA, where bitsandbytes is installed: the model's files are quantised, and both stages load them so."""
    pytest.importorskip("bitsandbytes")
    world = build_tiny_world(tmp_path / "world", 16, 4)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(world.root / "model", quantization_config=quantised)
    model.save_pretrained(world.root / "model")
    recipe = adapted(world, target_modules="all-linear")
    build_caches(recipe, world.store)
    report = align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    assert report.parity == pytest.approx(0, abs=1e-6)
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    assert type(opened.base_model.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    held_out = evaluate_run(recipe, find_cache(recipe, world.store, held_out=True), tmp_path / "run")
    assert held_out["eval_loss"] != pytest.approx(math.log(2), abs=1e-3)
