"""Stage 2: resumed, accumulated and distributed runs give one run's losses; what does not fit is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from run_processes import run_process, run_two_processes
from safetensors.torch import load_file, save_file
from tiny_world import TinyWorld, build_adapted_world, build_tiny_world
from transformers import AutoModelForCausalLM, AutoTokenizer

from fpo.errors import CacheDamaged, ParityError, RecipeError, RunError
from fpo.recipe import Recipe
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align, evaluate_run
from fpo.stage2_align.arguments import training_arguments
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.run import METRICS_FILE, read_run
from fpo.stage2_align.stream import PairStream
from fpo.store import Cache


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = build_tiny_world(tmp_path_factory.mktemp("world"))
    build_caches(world.recipe(), world.store)
    return world


def cached(world: TinyWorld, recipe: Recipe) -> Cache:
    return find_cache(recipe, world.store)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / METRICS_FILE)]


def test_a_run_folder_holds_recipe_metrics_and_a_policy_that_transformers_opens(
    world: TinyWorld, tmp_path: Path
) -> None:
    recipe = world.recipe()
    report = align(recipe, cached(world, recipe), tmp_path / "run")
    assert report.steps == 20
    assert report.parity is not None
    assert report.parity < 1e-5
    rows = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    trl = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"}
    assert not [name for name in rows[-1] if name.startswith("train_")]
    assert trl | {"features/distance_chosen", "features/distance_rejected", "grad_norm"} <= rows[-1].keys()
    facts = read_run(tmp_path / "run")
    cache = cached(world, recipe)
    assert (facts["cache"], facts["manifest_digest"], facts["complete"]) == (cache.key, cache.digest, True)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    reference = AutoModelForCausalLM.from_pretrained(world.root / "model")
    moved = [not torch.equal(a, b) for a, b in zip(policy.parameters(), reference.parameters(), strict=True)]
    assert all(moved)
    assert AutoTokenizer.from_pretrained(tmp_path / "run")("w1 w2").input_ids == [1, 5, 6]


@pytest.mark.long
def test_a_run_killed_anywhere_and_resumed_has_the_losses_of_one_never_interrupted(
    world: TinyWorld, tmp_path: Path
) -> None:
    """SIGKILL after steps 3 (before any checkpoint), 9 and 16; checkpoints stand at 7, 14 and 20 of 20 steps."""
    recipe_file = world.recipe_file(training={"seed": 5})
    recipe = world.recipe(training={"seed": 5})
    align(recipe, cached(world, recipe), tmp_path / "straight")
    resume: list[str] = []
    for step in (3, 9, 16):
        process = run_process(recipe_file, world.store, tmp_path / "killed", *resume)
        while process.poll() is None and len(losses(tmp_path / "killed")) < step:
            time.sleep(0.002)
        assert process.poll() is None, "the run ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        resume = ["--resume"]
    align(recipe, cached(world, recipe), tmp_path / "killed", resume=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    for name, tensor in load_file(tmp_path / "straight" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "killed" / "model.safetensors")[name]), name


def test_a_resumed_run_logs_the_same_means_where_a_checkpoint_stands_between_two_logs(
    world: TinyWorld, tmp_path: Path
) -> None:
    """Checkpoints at 7 and 14, logs at 5, 10, 15, 20; what came after step 14's checkpoint is taken away."""
    recipe = world.recipe(training={"logging_steps": 5})
    align(recipe, cached(world, recipe), tmp_path / "run")
    straight = read_metrics(tmp_path / "run" / METRICS_FILE)
    shutil.rmtree(tmp_path / "run" / "checkpoint-20")
    facts = read_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({**facts, "complete": False}))
    align(recipe, cached(world, recipe), tmp_path / "run", resume=True)
    assert read_metrics(tmp_path / "run" / METRICS_FILE) == straight
    assert len(straight) == 4
    # Every pair was read as often as there were epochs, its prompt with each of its completions.
    shards = [cached(world, recipe).shard(sid).lengths for sid in range(3)]
    assert straight[-1]["num_tokens"] == 2 * sum(2 * prompts.sum() + own.sum() for prompts, own in shards)


def test_accumulated_steps_see_the_same_pairs_and_give_the_same_losses(world: TinyWorld, tmp_path: Path) -> None:
    at_once = world.recipe(training={"per_device_train_batch_size": 8})
    in_parts = world.recipe(training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    align(at_once, cached(world, at_once), tmp_path / "at_once")
    align(in_parts, cached(world, in_parts), tmp_path / "in_parts")
    assert losses(tmp_path / "in_parts") == pytest.approx(losses(tmp_path / "at_once"), rel=2e-3)
    assert losses(tmp_path / "in_parts")[:2] == pytest.approx(losses(tmp_path / "at_once")[:2], rel=1e-5)


@pytest.mark.long
def test_a_step_is_the_same_for_any_number_of_processes_and_of_forwards(tmp_path: Path) -> None:
    """
    23 pairs in steps of 8, so that an epoch's last step has 7: by one process at once, in two forwards of 4, and by two
    gloo processes of 4 each, one of which repeats a pair in the last step.
    """
    world = build_tiny_world(tmp_path / "world", 23, 2)
    sgd = {"optim": "sgd", "learning_rate": 3e-2, "save_strategy": "no"}
    one = world.recipe(training={**sgd, "per_device_train_batch_size": 8})
    build_caches(one, world.store)
    report = align(one, cached(world, one), tmp_path / "one")
    assert (report.steps, report.pairs) == (6, 46)
    split = {**sgd, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert align(world.recipe(training=split), cached(world, one), tmp_path / "forwards").pairs == 46
    two = world.recipe_file(training={**sgd, "per_device_train_batch_size": 4})
    run_two_processes(two, world.store, tmp_path / "processes")
    before = load_file(world.root / "model" / "model.safetensors")
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert max(float((expected[name] - before[name]).abs().max()) for name in before) > 1e-3
    for run in ("forwards", "processes"):
        for row, other in zip(*(read_metrics(tmp_path / name / METRICS_FILE) for name in ("one", run)), strict=True):
            assert other["num_tokens"] == row["num_tokens"]
            of_tokens = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")
            for name in ("loss", "rewards/margins", "logps/chosen", "features/distance_rejected", *of_tokens):
                assert other[name] == pytest.approx(row[name], rel=1e-5, abs=1e-6), (run, row["step"], name)
        for name, tensor in load_file(tmp_path / run / "model.safetensors").items():
            assert (tensor - expected[name]).abs().max() < 2e-6, (run, name)


def test_low_rank_adapters_train_and_evaluate(world: TinyWorld, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    recipe = world.recipe(policy={"lora": {"r": 4, "alpha": 8}}, training={"max_steps": 5, "learning_rate": 1e-2})
    report = align(recipe, cached(world, recipe), tmp_path / "run")
    assert report.parity is not None
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    metrics = evaluate_run(recipe, find_cache(recipe, world.store, held_out=True), tmp_path / "run")
    assert metrics["eval_loss"] != pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["whole", "adapter"])
def test_a_reference_with_an_adapter_is_where_training_and_evaluation_start(
    lora: dict[str, int] | None, tmp_path: Path
) -> None:
    world = build_adapted_world(tmp_path / "world")
    reference = {"adapter": str(world.root / "adapter")}
    training = {"max_steps": 1, "learning_rate": 0.0}
    recipe = world.recipe(reference=reference, policy={"lora": lora}, training=training)
    build_caches(recipe, world.store)
    assert align(recipe, cached(world, recipe), tmp_path / "run").parity == pytest.approx(0, abs=1e-5)
    metrics = evaluate_run(recipe, find_cache(recipe, world.store, held_out=True), tmp_path / "run")
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    bare = world.recipe()
    build_caches(bare, world.store)
    with pytest.raises(RunError, match="against another reference"):
        evaluate_run(bare, find_cache(bare, world.store, held_out=True), tmp_path / "run")


def test_the_saved_policy_is_an_ordinary_model(tmp_path: Path) -> None:
    """Dropout and cache as the model had them, not as training needed them."""
    world = build_tiny_world(tmp_path / "world", 8, 2, family="gpt2")
    recipe = world.recipe(features=[], objective={"name": "dpo"}, training={"max_steps": 1})
    build_caches(recipe, world.store)
    align(recipe, cached(world, recipe), tmp_path / "run")
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (world.root / "model", tmp_path / "run")
    )
    assert before == after


def test_a_start_that_failed_before_the_first_step_does_not_block_its_folder(world: TinyWorld, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    wrong = world.recipe(policy={"lora": {"target_modules": ["nope"]}}, training={"max_steps": 1})
    with pytest.raises(RecipeError, match=r"policy\.lora\.target_modules"):
        align(wrong, cached(world, wrong), tmp_path / "run")
    right = world.recipe(policy={"lora": {"target_modules": ["q_proj"]}}, training={"max_steps": 1})
    assert align(right, cached(world, right), tmp_path / "run").steps == 1


def test_a_policy_with_another_vocabulary_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    other = build_tiny_world(tmp_path / "other", 4, 2)
    tokenizer = json.loads((other.root / "model" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (other.root / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = world.recipe(policy={"model": str(other.root / "model")})
    with pytest.raises(
        RecipeError, match=r"policy\.model: .* has another vocabulary than the cached pairs: token 'w[12]'"
    ):
        align(recipe, cached(world, recipe), tmp_path / "run")


def test_every_pair_of_an_uneven_last_step_weighs_the_same(world: TinyWorld, tmp_path: Path) -> None:
    """40 pairs in one step of 48: at once, or cut as 16 + 16 + 8."""
    at_once = world.recipe(training={"per_device_train_batch_size": 48, "num_train_epochs": 1})
    cut = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 3, "num_train_epochs": 1}
    in_parts = world.recipe(training=cut)
    align(at_once, cached(world, at_once), tmp_path / "at_once")
    align(in_parts, cached(world, in_parts), tmp_path / "in_parts")
    one, other = (read_metrics(tmp_path / run / METRICS_FILE)[0] for run in ("at_once", "in_parts"))
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_the_reference_evaluates_to_log_2_and_zero_distance(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={"max_steps": 1, "learning_rate": 0.0})
    align(recipe, cached(world, recipe), tmp_path / "run")
    metrics = evaluate_run(recipe, find_cache(recipe, world.store, held_out=True), tmp_path / "run")
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["eval_features/distance_rejected"] == pytest.approx(0, abs=1e-9)


def test_gradient_checkpointing_changes_no_loss(world: TinyWorld, tmp_path: Path) -> None:
    plain, checkpointed = world.recipe(), world.recipe(training={"activation_checkpointing": True})
    align(plain, cached(world, plain), tmp_path / "plain")
    align(checkpointed, cached(world, checkpointed), tmp_path / "checkpointed")
    assert losses(tmp_path / "checkpointed")[:3] == pytest.approx(losses(tmp_path / "plain")[:3], rel=1e-5)


def test_dropout_is_off_in_training_too(tmp_path: Path) -> None:
    """GPT-2 has dropout 0.1 in its config: with it the first loss would not be log 2."""
    world = build_tiny_world(tmp_path / "world", 8, 2, family="gpt2")
    recipe = world.recipe(features=[], objective={"name": "dpo"}, training={"max_steps": 1})
    build_caches(recipe, world.store)
    align(recipe, cached(world, recipe), tmp_path / "run")
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_parity_refuses_a_policy_that_is_not_the_cached_reference(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = world.recipe()
    cache = cached(world, recipe)
    other = build_tiny_world(tmp_path / "other", 4, 2)
    weights = other.root / "model" / "model.safetensors"
    tensors = {name: tensor * 1.1 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    moved = Recipe.model_validate({**recipe.model_dump(), "reference": {"model": str(other.root / "model")}})
    with pytest.raises(ParityError, match="does not reproduce the cached reference: token log-probs differ by"):
        align(moved, cache, tmp_path / "run")


def test_an_existing_run_is_not_overwritten_nor_resumed_with_another_recipe(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={"max_steps": 2})
    align(recipe, cached(world, recipe), tmp_path / "run")
    with pytest.raises(RunError, match="this run exists; continue it with --resume"):
        align(recipe, cached(world, recipe), tmp_path / "run")
    changed = world.recipe(training={"max_steps": 2}, objective={"beta": 3.0})
    with pytest.raises(RunError, match=r"began with objective\.beta: 2\.0, the recipe says 3\.0"):
        align(changed, cached(world, changed), tmp_path / "run", resume=True)
    assert align(recipe, cached(world, recipe), tmp_path / "run", resume=True).steps == 2


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"optim": "adamw_8bit"}, r"training\.optim: adamw_8bit: .*bitsandbytes"),
        ({"optim": "galore_adamw"}, r"training\.optim: galore_adamw"),
        ({"optim": "sgd", "optim_args": "momentum=0.9, nope=1"}, r"training\.optim_args: nope=1: the optimizer sgd"),
        ({"optim": "sgd", "adam_beta1": 0.8}, r"training\.adam_beta1: the optimizer sgd has none"),
        ({"optim_target_modules": "all-linear"}, r"training\.optim_target_modules: the optimizer adamw_torch\w* has"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 9}, r"training\.warmup_steps: .* take constant_with_warmup"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, r"training\.lr_scheduler_kwargs"),
        ({"report_to": "wandb"}, r"training\.report_to: WandbCallback requires wandb to be installed"),
        ({"report_to": "wandbb"}, r"training\.report_to: wandbb is not supported"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, r"training\.lr_scheduler_type: cosine_with_min_lr: .*min_lr"),
        ({"deepspeed": "zero.json"}, r"training\.deepspeed: the package is not installed: pip install deepspeed"),
        ({"fp16": True}, r"training\.fp16: float16 needs a GPU, and torch finds none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_values_that_transformers_refuses_are_named_before_anything_loads(
    world: TinyWorld, tmp_path: Path, training: dict[str, object], message: str
) -> None:
    recipe = world.recipe(training=training, policy={"same_arithmetic": False})
    with pytest.raises(RecipeError, match=message):
        align(recipe, cached(world, recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_asked_for_and_not_there_is_no_reason_to_use_the_cpu(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    recipe = world.recipe(training={"use_cpu": False})
    with pytest.raises(RecipeError, match=r"CUDA_VISIBLE_DEVICES=0 asks for a GPU, and torch finds none; set training"):
        align(recipe, cached(world, recipe), tmp_path / "run")


def test_the_old_name_of_activation_checkpointing_is_understood_without_a_warning(
    world: TinyWorld, tmp_path: Path
) -> None:
    recipe = world.recipe(training={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {}})
    assert training_arguments(recipe, tmp_path).activation_checkpointing is True


def test_a_damaged_shard_trains_nothing(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe()
    build_caches(recipe, tmp_path / "store")
    cache = find_cache(recipe, tmp_path / "store")
    shard = tmp_path / "store" / cache.key / "shards" / "000001.zarr.zip"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(CacheDamaged, match=r"000001\.zarr\.zip"):
        align(recipe, find_cache(recipe, tmp_path / "store"), tmp_path / "run")
    assert losses(tmp_path / "run") == []


def ids_of(stream: PairStream) -> list[list[int]]:
    return [batch["ref_logps"][::2].tolist() for batch in stream if batch is not None]


def test_a_stream_that_starts_in_the_middle_gives_what_a_whole_one_gives_there(world: TinyWorld) -> None:
    cache = cached(world, world.recipe())
    whole = PairStream(cache, seed=1, per_device=3, accumulation=2, block_shards=1)
    whole.start(epoch=2)
    everything = ids_of(whole)
    assert len(everything) == len(whole) == 14  # 40 pairs: six steps of two batches of 3, and 4 pairs in 3 + 1
    assert sorted(len(batch) for batch in everything) == [1] + [3] * 13
    for skip in range(len(everything)):
        part = PairStream(cache, seed=1, per_device=3, accumulation=2, block_shards=1)
        part.start(epoch=2, skip=skip)
        assert ids_of(part) == everything[skip:]


def test_ranks_share_every_step_evenly_and_miss_no_pair(world: TinyWorld) -> None:
    cache = cached(world, world.recipe())
    alone = PairStream(cache, seed=1, per_device=6)
    ranks = [PairStream(cache, seed=1, per_device=2, rank=rank, world=3) for rank in range(3)]
    split = [ids_of(stream) for stream in ranks]
    assert len({len(batches) for batches in split}) == 1
    for step, whole in enumerate(ids_of(alone)):
        parts = [split[rank][step] for rank in range(3)]
        assert len({len(part) for part in parts}) == 1
        assert set(whole) == {value for part in parts for value in part}
