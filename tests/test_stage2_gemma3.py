"""
Gemma-3 as the hub has it: a vision tower beside the decoder, and a config.json that leaves most fields to the defaults.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_saes import random_sae, write_saelens
from tiny_world import TinyWorld, build_tiny_world
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from fpo.interrupts import StopRequest
from fpo.scoring import load_model
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage1_cache.identity import cache_identities
from fpo.stage2_align import align
from fpo.stage2_align.align import _trainer
from fpo.stage2_align.arguments import training_arguments
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.measure import ObjectiveMeter
from fpo.stage2_align.policy import load_policy
from fpo.stage2_align.run import METRICS_FILE

TEXT = {
    "model_type": "gemma3_text",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 5,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A world whose model is a Gemma-3 with the vocabulary that its config.json does not name: 262,208 tokens."""
    world = build_tiny_world(tmp_path_factory.mktemp("world"), 12, 4)
    folder = world.root / "model"
    torch.manual_seed(0)
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    sparse = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 4,
        "text_config": TEXT,
        "vision_config": VISION,
    }
    (folder / "config.json").write_text(json.dumps(sparse))
    write_saelens(world.root / "sae", random_sae(seed=5, d_in=16, d_sae=48), "jumprelu")
    build_caches(world.recipe(), world.store)
    return world


def test_the_key_has_the_vocabulary_that_config_json_leaves_out(world: TinyWorld) -> None:
    scorer = cache_identities(world.recipe())[0].scorer
    assert scorer["vocab_size"] == 262_208
    assert scorer["reference"]["config"]["text_config"]["sliding_window"] == 5


def test_only_what_a_token_passes_through_requires_gradients(world: TinyWorld) -> None:
    model = load_model(world.root / "model", "float32")
    trained = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name.split(".")[1] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert trained == {"language_model"}
    assert frozen == {"vision_tower", "multi_modal_projector"}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "fc1"]])
def test_adapters_stand_in_the_decoder_alone(world: TinyWorld, tmp_path: Path, targets: str | list[str]) -> None:
    recipe = world.recipe(policy={"lora": {"r": 2, "target_modules": targets}})
    model = load_policy(recipe, ObjectiveMeter.of(recipe), tmp_path)
    adapted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapted
    assert all(".language_model." in name for name in adapted)


@pytest.mark.long
def test_two_processes_train_it_and_the_run_holds_the_whole_model(world: TinyWorld, tmp_path: Path) -> None:
    """`ddp_find_unused_parameters` is off: a tower without gradients would stop the second step."""
    training = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no", "optim": "sgd"}
    recipe = world.recipe_file(training=training)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fpo", "align", recipe, "--store", world.store, "--output", tmp_path / "run"]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors.decode()[-2000:]
    assert [row["step"] for row in read_metrics(tmp_path / "run" / METRICS_FILE)] == [1, 2, 3]
    before = load_file(world.root / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {"language_model", "model"}
    assert changed


def test_the_optimiser_sees_the_decoder_alone(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={"max_steps": 1, "save_strategy": "no"})
    cache = find_cache(recipe, world.store)
    trainer = _trainer(recipe, cache, training_arguments(recipe, tmp_path), tmp_path, StopRequest())
    trainer.create_optimizer()
    seen = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    names = {name for name, parameter in trainer.model.named_parameters() if id(parameter) in seen}
    assert names == {name for name, _ in trainer.model.named_parameters() if "language_model" in name}


def test_one_process_trains_it_from_its_cache(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={"max_steps": 2, "save_strategy": "no"})
    report = align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    assert report.parity == pytest.approx(0, abs=1e-5)
