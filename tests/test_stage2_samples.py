"""Samples in training: what `generate` says with the policy of that step, and nothing of the training is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_world import TinyWorld, build_tiny_world
from transformers import AutoModelForCausalLM, AutoTokenizer

from fpo.errors import DataError, RecipeError
from fpo.recipe import Recipe
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.run import METRICS_FILE
from fpo.stage2_align.samples import first_prompts

TRAINING = {"learning_rate": 1e-2, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
EVERY_TWO = {"every": 2, "prompts": 3, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = build_tiny_world(tmp_path_factory.mktemp("world"), 16, 7)
    build_caches(recipe_of(world), world.store)
    return world


def recipe_of(world: TinyWorld, generate: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    own = {"features": [], "objective": {"name": "dpo"}, "training": TRAINING}
    return world.recipe(**{**own, **sections}, generate=generate)


def run(world: TinyWorld, recipe: Recipe, folder: Path, *, resume: bool = False) -> None:
    held_out = None if recipe.generate is None else find_cache(recipe, world.store, held_out=True)
    align(recipe, find_cache(recipe, world.store), folder, resume, held_out)


def samples(folder: Path, step: int) -> list[dict[str, Any]]:
    text = (folder / "samples" / f"step-{step}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def held_out_rows(world: TinyWorld) -> list[dict[str, str]]:
    text = (world.root / "pairs" / "test.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("lora", "mixed"), [(None, False), ({"r": 4}, False), (None, True)], ids=["whole", "adapter", "mixed-precision"]
)
def test_a_sample_is_what_transformers_generates_with_the_checkpoint_of_that_step(
    world: TinyWorld, tmp_path: Path, lora: dict[str, int] | None, mixed: bool
) -> None:
    """In mixed precision too: a checkpoint's weights are float32, and nothing casts what `generate` calls."""
    if lora is not None:
        pytest.importorskip("peft")
    policy, training = {"lora": lora, "same_arithmetic": not mixed}, {**TRAINING, "bf16": mixed}
    run(world, recipe_of(world, EVERY_TWO, policy=policy, training=training), tmp_path)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-2.jsonl", "step-4.jsonl"]
    tokenizer = AutoTokenizer.from_pretrained(world.root / "model")
    for step in (2, 4):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        found = samples(tmp_path, step)
        assert len({row["group_id"] for row in found}) == 3
        for row in found:
            ids = tokenizer(held_out_rows(world)[row["group_id"]]["prompt"], return_tensors="pt").input_ids
            assert row["prompt"] == tokenizer.decode(ids[0])
            written = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
            assert row["completion"] == tokenizer.decode(written)
    assert samples(tmp_path, 2) != samples(tmp_path, 4)


def test_samples_change_no_loss_no_weight_and_no_random_number(world: TinyWorld, tmp_path: Path) -> None:
    """Also where they are drawn; the state of the generators stands in the checkpoint."""
    run(world, recipe_of(world), tmp_path / "without")
    run(world, recipe_of(world, {**EVERY_TWO, "temperature": 0.8}), tmp_path / "with")
    assert read_metrics(tmp_path / "with" / METRICS_FILE) == read_metrics(tmp_path / "without" / METRICS_FILE)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    states = [
        torch.load(tmp_path / name / "checkpoint-4" / "rng_state.pth", weights_only=False)["cpu"]
        for name in ("with", "without")
    ]
    assert torch.equal(*states)


def test_drawn_samples_are_those_of_the_seed_and_a_resumed_run_may_ask_for_others(
    world: TinyWorld, tmp_path: Path
) -> None:
    """The policy stays the reference, so that the seed alone decides."""
    drawn = {**EVERY_TWO, "temperature": 2.0}
    still = {**TRAINING, "lr_scheduler_type": "constant", "learning_rate": 0.0, "max_steps": 2}
    for name, seed in (("one", 1), ("two", 1), ("other", 7)):
        run(world, recipe_of(world, drawn, training={**still, "seed": seed}), tmp_path / name)
    assert samples(tmp_path / "one", 2) == samples(tmp_path / "two", 2)
    assert samples(tmp_path / "one", 2) != samples(tmp_path / "other", 2)
    fewer = {"every": 3, "prompts": 1, "max_new_tokens": 2}
    longer = recipe_of(world, fewer, training={**still, "seed": 1, "max_steps": 3})
    run(world, longer, tmp_path / "one", resume=True)
    assert [len(samples(tmp_path / "one", step)) for step in (2, 3)] == [3, 1]


def test_samples_are_no_part_of_a_cache(world: TinyWorld) -> None:
    plain, asked = recipe_of(world), recipe_of(world, EVERY_TWO)
    assert find_cache(plain, world.store).key == find_cache(asked, world.store).key


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"eval_split": None}}, "generate: there are no held-out groups; name a split in data.eval_split"),
        ({"training": {"fsdp": "full_shard"}}, "generate: training.fsdp leaves no process the whole policy"),
        ({"training": {"deepspeed": "zero.json"}}, "generate: training.deepspeed leaves no process the whole policy"),
    ],
)
def test_a_recipe_that_could_not_generate_is_refused(world: TinyWorld, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(world, EVERY_TWO, policy={"same_arithmetic": False}, **sections)


def test_completions_that_would_outgrow_the_model_are_refused_before_the_first_step(
    world: TinyWorld, tmp_path: Path
) -> None:
    with pytest.raises(
        RecipeError, match=r"generate\.max_new_tokens: 99999 tokens behind a prompt of \d+ are more than"
    ):
        run(world, recipe_of(world, {**EVERY_TWO, "max_new_tokens": 99999}), tmp_path)
    assert read_metrics(tmp_path / METRICS_FILE) == []


def test_groups_without_a_prompt_are_passed_over(world: TinyWorld, tmp_path: Path) -> None:
    """A tokenizer without a first token, so that an empty prompt has none."""
    rows = [{"prompt": "", "chosen": "w1 w2", "rejected": "w3"}, {"prompt": "w5 ", "chosen": "w1", "rejected": "w3"}]
    kept = [rows, rows[:1]]
    for number, some in enumerate(kept):
        source = tmp_path / f"{number}"
        source.mkdir()
        for split in ("train", "test"):
            (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    folder = bare_tokenizer(world, tmp_path / "tokenizer")
    data = {"source": str(tmp_path / "0"), "tokenizer": str(folder)}
    [_, held_out] = build_caches(recipe_of(world, data=data), tmp_path / "store")
    [(group, prompt)] = first_prompts(held_out.cache, 4)
    assert (group, len(prompt)) == (1, 1)
    [_, none] = build_caches(recipe_of(world, data={**data, "source": str(tmp_path / "1")}), tmp_path / "store")
    with pytest.raises(DataError, match="has a prompt to continue"):
        first_prompts(none.cache, 4)


def bare_tokenizer(world: TinyWorld, folder: Path) -> Path:
    """The world's, without what it puts before every text."""
    AutoTokenizer.from_pretrained(world.root / "model").save_pretrained(folder)
    backend = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**backend, "post_processor": None}))
    return folder
