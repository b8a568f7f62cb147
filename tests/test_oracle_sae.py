"""
Activations equal those of the libraries that made the formats. SAELens loads its own format from disk and
Gemma Scope through its own loader; sparsify its own (SAELens' loader of sparsify folders is wrong at 6.54).
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_saes import (
    Tensors,
    random_sae,
    random_tokens,
    write_gemma_scope,
    write_gemma_scope_2,
    write_llama_scope,
    write_llama_scope_r1,
    write_saelens,
    write_sparsify,
)

from fpo.scoring.sae import load_sae, read_decoder, sae_facts

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

D_IN, D_SAE = 48, 256


@pytest.fixture
def tensors() -> Tensors:
    return random_sae(3, D_IN, D_SAE)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.from_numpy(random_tokens(64, d_in=D_IN))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk", "topk rescaled"])
def test_saelens_encodes_and_reconstructs_alike(architecture, norm, subtracts, tensors, x, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    name, _, rescaled = architecture.partition(" ")
    options = {"k": 16, "rescale_acts_by_decoder_norm": bool(rescaled)} if name == "topk" else {}
    source = write_saelens(
        tmp_path,
        tensors,
        name,
        apply_b_dec_to_input=subtracts,
        normalize_activations=norm,
        reshape_activations="none",
        metadata={"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_resid_post"},
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = sae_lens.SAE.load_from_disk(source)
    ours = load_sae(source)
    with torch.no_grad():
        assert_same(ours.encode(x), theirs.encode(x))
        reconstruction = theirs(x)
    missed = (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()
    assert ours.fvu_and_l0(x, read_decoder(source))[0] == pytest.approx(float(missed), rel=1e-4)


@pytest.mark.parametrize(
    "architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
def test_saelens_transcoders_encode_and_predict_alike(architecture, tensors, x, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    own = {**tensors, "W_skip": np.random.default_rng(8).standard_normal((D_IN, D_IN)).astype(np.float32)}
    if "skip" not in architecture:
        del own["W_skip"]
    metadata = {
        "sae_lens_version": "6.54.12",
        "hook_name": "blocks.1.mlp.hook_in",
        "hook_name_out": "blocks.1.mlp.hook_out",
    }
    source = write_saelens(
        tmp_path,
        own,
        architecture,
        d_out=D_IN,
        apply_b_dec_to_input=False,
        normalize_activations="none",
        metadata=metadata,
    )
    theirs = sae_lens.SAE.load_from_disk(source)
    target = x.flip(0)
    with torch.no_grad():
        assert_same(load_sae(source).encode(x), theirs.encode(x))
        missed = (theirs(x) - target).square().sum() / (target - target.mean(0)).square().sum()
    fvu, _ = load_sae(source).fvu_and_l0(x, read_decoder(source), target)
    assert fvu == pytest.approx(float(missed), rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 16}}),
        ("standard", {"activation_fn_str": "relu", "normalize_activations": False}),
        ("jumprelu", {"normalize_activations": True, "apply_b_dec_to_input": False}),
        ("gated", {"activation_fn_str": "relu"}),
    ],
)
def test_saelens_reads_legacy_configs_alike(architecture, options, tensors, x, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    source = write_saelens(tmp_path, tensors, architecture, hook_point="blocks.1.hook_resid_post", **options)
    theirs = sae_lens.SAE.load_from_disk(source)
    with torch.no_grad():
        assert_same(load_sae(source).encode(x), theirs.encode(x))


@pytest.mark.parametrize("training_architecture", ["batchtopk", "matryoshka_batchtopk", "jumprelu"])
def test_what_saelens_saves_and_exports_in_training_encodes_alike(training_architecture, x, tmp_path):
    """save_inference_model turns a BatchTopK into a JumpReLU; the checkpoint says the same."""
    sae_lens = pytest.importorskip("sae_lens")
    names = {
        "batchtopk": "BatchTopKTrainingSAE",
        "matryoshka_batchtopk": "MatryoshkaBatchTopKTrainingSAE",
        "jumprelu": "JumpReLUTrainingSAE",
    }
    options = {
        "batchtopk": {"k": 16},
        "matryoshka_batchtopk": {"k": 16, "matryoshka_widths": [64, D_SAE]},
        "jumprelu": {},
    }[training_architecture]
    torch.manual_seed(0)
    trained = getattr(sae_lens, names[training_architecture])(
        getattr(sae_lens, names[training_architecture] + "Config")(d_in=D_IN, d_sae=D_SAE, **options)
    )
    with torch.no_grad():
        trained.b_enc += torch.randn(D_SAE) * 0.1
        if hasattr(trained, "topk_threshold"):
            trained.topk_threshold.fill_(0.5)
        trained.W_dec *= torch.rand(D_SAE, 1) + 0.5
    trained.save_model(str(tmp_path / "checkpoint"))
    trained.save_inference_model(str(tmp_path / "exported"))
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "exported"))
    for folder in ("exported", "checkpoint"):
        assert sae_facts(str(tmp_path / folder)).architecture == "jumprelu"
        with torch.no_grad():
            assert_same(load_sae(str(tmp_path / folder)).encode(x), theirs.encode(x))


def repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAELens' own hub loaders, on files of this disk."""
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")

    def download(repo_id: str, filename: str, subfolder: str = "", **_: object) -> str:
        return str(root / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", download)


def test_gemma_scope_encodes_as_saelens_own_loader_says(tensors, x, tmp_path, monkeypatch):
    repository(tmp_path, monkeypatch)
    from sae_lens.loading import pretrained_sae_loaders as loaders

    folder = "layer_1/width_16k/average_l0_7"
    source = write_gemma_scope(tmp_path / folder, tensors)
    config, state, _ = loaders.gemma_2_sae_huggingface_loader("google/gemma-scope-2b-pt-res", folder)
    assert_same(load_sae(source).encode(x), saelens_encode(config, state, x))


def test_gemma_scope_2_encodes_as_saelens_own_loader_says(tensors, x, tmp_path, monkeypatch):
    repository(tmp_path, monkeypatch)
    from sae_lens.loading import pretrained_sae_loaders as loaders

    shapes = {"w_enc": (D_IN, D_SAE), "w_dec": (D_SAE, D_IN)}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_, **__: shapes)
    folder = "resid_post/layer_1_width_16k_l0_small"
    config = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": "model.layers.1.output",
        "l0": 10,
    }
    source = write_gemma_scope_2(tmp_path / folder, tensors, config)
    config, state, _ = loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2-1b-pt", folder)
    assert_same(load_sae(source).encode(x), saelens_encode(config, state, x))


def test_llama_scope_passes_what_saelens_own_loader_passes_where_decoder_norms_are_one(x, tmp_path, monkeypatch):
    """SAELens folds the scale s into W_enc and takes theta s; its values are s times ours."""
    repository(tmp_path, monkeypatch)
    from sae_lens.loading import pretrained_sae_loaders as loaders

    tensors = unit_decoder(random_sae(3, D_IN, D_SAE))
    folder, s = "Llama3_1-8B-Base-L15R-8x", D_IN**0.5 / 5
    source = write_llama_scope(tmp_path / folder, tensors)
    float32 = {"dtype": "float32"}
    config, state, _ = loaders.llama_scope_sae_huggingface_loader("fnlp/repo", folder, cfg_overrides=float32)
    assert_same(load_sae(source).encode(x) * s, saelens_encode(config, state, x, s))


def test_llama_scope_r1_encodes_as_saelens_own_loader_says_where_decoder_norms_are_one(x, tmp_path, monkeypatch):
    """Where its gate is not weighted by the norms, any decoder does."""
    repository(tmp_path, monkeypatch)
    from sae_lens.loading import pretrained_sae_loaders as loaders

    tensors = random_sae(3, D_IN, D_SAE)
    write_llama_scope_r1(tmp_path / "any", tensors, expansion_factor=D_SAE / D_IN, sparsity_include_decoder_norm=False)
    write_llama_scope_r1(tmp_path / "one", unit_decoder(tensors), expansion_factor=D_SAE / D_IN)
    for folder in ("any", "one"):
        config, state, _ = loaders.llama_scope_r1_distill_sae_huggingface_loader("fnlp/repo", folder)
        assert_same(load_sae(str(tmp_path / folder)).encode(x), saelens_encode(config, state, x, 0.5))


def test_an_sae_of_saelens_registry_is_what_that_library_loads(x, tmp_path, monkeypatch):
    """The registry's norm_scaling_factor is folded in, its L0 advertised."""
    repository(tmp_path, monkeypatch)
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    release = get_pretrained_saes_directory()["llama_scope_lxr_8x"]
    s = release.norm_scaling_factor["l15r_8x"]
    tensors = unit_decoder(random_sae(3, D_IN, D_SAE))
    norm = D_IN**0.5 / s
    folder = tmp_path / release.saes_map["l15r_8x"]
    own = write_llama_scope(folder, tensors, dataset_average_activation_norm={"in": norm, "out": norm})
    source = "sae_lens:llama_scope_lxr_8x/l15r_8x"
    facts = sae_facts(source)
    assert (facts.format, facts.advertised_l0, facts.hook_hint) == ("saelens", 50.0, "model.layers.15")
    with torch.no_grad():
        theirs = SAE.from_pretrained("llama_scope_lxr_8x", "l15r_8x").encode(x)
    assert_same(load_sae(source).encode(x), theirs)
    assert_same(load_sae(own).encode(x) * s, theirs)


def unit_decoder(t: Tensors) -> Tensors:
    return {**t, "W_dec": t["W_dec"] / np.linalg.norm(t["W_dec"], axis=1, keepdims=True)}


def saelens_encode(config: dict, state: dict[str, torch.Tensor], x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """`scale` as SAE.from_pretrained folds it in, from the registry."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    # Its loader takes Gemma's sizes from a table, not from the file.
    d_in, d_sae = state["W_enc"].shape
    norm = config["normalize_activations"] or "none"
    subtracts = config["apply_b_dec_to_input"]
    options = {"apply_b_dec_to_input": subtracts, "normalize_activations": norm}
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, **options))
    sae.load_state_dict({name: value.float() for name, value in state.items()})
    sae.fold_activation_norm_scaling_factor(scale)
    with torch.no_grad():
        return sae.encode(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_sparsify_encodes_and_reconstructs_alike(activation, dtype, x, tmp_path):
    """bfloat16 weights are computed with in float32 by both: theirs are loaded and then widened."""
    sparsify = pytest.importorskip("sparsify")
    torch.manual_seed(0)
    config = sparsify.SparseCoderConfig(activation=activation, k=16, expansion_factor=8)
    made = sparsify.SparseCoder(D_IN, config, dtype=dtype)
    with torch.no_grad():
        made.b_dec += torch.randn(D_IN).to(dtype)
        made.encoder.bias += torch.randn(8 * D_IN).to(dtype)
    made.save_to_disk(tmp_path / "layers.1")
    assert json.loads((tmp_path / "layers.1/cfg.json").read_text())["num_latents"] == 0
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "layers.1").float()
    ours = load_sae(str(tmp_path), "model.layers.1")
    with torch.no_grad():
        encoded = theirs.encode(x)
        dense = torch.zeros(len(x), 8 * D_IN).scatter_(1, encoded.top_indices, encoded.top_acts)
        missed = float((x - theirs.decode(*encoded[:2])).square().sum() / (x - x.mean(0)).square().sum())
    assert_same(ours.encode(x), dense)
    decoder = read_decoder(str(tmp_path), "model.layers.1")
    assert ours.fvu_and_l0(x, decoder)[0] == pytest.approx(missed, rel=1e-4)


def test_sparsify_transcoders_encode_and_predict_alike(x, tmp_path):
    sparsify = pytest.importorskip("sparsify")
    torch.manual_seed(0)
    config = sparsify.SparseCoderConfig(k=16, expansion_factor=8, transcode=True, skip_connection=True)
    made = sparsify.SparseCoder(D_IN, config)
    with torch.no_grad():
        for parameter in (made.b_dec, made.encoder.bias, made.W_skip):
            parameter += torch.randn_like(parameter)
    made.save_to_disk(tmp_path / "layers.1.mlp")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "layers.1.mlp")
    place, target = "model.layers.1.mlp:input", x.flip(0)
    with torch.no_grad():
        encoded = theirs.encode(x)
        dense = torch.zeros(len(x), 8 * D_IN).scatter_(1, encoded.top_indices, encoded.top_acts)
        predicted = theirs(x, target).sae_out
    ours = load_sae(str(tmp_path), place)
    assert_same(ours.encode(x), dense)
    missed = float((predicted - target).square().sum() / (target - target.mean(0)).square().sum())
    assert ours.fvu_and_l0(x, read_decoder(str(tmp_path), place), target)[0] == pytest.approx(missed, rel=1e-4)


def test_sparsify_tensors_of_our_own_writer_encode_alike(tensors, x, tmp_path):
    sparsify = pytest.importorskip("sparsify")
    source = write_sparsify(tmp_path, tensors, k=9)
    encoded = sparsify.SparseCoder.load_from_disk(tmp_path).encode(x)
    dense: NDArray[np.float32] = load_sae(source).encode(x).numpy()
    assert_same(
        torch.from_numpy(dense),
        torch.zeros(dense.shape).scatter_(1, encoded.top_indices, encoded.top_acts.detach()),
    )
