"""Soft prompts: read once per row, each sequence's numbers are those of PEFT's own forward; trained, saved, opened."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_processes import run_two_processes
from safetensors.torch import load_file
from test_stage2_run import run, stopped_at
from test_stage2_saved import ordinary_logps, trained
from tiny_models import FAMILIES, ROWS_FAMILIES, tiny_model
from tiny_world import TinyWorld, build_adapted_world, build_tiny_world
from transformers import AutoTokenizer

from fpo.errors import ModelError, RecipeError, RunError
from fpo.recipe import Prompt, Recipe
from fpo.scoring import Layout, Scores, install_scoring, ordinary_forward, pack
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align, evaluate_run, merge_run
from fpo.stage2_align.adapters import with_prompt, without_prompt
from fpo.stage2_align.callbacks import read_metrics
from fpo.stage2_align.run import METRICS_FILE
from fpo.stage2_align.trainer import PairTrainer

peft = pytest.importorskip("peft")

KINDS = ["embeddings", "prefix"]
REFUSED = [("falcon_mamba", "embeddings"), ("falcon_mamba", "prefix")]
TEXT = "w3 w1 w4 w1 w5"
FAST = {"max_steps": 4, "learning_rate": 3e-2, "save_steps": 2, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = build_tiny_world(tmp_path_factory.mktemp("world"), 16, 4)
    build_caches(world.recipe(), world.store)
    return world


def prompted(world: TinyWorld, kind: str, training: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    prompt = {"kind": kind, "virtual_tokens": 5, "text": TEXT}
    return world.recipe(policy={"prompt": prompt}, training={**FAST, **(training or {})}, **sections)


def groups_of(sizes: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random groups; of each, the tokens of its prompt and of its completions."""
    flat = np.array([size for group in sizes for size in group])
    ids = np.random.default_rng(0).integers(0, 97, flat.sum())
    return ids, np.append(0, np.cumsum(flat)), np.array([len(group) - 1 for group in sizes])


def tiny_prompted(family: str, kind: str, text: str | None = None, **changes: Any) -> Any:
    model = tiny_model(family, **changes)
    install_scoring(model, ("model.layers.1",))
    torch.manual_seed(1)
    return with_prompt(model, Prompt(kind=kind, virtual_tokens=3, text=text), _NoTokenizer(), "base", None)  # type: ignore[arg-type]


class _NoTokenizer:
    """Tokens are the words' numbers."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def alone(model: Any, tokens: list[int]) -> torch.Tensor:
    """Log-probs of a sequence's tokens but the first, by PEFT's own forward."""
    with torch.no_grad(), ordinary_forward(model.get_base_model()):
        logits = type(model).forward(model, input_ids=torch.tensor([tokens])).logits[0, -len(tokens) :]
    return logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *itertools.product(FAMILIES, (Layout.PACKED, Layout.MASKED)),
        *((family, Layout.ROWS) for family in ROWS_FAMILIES),
    ],
)
def test_every_completion_scores_as_behind_the_soft_prompt_alone(family: str, layout: Layout, kind: str) -> None:
    if (family, kind) in REFUSED:
        with pytest.raises(RecipeError, match=rf"policy\.prompt\.kind: {family} takes no {kind} \("):
            tiny_prompted(family, kind)
        return
    model = tiny_prompted(family, kind)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_(0, 0.5)
    # The second has no prompt.
    ids, splits, n_completions = groups_of([[4, 9, 6], [0, 3, 7, 5], [11, 2]])
    packed = pack(ids, splits, n_completions, layout)
    scores: Scores = model.eval()(**packed._asdict())
    with without_prompt(model):
        bare: Scores = model(**packed._asdict())
    expected = []
    segment = 0
    for n in n_completions:
        prompt = ids[splits[segment] : splits[segment + 1]].tolist()
        for place in range(segment + 1, segment + 1 + n):
            tokens = prompt + ids[splits[place] : splits[place + 1]].tolist()
            if len(tokens) > 1:
                expected.append(alone(model, tokens)[max(len(prompt) - 1, 0) :])
        segment += n + 1
    torch.testing.assert_close(scores.token_logps, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert (bare.token_logps - scores.token_logps).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_both_kinds_begin_as_the_text_before_every_sequence(family: str) -> None:
    """A prefix holds the keys and values that the family makes of the text: behind either, the same numbers."""
    text = [5, 90, 17]
    ids, splits, n_completions = groups_of([[4, 9, 6], [7, 3, 8, 5], [11, 2]])
    packed = pack(ids, splits, n_completions)
    plain = tiny_model(family)
    install_scoring(plain, ("model.layers.1",))
    prompts = np.cumsum(n_completions + 1) - (n_completions + 1)
    told = np.insert(ids, np.repeat(splits[prompts], len(text)), text * len(prompts))
    grown = np.isin(np.arange(len(splits) - 1), prompts) * len(text)
    moved = np.append(0, np.cumsum(np.diff(splits) + grown))
    expected: Scores = plain.eval()(**pack(told, moved, n_completions)._asdict())
    for kind in KINDS:
        model = tiny_prompted(family, kind, " ".join(map(str, text))).eval()
        scores: Scores = model(**packed._asdict())
        torch.testing.assert_close(scores.token_logps, expected.token_logps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores.residuals[0], expected.residuals[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_the_soft_prompt_alone_and_plain_peft_opens_it(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    recipe = prompted(world, kind)
    cache = find_cache(recipe, world.store)
    expected = trained(recipe, cache, tmp_path, monkeypatch)
    (name,) = tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (name, len(tensors[name])) == ("prompt_embeddings", 5)
    assert json.loads((tmp_path / "run.json").read_text())["parity"] < 1e-6  # without it, the policy is the reference
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    pairs = cache.shard(0)
    torch.testing.assert_close(ordinary_logps(opened, pairs), expected, rtol=1e-4, atol=1e-5)
    held_out = find_cache(recipe, world.store, held_out=True)
    parts = ordinary_logps(opened, held_out.shard(0)).split(held_out.shard(0).lengths[1].tolist())
    chosen = torch.stack([part.sum() for part in parts]).view(-1, 2)[:, 0]
    metrics = evaluate_run(recipe, held_out, tmp_path)
    assert metrics["eval_logps/chosen"] == pytest.approx(float(chosen.mean()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_from_where_the_text_puts_it(world: TinyWorld, tmp_path: Path, kind: str) -> None:
    training = {"max_steps": 24, "per_device_train_batch_size": 16, "save_strategy": "no"}
    rows = run(world, prompted(world, kind, training), tmp_path)
    assert abs(rows[0]["loss"] - math.log(2)) > 1e-3
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1


def test_both_kinds_start_from_the_same_loss(world: TinyWorld, tmp_path: Path) -> None:
    first, other = (run(world, prompted(world, kind), tmp_path / kind)[0] for kind in KINDS)
    for name in ("loss", "logps/chosen", "features/distance_rejected"):
        assert other[name] == pytest.approx(first[name], rel=1e-4)
    assert other["grad_norm"] != pytest.approx(first["grad_norm"], rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_one_that_never_stopped(world: TinyWorld, tmp_path: Path, kind: str) -> None:
    recipe = prompted(world, kind)
    straight = run(world, recipe, tmp_path / "straight")
    stopped_at(world, recipe, tmp_path / "run", 2)
    assert run(world, recipe, tmp_path / "run", resume=True) == straight
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "straight"))
    assert torch.equal(ours["prompt_embeddings"], theirs["prompt_embeddings"])


def test_the_best_of_a_run_is_saved_and_samples_are_what_the_prompted_policy_says(
    world: TinyWorld, tmp_path: Path
) -> None:
    """Greedily, by PEFT's own forward, token by token."""
    for kind in KINDS:
        deciding = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_steps": 1}
        recipe = prompted(world, kind, deciding, generate={"every": 4, "prompts": 2, "max_new_tokens": 6})
        held_out = find_cache(recipe, world.store, held_out=True)
        folder = tmp_path / kind
        report = align(recipe, find_cache(recipe, world.store), folder, held_out=held_out)
        losses = [row["eval_loss"] for row in read_metrics(folder / METRICS_FILE) if "eval_loss" in row]
        assert report.best is not None
        assert evaluate_run(recipe, held_out, folder)["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
        last = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "checkpoint-4").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for line in (folder / "samples" / "step-4.jsonl").read_text().splitlines():
            row = json.loads(line)
            ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            for _ in range(6):
                with torch.no_grad():
                    ids.append(int(last(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
            said = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            assert ids[-len(said) :] == said


@pytest.mark.parametrize("kind", KINDS)
def test_two_batches_and_half_precision_serve_a_soft_prompt_too(world: TinyWorld, tmp_path: Path, kind: str) -> None:
    whole = run(world, prompted(world, kind, {"per_device_train_batch_size": 8}), tmp_path / "whole")
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    rows = run(world, prompted(world, kind, halves), tmp_path / "halves")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole], rel=1e-4)
    recipe = prompted(world, kind, {"bf16": True}, reference={"autocast": "bfloat16"})
    build_caches(recipe, world.store)
    mixed = run(world, recipe, tmp_path / "mixed")
    assert json.loads((tmp_path / "mixed" / "run.json").read_text())["parity"] < 1e-3  # 1e-2 without autocast
    single = run(world, prompted(world, kind), tmp_path / "single")
    assert mixed[0]["loss"] == pytest.approx(single[0]["loss"], rel=0.03)
    assert mixed[0]["grad_norm"] == pytest.approx(single[0]["grad_norm"], rel=0.1)


def test_activation_checkpointing_changes_no_gradient_of_embeddings_and_is_refused_for_a_prefix(
    world: TinyWorld, tmp_path: Path
) -> None:
    plain = run(world, prompted(world, "embeddings"), tmp_path / "plain")
    again = run(world, prompted(world, "embeddings", {"gradient_checkpointing": True}), tmp_path / "again")
    assert [row["grad_norm"] for row in again] == pytest.approx([row["grad_norm"] for row in plain], rel=1e-4)
    with pytest.raises(RecipeError, match=r"policy\.prompt\.kind: transformers drops a prefix where activations"):
        prompted(world, "prefix", {"gradient_checkpointing": True})


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"prompt": {}, "lora": {}}, "policy.prompt: a soft prompt is trained alone; leave policy.lora out"),
        ({"prompt": {"kind": "suffix"}}, "policy.prompt.kind"),
        ({"prompt": {"virtual_tokens": 0}}, "policy.prompt.virtual_tokens"),
        (
            {"prompt": {"virtual_tokens": 60}},
            r"60 before a sequence of \d+ tokens are more than the model's 64",
        ),
        ({"prompt": {"text": ""}}, None),
    ],
)
def test_what_no_soft_prompt_can_be_is_refused(
    world: TinyWorld, tmp_path: Path, policy: dict[str, Any], message: str | None
) -> None:
    def start() -> None:
        recipe = world.recipe(policy=policy, training=FAST)
        align(recipe, find_cache(recipe, world.store), tmp_path)

    if message is None:  # its tokenizer puts a <bos> before an empty text
        start()
        return
    with pytest.raises(RecipeError, match=message):
        start()


def test_a_soft_prompt_is_neither_merged_nor_a_references(world: TinyWorld, tmp_path: Path) -> None:
    recipe = prompted(world, "embeddings")
    align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    with pytest.raises(RunError, match="a soft prompt is no change of weights"):
        merge_run(tmp_path / "run")
    reference = world.recipe(reference={"adapter": str(tmp_path / "run")})
    with pytest.raises(ModelError, match="a soft prompt is no change of weights; a reference has none"):
        build_caches(reference, tmp_path / "store")


def test_a_soft_prompt_on_an_adapted_reference_stands_on_the_weights_that_were_scored(tmp_path: Path) -> None:
    world = build_adapted_world(tmp_path / "world")
    recipe = prompted(world, "embeddings", reference={"adapter": str(world.root / "adapter")})
    build_caches(recipe, world.store)
    report = align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    assert report.parity == pytest.approx(0, abs=1e-5)
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    base = load_file(tmp_path / "run" / "base" / "model.safetensors")
    inside = opened.get_base_model().state_dict()
    assert all(torch.equal(inside[name], tensor) for name, tensor in base.items())


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_the_soft_prompt_of_one(tmp_path: Path, kind: str) -> None:
    world = build_tiny_world(tmp_path / "world", 16, 2)
    sgd = {"optim": "sgd", "learning_rate": 1e-2, "save_strategy": "no", "num_train_epochs": 1, "max_grad_norm": 0.0}
    one = prompted(world, kind, {**sgd, "max_steps": -1, "per_device_train_batch_size": 8})
    build_caches(one, world.store)
    align(one, find_cache(one, world.store), tmp_path / "one")
    policy = {"prompt": {"kind": kind, "virtual_tokens": 5, "text": TEXT}}
    two = world.recipe_file(policy=policy, training={**sgd, "per_device_train_batch_size": 4})
    run_two_processes(two, world.store, tmp_path / "two")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_soft_prompt_is_refused_where_it_would_be_sharded(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialise = PairTrainer.__init__

    def sharded(self: PairTrainer, *args: Any) -> None:
        initialise(self, *args)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(PairTrainer, "__init__", sharded)
    recipe = prompted(world, "embeddings")
    with pytest.raises(RecipeError, match=r"policy\.prompt: PEFT saves no soft prompt that is sharded"):
        align(recipe, find_cache(recipe, world.store), tmp_path)
