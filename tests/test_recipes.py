"""
Ready recipes on stand-ins: a random model of the same architecture, an SAE of the same format, a few pairs.
What a recipe says it takes from a paper is what it sets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from tiny_models import tiny_model
from tiny_saes import random_sae, write_gemma_scope, write_gemma_scope_2
from tiny_world import TinyWorld, build_tiny_world
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from fpo.recipe import Recipe, load_recipe
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align
from fpo.stage2_align.arguments import training_arguments

FOLDER = Path(__file__).parents[1] / "recipes"
PUBLISHED = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.name.startswith("demo"))

# How a comment says what a field is set to. Digits and no dot at the end: it may end a sentence.
NUMBER = r"(\d[\d.e-]*(?<![.-]))"
SAID = {
    "objective.beta": rf"\bbeta {NUMBER}",
    "objective.alpha": rf"\balpha {NUMBER}",
    "objective.gamma": rf"[Gg]amma is (?:[\d.]+ x [\d.]+ = )?{NUMBER}",
    "objective.k": rf"\bk {NUMBER}",
    "objective.desirable_weight": rf"both weights {NUMBER}",
    "objective.undesirable_weight": rf"both weights {NUMBER}",
    "training.learning_rate": rf"(?:learning rate|RMSProp at|RMSprop at) {NUMBER}",
    "training.max_grad_norm": rf"clipped at {NUMBER}",
}
NO_NUMBER = {"objective.name", "objective.feature_set"}
WARM_UP = {"a tenth of warm-up": 0.1, "150 warm-up steps": 150}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant after": "constant_with_warmup"}


class StandIn(NamedTuple):
    """What a recipe's model is in little: as deep as the real one where the recipe reads a layer of it."""

    family: str
    layers: int
    write_sae: Callable[[Path, Any], str] | None = None


MODELS = {
    "gemma-2-2b-ultrafeedback": StandIn("gemma2", 26, write_gemma_scope),
    "gemma-2-9b-ultrafeedback": StandIn("gemma2", 42, write_gemma_scope),
    "gemma-2-9b-it-simpo": StandIn("gemma2", 3),
    "gemma-3-4b-it-ultrafeedback": StandIn("gemma3", 34, write_gemma_scope_2),
    "llama-3-8b-base-simpo": StandIn("llama", 3),
    "llama-3-8b-instruct-simpo": StandIn("llama", 3),
    "llama-3-8b-kto": StandIn("llama", 3),
    "pythia-2.8b-tdpo2": StandIn("gpt_neox", 3),
    "tulu-3-8b-dpo": StandIn("llama", 3),
    "zephyr-7b-dpo": StandIn("mistral", 3),
}


def stand_in(family: str, layers: int) -> PreTrainedModel:
    """Of 32 numbers per token."""
    if family != "gemma3":
        return tiny_model(family, num_hidden_layers=layers)
    torch.manual_seed(0)
    text = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": layers, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def in_little(name: str, world: TinyWorld) -> Recipe:
    """The recipe on a stand-in, on a CPU, where nothing is sharded; its objective and its schedule are its own."""
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    stand_in(*MODELS[name][:2]).save_pretrained(world.root / "model")
    overrides: dict[str, Any] = {
        "reference": {"model": str(world.root / "model"), "autocast": "bfloat16"},
        "data": {"source": str(world.root / "pairs"), "eval_split": "test", "max_length": 64},
        "cache.shard_pairs": 16,
        "training.max_steps": 1,
        "training.logging_steps": 1,
        "training.save_strategy": "no",
        "training.use_cpu": True,
        "training.fsdp": None,
    }
    if recipe.features:
        write = MODELS[name].write_sae
        assert write is not None
        # As deep inside its place as the real one.
        place = Path(recipe.features[0].sae.split("/", 2)[2])
        overrides["features.0.sae"] = write(world.root / "sae" / place, random_sae(d_in=32, d_sae=96))
        overrides["features.0.self_check"] = False
    sets = [
        f"{field}={yaml.safe_dump(value, default_flow_style=True, width=10**6)}" for field, value in overrides.items()
    ]
    return load_recipe(FOLDER / f"{name}.yaml", sets)


@pytest.mark.long
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_ready_recipe_caches_and_takes_a_step(name: str, tmp_path: Path) -> None:
    """Its hookpoints are there, its reference is computed as its policy, and its first loss has a gradient."""
    world = build_tiny_world(tmp_path / "world", 8, 4)
    recipe = in_little(name, world)
    assert recipe.objective == load_recipe(FOLDER / f"{name}.yaml").objective
    build_caches(recipe, world.store)
    report = align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    assert report.steps == 1
    assert report.parity is not None
    assert math.isfinite(report.last["loss"])
    assert report.last["grad_norm"] > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_ready_recipe_sets_what_its_comment_says(name: str, tmp_path: Path) -> None:
    """Every number of the objective, rate, warm-up and clipping; pairs per step on as many GPUs as it is for."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("#"))
    raw, recipe = yaml.safe_load(text), load_recipe(FOLDER / f"{name}.yaml")
    training = recipe.training
    values = {f"{part}.{field}": raw[part][field] for part in ("objective", "training") for field in raw[part]}
    assert {field for field in values if field.startswith("objective.")} <= {*SAID, *NO_NUMBER}
    for field in SAID.keys() & values.keys():
        said = re.search(SAID[field], comment)
        assert said, field
        assert float(said[1]) == float(values[field]), field
    assert [steps for phrase, steps in WARM_UP.items() if phrase in comment] == [training["warmup_steps"]]
    assert [kind for word, kind in SCHEDULES.items() if word in comment] == [training["lr_scheduler_type"]]
    size = re.search(r"(\d+) (pairs|completions) per step(?: on (\d+) GPUs)?", comment)
    assert size
    per_device = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1)
    completions = 2 if size[2] == "completions" else 1
    assert int(size[1]) == per_device * int(size[3] or 1) * completions
    assert bool(size[3]) == ("fsdp" in training)
    assert "tokens" not in comment or str(recipe.data.max_length) in comment
    assert "https://" in comment
    assert training_arguments(recipe.model_copy(update={"training": {**training, "use_cpu": True}}), tmp_path)
