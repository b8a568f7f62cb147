"""An SAE of every format from its files to a cache, a policy whose features are held, and the report of their gaps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_saes import (
    Tensors,
    random_sae,
    write_gemma_scope,
    write_gemma_scope_2,
    write_llama_scope,
    write_llama_scope_r1,
    write_openmoss,
    write_saelens,
    write_sparsify,
)
from tiny_world import D_SAE, TinyWorld, build_tiny_world
from torch_saes import write_connor_rob, write_dictionary, write_goodfire, write_qwen_scope
from typer.testing import CliRunner

from fpo.cli import app
from fpo.scoring.sae.formats import FORMATS
from fpo.stage1_cache import build_caches, find_cache, with_module_paths
from fpo.stage2_align import align

pytestmark = pytest.mark.long

LAYER, HEADS, MLP = "model.layers.1", "model.layers.1.self_attn.o_proj:input", "model.layers.1.mlp:input"
Writer = Callable[[Path, Tensors], str]


def transcoder(folder: Path, t: Tensors) -> str:
    places = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.mlp.hook_out"}
    return write_saelens(folder, t, "jumprelu_transcoder", metadata=places, d_out=32, apply_b_dec_to_input=False)


def with_glu(folder: Path, t: Tensors) -> str:
    rng = np.random.default_rng(9)
    own = {"W_enc_glu": rng.standard_normal((32, D_SAE)), "b_enc_glu": rng.standard_normal(D_SAE)}
    arrays = {name: array.astype(np.float32) for name, array in own.items()}
    return write_openmoss(folder, {**t, **arrays}, "relu", use_glu_encoder=True)


CASES: dict[str, tuple[str, Writer, str]] = {
    "Gemma Scope": ("gemma_scope", write_gemma_scope, LAYER),
    "Gemma Scope 2": ("gemma_scope_2", write_gemma_scope_2, LAYER),
    "SAELens standard": ("saelens", lambda folder, t: write_saelens(folder, t, "standard", metadata={}), LAYER),
    "SAELens gated": ("saelens", lambda folder, t: write_saelens(folder, t, "gated", metadata={}), LAYER),
    "SAELens topk": ("saelens", lambda folder, t: write_saelens(folder, t, "topk", k=8, metadata={}), LAYER),
    "SAELens transcoder": ("saelens", transcoder, MLP),
    "sparsify": ("sparsify", lambda folder, t: write_sparsify(folder / "layers.1", t, k=8), LAYER),
    "sparsify groupmax": (
        "sparsify",
        lambda folder, t: write_sparsify(folder / "layers.1", t, k=8, activation="groupmax"),
        LAYER,
    ),
    "OpenMOSS": ("openmoss", lambda folder, t: write_openmoss(folder, t, "jumprelu"), LAYER),
    "Llama Scope": ("llama_scope", write_llama_scope, LAYER),
    "Llama Scope R1-Distill": (
        "llama_scope_r1",
        lambda folder, t: write_llama_scope_r1(folder, t, expansion_factor=D_SAE / 32),
        LAYER,
    ),
    **{
        f"dictionary_learning {name}": (
            "dictionary_learning",
            lambda folder, t, name=name: write_dictionary(folder, t, name, layer=1, k=4),
            LAYER,
        )
        for name in ("AutoEncoder", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
    },
    "Qwen Scope": ("qwen_scope", lambda folder, t: write_qwen_scope(folder / "SAE-L0_8" / "layer1.sae.pt", t), LAYER),
    "Goodfire": ("goodfire", lambda folder, t: write_goodfire(folder / "tiny-l1.pth", t), LAYER),
    "qresearch": ("qresearch", lambda folder, t: write_goodfire(folder / "tiny-l1.pt", t, ""), LAYER),
    "Connor & Rob": (
        "connor_rob",
        lambda folder, t: write_connor_rob(folder / "z.pt", t, act_name="blocks.1.attn.hook_z", model_name="llama"),
        HEADS,
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), 64, 8)


@pytest.mark.parametrize("name", CASES)
def test_a_format_from_its_files_to_policy_and_report(
    world: TinyWorld, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    kind, write, place = CASES[name]
    tensors = random_sae(seed=5, d_in=32, d_sae=D_SAE)
    feature = {"sae": write(tmp_path / "sae", tensors), "hookpoint": place, "top_k": 16, "self_check": False}
    training = {"num_train_epochs": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "logging_steps": 1}
    recipe = with_module_paths(world.recipe(features=[feature], training=training))
    store = tmp_path / "store"
    train = build_caches(recipe, store)[0].cache
    assert recipe.features[0].hookpoint == place
    assert train.columns[0].wanted["sae"]["config"]["format"] == kind
    report = align(recipe, find_cache(recipe, store), tmp_path / "run")
    assert report.parity == pytest.approx(0, abs=1e-5)
    assert report.last["features/distance_rejected"] > 0
    arguments = ["features", train.key, "--store", str(store), "--json"]
    [said] = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert said["hookpoint"] == place
    assert said["d_sae"] == D_SAE


def test_every_format_is_among_these() -> None:
    assert {kind for kind, _, _ in CASES.values()} == {known.name for known in FORMATS}
