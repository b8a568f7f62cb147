"""A merged run is one ordinary model that says what the adapter said on its base, or it is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from test_stage2_lora import ATTENTION, FAST, adapted
from test_stage2_run import stopped_at
from test_stage2_saved import ordinary_logps
from tiny_models import tiny_model
from tiny_world import TinyWorld, build_adapted_world, build_tiny_world
from transformers import AutoModelForCausalLM, AutoTokenizer

from fpo import cli
from fpo.errors import RunError
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align, merge_run

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = build_tiny_world(tmp_path_factory.mktemp("world"), 16, 4)
    build_caches(world.recipe(), world.store)
    return world


def opened_logps(world: TinyWorld, folder: Path, kind: Any) -> torch.Tensor:
    pairs = find_cache(world.recipe(), world.store).shard(0)
    return ordinary_logps(kind.from_pretrained(folder, dtype=torch.float32).eval(), pairs)


def assert_same_policy(world: TinyWorld, merged: Path, adapter: Path, tolerance: float = 1e-5) -> None:
    ours = opened_logps(world, merged, AutoModelForCausalLM)
    theirs = opened_logps(world, adapter, peft.AutoPeftModelForCausalLM)
    assert float((ours - theirs).abs().mean()) < tolerance
    base = opened_logps(world, world.root / "model", AutoModelForCausalLM)
    assert float((ours - base).abs().mean()) > 1e-2


@pytest.mark.parametrize(
    "lora", [{}, {"dora": True, "rslora": True, "dropout": 0.1}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_a_merged_run_is_one_model_that_gives_the_adapters_log_probs(
    world: TinyWorld, tmp_path: Path, lora: dict[str, Any]
) -> None:
    recipe = adapted(world, **lora)
    align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    report = merge_run(tmp_path / "run")
    assert report.folder == tmp_path / "run" / "merged"
    assert not list(report.folder.glob("adapter*"))
    assert report.difference < 1e-5
    assert report.n_bytes == (report.folder / "model.safetensors").stat().st_size
    assert_same_policy(world, report.folder, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(report.folder)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(world.root / "model").get_vocab()
    with pytest.raises(RunError, match=r"run/merged: exists already, and nothing is written over; give another --out"):
        merge_run(tmp_path / "run")


def test_a_checkpoint_is_merged_before_its_run_is_finished(world: TinyWorld, tmp_path: Path) -> None:
    recipe = adapted(world)
    stopped_at(world, recipe, tmp_path / "run", 2)
    with pytest.raises(RunError, match="this run is not finished; merge a checkpoint of it with --checkpoint N"):
        merge_run(tmp_path / "run")
    report = merge_run(tmp_path / "run", checkpoint=2, dtype="bfloat16")
    assert report.folder == tmp_path / "run" / "merged-2"
    assert json.loads((report.folder / "config.json").read_text())["dtype"] == "bfloat16"
    # bfloat16 has 8 bits: 2^-9 of a weight, over three layers.
    assert_same_policy(world, report.folder, tmp_path / "run" / "checkpoint-2", tolerance=0.05)


def test_an_adapter_on_an_adapted_reference_is_merged_into_the_weights_below_it(tmp_path: Path) -> None:
    world = build_adapted_world(tmp_path / "world")
    reference = {"adapter": str(world.root / "adapter")}
    recipe = world.recipe(reference=reference, policy={"lora": {"r": 4}}, training=FAST)
    build_caches(recipe, world.store)
    align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    merge_run(tmp_path / "run", tmp_path / "one")
    pairs = find_cache(recipe, world.store).shard(0)
    ours, theirs = (
        ordinary_logps(kind.from_pretrained(folder).eval(), pairs)
        for kind, folder in (
            (AutoModelForCausalLM, tmp_path / "one"),
            (peft.AutoPeftModelForCausalLM, tmp_path / "run"),
        )
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_run_of_whole_weights_has_nothing_to_merge(world: TinyWorld, tmp_path: Path) -> None:
    recipe = world.recipe(training={"max_steps": 1})
    align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    with pytest.raises(RunError, match="run: no adapter lies there to merge; it is a whole model"):
        merge_run(tmp_path / "run")


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of what is tried here
def test_an_adapter_on_weights_that_are_shared_is_not_merged_into_something_else(tmp_path: Path) -> None:
    """The head is the embedding: an update of the head alone would move both."""
    world = build_tiny_world(tmp_path / "world", 8, 4)
    tiny_model("llama", seed=3, tie_word_embeddings=True).save_pretrained(world.root / "model")
    recipe = adapted(world, target_modules=[*ATTENTION, "lm_head"])
    build_caches(recipe, world.store)
    align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    with pytest.raises(RunError, match=r"merged, its policy says something else: token log-probs differ by"):
        merge_run(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*merged*"))


def test_an_adapter_on_quantised_weights_stays_beside_them(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = adapted(world)
    align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    config = world.root / "model" / "config.json"
    plain = config.read_text()
    config.write_text(json.dumps({**json.loads(plain), "quantization_config": {"quant_method": "bitsandbytes"}}))
    try:
        with pytest.raises(
            RunError, match=r"its adapter stands on quantised weights \(.*model\), which would round it"
        ):
            merge_run(tmp_path / "run")
    finally:
        config.write_text(plain)


def test_the_command_says_where_the_model_is_and_how_far_it_is_from_the_adapter(
    world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = adapted(world)
    align(recipe, find_cache(recipe, world.store), tmp_path / "run")
    capsys.readouterr()
    command = typer.main.get_command(cli.app)
    command.main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "one")], standalone_mode=False)
    merged, check = capsys.readouterr().out.splitlines()
    assert merged.startswith(f"merged      {tmp_path / 'one'}, float32, ")
    assert check.endswith(" nats per token between it and the adapter on its base")
    command.main(["merge", str(tmp_path / "run"), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["folder"] == str(tmp_path / "run" / "merged")
