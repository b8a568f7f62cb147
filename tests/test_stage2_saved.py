"""Stage 2: what stands in a run folder is the model that was trained, whole, or the run is not complete."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_processes import run_two_processes
from safetensors.torch import load_file, save_file
from tiny_world import TinyWorld, build_adapted_world, build_tiny_world
from torch import Tensor
from transformers import AutoModelForCausalLM

from fpo.errors import RunError
from fpo.recipe import Recipe
from fpo.scoring import Packed, model_folder, pack
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align, evaluate_run
from fpo.stage2_align import policy as policy_module
from fpo.stage2_align.measure import ObjectiveMeter
from fpo.stage2_align.policy import load_policy
from fpo.stage2_align.run import read_run
from fpo.stage2_align.trainer import PairTrainer
from fpo.store import Cache, Groups

# The package exports a function of the module's name.
aligning = importlib.import_module("fpo.stage2_align.align")


@pytest.fixture
def adapted(tmp_path: Path) -> TinyWorld:
    return build_adapted_world(tmp_path / "world")


def trained(recipe: Recipe, cache: Cache, run: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Train; token log-probs of the cache's pairs by the policy in memory, just before it is saved."""
    pairs = cache.shard(0)
    packed = pack(pairs.input_ids, pairs.splits, pairs.n_completions)
    found: list[Tensor] = []
    save = aligning.save_policy

    def score_and_save(trainer: PairTrainer, *rest: Any) -> None:
        with torch.no_grad():
            found.append(trainer.model.eval()(**Packed(*packed)._asdict()).token_logps)
        save(trainer, *rest)

    monkeypatch.setattr(aligning, "save_policy", score_and_save)
    align(recipe, cache, run)
    return found[0]


def ordinary_logps(model: Any, pairs: Groups) -> Tensor:
    """The same by a model's own forward, one sequence at a time."""
    parts = []
    splits = pairs.splits.astype(int)
    for start, chosen, rejected, end in zip(splits[:-1:3], splits[1::3], splits[2::3], splits[3::3], strict=True):
        for first, last in ((chosen, rejected), (rejected, end)):
            ids = np.concatenate([pairs.input_ids[start:chosen], pairs.input_ids[first:last]]).astype(np.int64)
            sequence = torch.from_numpy(ids)[None]
            with torch.no_grad():
                # A soft prompt's tokens stand before them.
                logps = model(input_ids=sequence, use_cache=False).logits[0, -len(ids) :].log_softmax(-1)
            at = torch.arange(chosen - start, len(ids))
            parts.append(logps[at - 1, sequence[0, at]])
    return torch.cat(parts)


def test_an_adapter_trained_on_an_adapted_reference_opens_as_the_model_that_was_trained(
    adapted: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By PEFT, by plain transformers and by fpo evaluate; the run, its checkpoints, and the run in another place."""
    peft = pytest.importorskip("peft")
    recipe = adapted.recipe(
        reference={"adapter": str(adapted.root / "adapter")},
        policy={"lora": {"r": 4, "alpha": 8}},
        training={"max_steps": 4, "save_steps": 4, "learning_rate": 1e-2},
    )
    build_caches(recipe, adapted.store)
    cache = find_cache(recipe, adapted.store)
    run = tmp_path / "run"
    expected = trained(recipe, cache, run, monkeypatch)
    pairs = cache.shard(0)
    bare = ordinary_logps(AutoModelForCausalLM.from_pretrained(adapted.root / "model"), pairs)
    assert (expected - bare).abs().mean() > 0.5
    assert (expected - torch.from_numpy(pairs.token_logps)).abs().mean() > 0.01
    for folder in (run, run / "checkpoint-4"):
        for kind in (peft.AutoPeftModelForCausalLM, AutoModelForCausalLM):
            opened = kind.from_pretrained(folder).eval()
            torch.testing.assert_close(ordinary_logps(opened, pairs), expected, rtol=1e-5, atol=0)
    held_out = find_cache(recipe, adapted.store, held_out=True)
    metrics = evaluate_run(recipe, held_out, run)
    logps = ordinary_logps(opened, held_out.shard(0))
    lengths = held_out.shard(0).lengths[1].tolist()
    sums = torch.stack([part.sum() for part in logps.split(lengths)]).view(-1, 2)
    assert metrics["eval_logps/chosen"] == pytest.approx(float(sums[:, 0].mean()), rel=1e-5)
    shutil.move(run, tmp_path / "elsewhere")
    assert evaluate_run(recipe, held_out, tmp_path / "elsewhere") == metrics
    shutil.rmtree(tmp_path / "elsewhere" / "base")
    with pytest.raises(RunError, match=r"trained on the weights in .*elsewhere/base, which are not there"):
        evaluate_run(recipe, held_out, tmp_path / "elsewhere")


def test_a_base_that_a_failed_start_left_neither_blocks_the_folder_nor_is_taken_for_the_next_ones(
    adapted: TinyWorld, tmp_path: Path
) -> None:
    (tmp_path / "run" / "base").mkdir(parents=True)
    (tmp_path / "run" / "base" / "config.json").write_text("{}")
    reference = {"adapter": str(adapted.root / "adapter")}
    recipe = adapted.recipe(reference=reference, policy={"lora": {"r": 4}}, training={"max_steps": 1})
    build_caches(recipe, adapted.store)
    align(recipe, find_cache(recipe, adapted.store), tmp_path / "run")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "base").config.model_type == "llama"


def test_an_adapter_on_a_hub_model_names_its_id_and_the_commit_that_was_loaded(
    adapted: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = tmp_path / "snapshots" / ("b" * 40)
    shutil.copytree(adapted.root / "model", commit)

    def found(name: str, revision: str | None = None) -> Path:
        return commit if (name, revision) == ("owner/tiny", "v1") else model_folder(name, revision)

    monkeypatch.setattr(policy_module, "model_folder", found)
    reference = {"model": "owner/tiny", "revision": "v1"}
    recipe = adapted.recipe(reference=reference, policy={"lora": {"r": 2}}, objective={"name": "simpo"}, features=[])
    policy: Any = load_policy(recipe, ObjectiveMeter.of(recipe), tmp_path / "run")
    policy.peft_config["default"].save_pretrained(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/tiny", "b" * 40)


def lose_everything(run: Path) -> None:
    (run / "model.safetensors").unlink()


def lose_a_tensor(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})


def cut_a_tensor(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:7]
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})


def lose_a_number(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})


def cut_the_file(run: Path) -> None:
    file = run / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_everything, "none were written"),
        (lose_a_tensor, r"1 of the policy's 30 tensors are missing, first model\.layers\.1\.mlp\.up_proj\.weight"),
        (cut_a_tensor, r"model\.norm\.weight has shape \(7,\), the policy's is \(32,\)"),
        (lose_a_number, "model.norm.weight in model.safetensors holds numbers that are not finite"),
        (cut_the_file, "not the policy's"),
    ],
)
def test_a_run_is_complete_only_after_its_weights_were_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, message: str
) -> None:
    world = build_tiny_world(tmp_path / "world", 8, 2)
    recipe = world.recipe(features=[], objective={"name": "dpo"}, training={"max_steps": 2, "save_steps": 2})
    build_caches(recipe, world.store)
    cache = find_cache(recipe, world.store)
    with monkeypatch.context() as patched:
        whole = PairTrainer.save_model

        def damaged(self: PairTrainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
            whole(self, output_dir, _internal_call)
            if not _internal_call:
                damage(Path(str(output_dir)))

        patched.setattr(PairTrainer, "save_model", damaged)
        with pytest.raises(RunError, match=message):
            align(recipe, cache, tmp_path / "run")
    assert not read_run(tmp_path / "run")["complete"]
    assert align(recipe, cache, tmp_path / "run", resume=True).steps == 2
    assert read_run(tmp_path / "run")["complete"]


@pytest.mark.long
def test_fsdp_with_sharded_checkpoints_ends_with_whole_weights(tmp_path: Path) -> None:
    """accelerate's defaults for FSDP2, in two gloo processes; held to one process."""
    world = build_tiny_world(tmp_path / "world", 16, 2)
    sgd = {"optim": "sgd", "learning_rate": 3e-2, "save_steps": 1, "num_train_epochs": 1, "max_grad_norm": 0.0}
    one = world.recipe(training={**sgd, "per_device_train_batch_size": 8})
    build_caches(one, world.store)
    align(one, find_cache(one, world.store), tmp_path / "one")
    two = world.recipe_file(training={**sgd, "per_device_train_batch_size": 4})
    sharded = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    run = tmp_path / "two"
    program = [sys.executable, str(Path(__file__).with_name("fsdp_on_cpu.py"))]
    run_two_processes(two, world.store, run, program=program, **sharded)
    assert (run / "checkpoint-1" / "pytorch_model_fsdp_0").is_dir()
    assert not (run / "checkpoint-1" / "model.safetensors").exists()
    costs = [read_run(tmp_path / name)["cost"] for name in ("one", "two")]
    assert [cost["tokens"] for cost in costs] == [costs[0]["tokens"]] * 2
    assert [cost["reference_bytes"] for cost in costs] == [costs[0]["reference_bytes"]] * 2
    expected = load_file(tmp_path / "one" / "model.safetensors")
    before = load_file(world.root / "model" / "model.safetensors")
    assert max(float((expected[name] - before[name]).abs().max()) for name in before) > 1e-3
    assert_holds(run, expected)


@pytest.mark.oracle
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_ends_with_whole_weights(stage: int, tmp_path: Path) -> None:
    """ZeRO in two gloo processes, where the package is there; held to one process without it."""
    pytest.importorskip("deepspeed")
    world = build_tiny_world(tmp_path / "world", 16, 2)
    sgd = {"optim": "sgd", "learning_rate": 3e-2, "save_steps": 1, "num_train_epochs": 1, "max_grad_norm": 0.0}
    one = world.recipe(training={**sgd, "per_device_train_batch_size": 8})
    build_caches(one, world.store)
    align(one, find_cache(one, world.store), tmp_path / "one")
    zero = {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
        "gradient_clipping": "auto",
    }
    two = world.recipe_file(training={**sgd, "per_device_train_batch_size": 4, "deepspeed": zero})
    program = [sys.executable, str(Path(__file__).with_name("deepspeed_on_cpu.py"))]
    run_two_processes(two, world.store, tmp_path / "two", program=program)
    assert_holds(tmp_path / "two", load_file(tmp_path / "one" / "model.safetensors"))


def assert_holds(run: Path, expected: dict[str, Tensor]) -> None:
    """A run has these weights, but for rounding, and they open."""
    assert read_run(run)["complete"]
    found = load_file(run / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 2e-6, name
    opened, loading = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not any(loading.values())
    assert all(torch.equal(tensor, found[name]) for name, tensor in opened.state_dict().items())
