"""
SAEs of OpenMOSS: Llama Scope of 2024, the library's own files since 2025 and Llama Scope's R1-Distill; and SAELens'
BatchTopK checkpoints. Each is held against its formula, written out here in float64.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tiny_saes import (
    D_IN,
    D_SAE,
    Tensors,
    random_sae,
    random_tokens,
    refusal,
    write_llama_scope,
    write_llama_scope_r1,
    write_openmoss,
    write_saelens,
)

from fpo.errors import SaeError
from fpo.scoring.sae import load_sae, read_decoder, read_sae, sae_config, sae_facts

Float64 = NDArray[np.float64]

S = np.sqrt(D_IN) / 5
"""What an input of mean norm 5 is multiplied by."""


def wide(t: Tensors) -> dict[str, Float64]:
    return {name: array.astype(np.float64) for name, array in t.items()}


def norms(t: Tensors) -> Float64:
    """Of the decoder's rows; they differ from feature to feature."""
    n: Float64 = np.linalg.norm(t["W_dec"].astype(np.float64), axis=1)
    assert n.max() > 1.5 * n.min()
    return n


def largest(h: Float64, k: int) -> NDArray[np.bool_]:
    return h >= np.sort(h, axis=1)[:, -k][:, None]


def assert_encodes(source: str, expected: Float64) -> None:
    f = load_sae(source).encode(torch.from_numpy(random_tokens())).numpy()
    assert 0.02 < (expected > 0).mean() < 0.98
    np.testing.assert_array_equal(f > 0, expected > 0)
    np.testing.assert_allclose(f, expected, rtol=1e-5, atol=1e-5)


def assert_reconstructs(source: str, expected: Float64) -> None:
    """f @ W_dec + b_dec is the raw input's reconstruction."""
    W_dec, b_dec, _ = read_decoder(source)
    f = load_sae(source).encode(torch.from_numpy(random_tokens())).numpy()
    np.testing.assert_allclose(f @ W_dec + b_dec, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act_fn", ["jumprelu", "topk"])
def test_llama_scope_holds_one_threshold_against_activations_of_unit_decoder_rows(act_fn, tmp_path):
    """
    What is trained sees s x and predicts s x: s x ~ g @ W_dec + b_dec with g = (s x) @ W_enc + b_enc. In raw units
    g / s = x @ W_enc + b_enc / s, decoded by the same rows; with rows of length 1 it is h = n g / s, and f = h > theta.
    A topk with a threshold is the same.
    """
    t = random_sae()
    w, n = wide(t), norms(t)
    h = n * (random_tokens() @ w["W_enc"] + w["b_enc"] / S)
    expected = np.where(h > 0.75, h, 0)
    source = write_llama_scope(tmp_path, t, act_fn=act_fn)
    assert_encodes(source, expected)
    assert_reconstructs(source, (expected / n) @ w["W_dec"] + w["b_dec"] / S)
    np.testing.assert_allclose(np.linalg.norm(read_decoder(source)[0], axis=1), 1, rtol=1e-6)


def test_llama_scope_of_other_outputs_than_inputs_rescales_the_decoder_before_its_norms(tmp_path):
    """Outputs of mean norm 8 are multiplied by s_out = sqrt(d) / 8, so g / s is decoded by rows s / s_out as long."""
    t, s_out = random_sae(), np.sqrt(D_IN) / 8
    w, n = wide(t), norms(t) * S / s_out
    h = n * (random_tokens() @ w["W_enc"] + w["b_enc"] / S)
    expected = np.where(h > 0.75, h, 0)
    source = write_llama_scope(tmp_path, t, dataset_average_activation_norm={"in": 5.0, "out": 8.0})
    assert_encodes(source, expected)
    assert_reconstructs(source, (expected / n) @ (w["W_dec"] * S / s_out) + w["b_dec"] / s_out)


def test_llama_scope_without_decoder_norms_minus_the_decoder_bias_and_with_folded_scales(tmp_path):
    t, x = random_sae(), random_tokens()
    w = wide(t)
    h = x @ w["W_enc"] + w["b_enc"] / S
    plain = write_llama_scope(tmp_path / "plain", t, sparsity_include_decoder_norm=False)
    assert_encodes(plain, np.where(h > 0.75, h, 0))
    assert_reconstructs(plain, np.where(h > 0.75, h, 0) @ w["W_dec"] + w["b_dec"] / S)
    h = norms(t) * ((x - w["b_dec"] / S) @ w["W_enc"] + w["b_enc"] / S)
    minus = write_llama_scope(tmp_path / "minus", t, apply_decoder_bias_to_pre_encoder=True)
    assert_encodes(minus, np.where(h > 0.75, h, 0))
    h = norms(t) * (x @ w["W_enc"] + w["b_enc"])
    assert_encodes(write_llama_scope(tmp_path / "folded", t, norm_activation="inference"), np.where(h > 0.75, h, 0))


def test_saelens_values_of_llama_scope_differ_by_the_scale_over_the_norm_as_docs_say(tmp_path):
    """
    SAELens folds s into W_enc and takes theta s, and no norm: f = h > theta s of h = (s x) @ W_enc + b_enc. Where the
    stored rows have length 1, it passes what we pass.
    """
    t = random_sae()
    t["W_dec"] /= np.linalg.norm(t["W_dec"], axis=1, keepdims=True)
    h = S * random_tokens() @ t["W_enc"].astype(np.float64) + t["b_enc"]
    saelens = np.where(h > 0.75 * S, h, 0)
    assert_encodes(write_llama_scope(tmp_path, t), saelens / S)


@pytest.mark.parametrize(
    ("folder", "hook", "hint"),
    [
        ("x", "blocks.15.hook_resid_post", "model.layers.15"),
        ("x", "blocks.3.hook_mlp_out", "model.layers.3.mlp"),
        ("Llama3_1-8B-Base-L7R-8x", None, "model.layers.7"),
        ("Llama3_1-8B-Base-L31M-32x", None, "model.layers.31.mlp"),
        ("Llama3_1-8B-Base-L0A-8x", None, "model.layers.0.self_attn"),
        ("mine", None, None),
    ],
)
def test_llama_scope_hooks_where_its_configuration_or_its_folder_says(folder, hook, hint, tmp_path):
    source = write_llama_scope(tmp_path / folder, random_sae(), hook_point_in=hook, hook_point_out=hook)
    facts = sae_facts(source)
    assert (facts.hook_hint, facts.advertised_l0, facts.architecture) == (hint, 50.0, "jumprelu")
    assert sae_facts(f"{source}/checkpoints/final.safetensors") == facts
    config = sae_config(source)
    assert config == json.loads(json.dumps(config))
    assert {type(value) for value in config.values()} <= {str, int, bool, type(None)}


def test_what_decides_the_activations_of_llama_scope_is_in_the_key(tmp_path):
    one = sae_config(write_llama_scope(tmp_path / "a", random_sae()))
    for option in (
        {"jump_relu_threshold": 0.5},
        {"dataset_average_activation_norm": {"in": 4.0, "out": 5.0}},
        {"sparsity_include_decoder_norm": False},
    ):
        assert sae_config(write_llama_scope(tmp_path / "b", random_sae(), **option)) != one


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hook_point_out": "blocks.15.hook_mlp_out"}, "a transcoder is not supported"),
        ({"act_fn": "relu"}, "act_fn relu is not supported: supported: jumprelu and topk, both with a jump_relu"),
        ({"act_fn": "topk", "jump_relu_threshold": 0.0}, "jump_relu_threshold must be a positive number, found 0.0"),
        ({"norm_activation": "batch-wise"}, "norm_activation batch-wise"),
        ({"dataset_average_activation_norm": None}, "dataset_average_activation_norm.in must be a positive number"),
        ({"dataset_average_activation_norm": {"in": 1}}, "dataset_average_activation_norm.out must be a positive"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"d_model": 7}, "config says d_model 7, the weights have 6"),
        ({"d_sae": 25}, "config says d_sae 25, the weights have 24"),
    ],
)
def test_llama_scope_options_that_we_do_not_compute_are_refused(options, reason, tmp_path):
    assert reason in refusal(write_llama_scope(tmp_path, random_sae(), **options))


def test_llama_scope_transcoders_are_refused_by_their_folder(tmp_path):
    folder = tmp_path / "Llama3_1-8B-Base-L15TC-8x"
    hooks = {"hook_point_in": None, "hook_point_out": None}
    assert "a transcoder" in refusal(write_llama_scope(folder, random_sae(), **hooks))


def openmoss_preactivations(t: Tensors, scale: float = S) -> Float64:
    w, x = wide(t), random_tokens() * scale
    h = x @ w["W_enc"] + w["b_enc"]
    return h / (1 + np.exp(-(x @ w["W_glu"] + w["b_glu"]))) if "W_glu" in w else h


def with_glu(t: Tensors) -> Tensors:
    other = random_sae(7)
    return {**t, "W_glu": other["W_enc"], "b_glu": other["b_enc"]}


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
def test_openmoss_encodes_the_scaled_input_and_gates_by_the_decoder_norm(act_fn, weighted, glu, tmp_path):
    """
    h = s x @ W_E + b_E, times sigmoid(s x @ W_E_glu + b_E_glu). A weighted gate asks of h n: a threshold leaves h, a
    topk gives h n, decoded by rows of length 1.
    """
    t = with_glu(random_sae()) if glu else random_sae()
    w, n = wide(t), norms(t) if weighted else np.ones(D_SAE)
    h = openmoss_preactivations(t)
    kept = {
        "relu": h > 0,
        "jumprelu": h * n > np.exp(np.log(t["threshold"])),
        "topk": largest(h * n, 5) & (h > 0),
    }[act_fn]
    f = np.where(kept, h, 0)
    source = write_openmoss(tmp_path, t, act_fn, sparsity_include_decoder_norm=weighted, top_k=5)
    assert_encodes(source, f * n if act_fn == "topk" else f)
    assert_reconstructs(source, (f @ w["W_dec"] + w["b_dec"]) / S)
    assert sae_config(source)["use_glu_encoder"] is glu


@pytest.mark.parametrize(
    ("norm", "scale"),
    [("inference", 1.0), ("token-wise", np.sqrt(D_IN) / np.linalg.norm(random_tokens(), axis=1, keepdims=True))],
)
def test_openmoss_takes_the_input_as_it_is_or_by_its_own_norm(norm, scale, tmp_path):
    t = random_sae()
    h = openmoss_preactivations(t, scale)
    source = write_openmoss(tmp_path, t, "relu", norm_activation=norm)
    assert_encodes(source, np.maximum(h, 0))
    np.testing.assert_array_equal(read_decoder(source)[0], t["W_dec"])


def test_openmoss_may_subtract_the_decoder_bias_from_the_scaled_input_or_have_none(tmp_path):
    """GLU too: the product that its sigmoid takes sees the same difference."""
    t = with_glu(random_sae())
    w = wide(t)
    y = random_tokens() * S - w["b_dec"]
    h = (y @ w["W_enc"] + w["b_enc"]) / (1 + np.exp(-(y @ w["W_glu"] + w["b_glu"])))
    source = write_openmoss(tmp_path, t, "relu", apply_decoder_bias_to_pre_encoder=True)
    assert_encodes(source, np.maximum(h, 0))
    del t["b_dec"]
    without = write_openmoss(tmp_path / "b", t, "relu", use_decoder_bias=False, apply_decoder_bias_to_pre_encoder=True)
    assert_encodes(without, np.maximum(openmoss_preactivations(t), 0))
    assert not read_decoder(without)[1].any()


def test_a_feature_whose_decoder_row_is_zero_passes_no_weighted_threshold(tmp_path):
    t = random_sae()
    t["W_dec"][3] = 0
    t["b_enc"][3] = 50
    source = write_openmoss(tmp_path, t, "jumprelu")
    assert not load_sae(source).encode(torch.from_numpy(random_tokens()))[:, 3].any()


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
def test_columns_tiles_and_gradients_of_a_glu_encoder_are_those_of_all_features(act_fn, tmp_path, monkeypatch):
    """In tiles of 7 of the 24 features, as a wide SAE goes."""
    sae = load_sae(write_openmoss(tmp_path, with_glu(random_sae()), act_fn, top_k=5))
    x = torch.from_numpy(random_tokens()).requires_grad_()
    lengths, columns = [15, 0, 25], torch.tensor([[0, 5, 9], [1, 2, 3], [4, 5, 23]])
    dense = sae.encode(x)
    means = torch.stack([dense[:15].mean(0), torch.zeros(D_SAE), dense[15:].mean(0)])
    own = sae.pooled_columns(x, lengths, columns)
    torch.testing.assert_close(own, means.gather(1, columns))
    (expected,) = torch.autograd.grad(means.gather(1, columns).square().sum(), x)
    (found,) = torch.autograd.grad(own.square().sum(), x)
    assert found.any()
    torch.testing.assert_close(found, expected)
    monkeypatch.setattr("fpo.scoring.sae.encoder.TILE", 7)
    torch.testing.assert_close(sae.pooled_mean(x, lengths), means)


def test_openmoss_says_what_it_is_without_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("fpo.scoring.sae.tensors.Weights.read", lambda *_: pytest.fail("read a tensor"))
    topk = sae_facts(write_openmoss(tmp_path / "topk", random_sae(), "TopK", top_k=5))
    assert (topk.hook_hint, topk.advertised_l0, topk.elementwise) == ("model.layers.15", 5.0, False)
    jumprelu = sae_facts(write_openmoss(tmp_path / "jumprelu", random_sae(), "jumprelu"))
    assert (jumprelu.format, jumprelu.advertised_l0, jumprelu.elementwise) == ("openmoss", None, True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sae_type": "clt"}, "sae_type clt is not supported: only `sae`"),
        ({"hook_point_out": "blocks.15.hook_mlp_out"}, "a transcoder"),
        ({"act_fn": "batchtopk"}, "act_fn batchtopk is not supported: what passes depends on the other tokens"),
        ({"act_fn": "layertopk"}, "act_fn layertopk is not supported: supported: relu, jumprelu, topk"),
        ({"norm_activation": "batch-wise"}, "norm_activation batch-wise is not supported: supported: inference"),
        ({"hook_point_in": None, "hook_point_out": None}, "dataset_average_activation_norm.None must have shape ()"),
        ({"act_fn": "topk", "top_k": None}, "whose config.json has no top_k"),
        ({"act_fn": "topk", "top_k": 25}, "k is 25, of 24 features"),
        ({"d_model": 7}, "config says d_model 7, the weights have 6"),
        ({"expansion_factor": 8}, "config says expansion_factor 8, the weights 4"),
        ({"act_fn": "jumprelu"}, "activation_function.log_jumprelu_threshold must have shape (24,)"),
        ({"use_glu_encoder": True}, "W_E_glu must have shape (6, 24)"),
    ],
)
def test_openmoss_options_that_we_do_not_compute_are_refused(options, reason, tmp_path):
    source = write_openmoss(tmp_path, random_sae(), "relu")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **options}))
    assert reason in refusal(source)


def test_a_mean_norm_of_zero_is_refused(tmp_path):
    """The library writes one that nobody measured as whatever memory held."""
    source = write_openmoss(tmp_path, random_sae(), "relu")
    name = "dataset_average_activation_norm.blocks.15.hook_resid_post"
    path = tmp_path / "sae_weights.safetensors"
    save_file({**load_file(path), name: np.zeros((), np.float32)}, path)
    with pytest.raises(SaeError, match=r"hook_resid_post must be a positive number, found 0\.0"):
        read_sae(source)


@pytest.mark.parametrize("weighted", [False, True])
def test_llama_scope_r1_scales_the_input_by_the_number_of_its_configuration(weighted, tmp_path):
    """h = 0.5 x @ W_enc + b_enc; f = h where h > threshold, or where h n is, if the gate is weighted."""
    t = random_sae()
    w, n = wide(t), norms(t) if weighted else np.ones(D_SAE)
    h = openmoss_preactivations(t, 0.5)
    f = np.where(h * n > np.exp(np.log(t["threshold"])), h, 0)
    source = write_llama_scope_r1(tmp_path, t, sparsity_include_decoder_norm=weighted)
    assert_encodes(source, f)
    assert_reconstructs(source, (f @ w["W_dec"] + w["b_dec"]) / 0.5)
    facts = sae_facts(source)
    assert (facts.format, facts.hook_hint, facts.advertised_l0) == ("llama_scope_r1", "model.layers.15", None)
    assert (sae_config(source)["norm_scaling_factor"], sae_config(source)["format"]) == ("0.5", "llama_scope_r1")


def test_llama_scope_r1_without_the_scale_says_where_it_is(tmp_path):
    source = write_llama_scope_r1(tmp_path, random_sae(), norm_scaling_factor=None)
    message = refusal(source)
    assert "add norm_scaling_factor to config.json" in message
    assert "SAELens' pretrained_saes.yaml" in message
    path, name = tmp_path / "sae_weights.safetensors", "dataset_average_activation_norm.blocks.15.hook_resid_post"
    save_file({**load_file(path), name: np.array(5, np.float32)}, path)
    h = openmoss_preactivations(random_sae())
    assert_encodes(source, np.where(h * norms(random_sae()) > random_sae()["threshold"], h, 0))
    write_llama_scope_r1(tmp_path, random_sae(), norm_scaling_factor=-1)
    assert "norm_scaling_factor must be a positive number, found -1" in refusal(source)
    write_llama_scope_r1(tmp_path, random_sae(), norm_scaling_factor=None, norm_activation="inference")
    h = openmoss_preactivations(random_sae(), 1.0)
    assert_encodes(source, np.where(h * norms(random_sae()) > random_sae()["threshold"], h, 0))


def test_llama_scope_r1_shapes_are_those_of_linear_layers(tmp_path):
    source = write_llama_scope_r1(tmp_path, random_sae())
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    turned = {**tensors, "decoder.weight": np.ascontiguousarray(tensors["decoder.weight"].T)}
    save_file(turned, tmp_path / "sae_weights.safetensors")
    assert "decoder.weight must have shape (6, 24), sae_weights.safetensors has (24, 6)" in refusal(source)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescaled", [True, False, None])
def test_a_batchtopk_checkpoint_is_the_jumprelu_of_its_threshold(architecture, rescaled, tmp_path):
    """
    h = (x - b_dec) @ W_enc + b_enc, times the norm of the decoder's row where activations are rescaled, which is the
    default; f = h where h > 1.5, decoded by rows of length 1 then. SAELens keeps the threshold in float64.
    """
    t = {**random_sae(), "topk_threshold": np.array(1.5)}
    w, n = wide(t), norms(t) if rescaled in (True, None) else np.ones(D_SAE)
    h = n * ((random_tokens() - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    f = np.where(h > 1.5, h, 0)
    options = {} if rescaled is None else {"rescale_acts_by_decoder_norm": rescaled}
    source = write_saelens(tmp_path, t, architecture, k=12.5, metadata={}, **options)
    assert_encodes(source, f)
    assert_reconstructs(source, f / n @ w["W_dec"] + w["b_dec"])
    facts = sae_facts(source)
    assert (facts.architecture, facts.elementwise, facts.advertised_l0) == ("jumprelu", True, 12.5)


def test_a_batchtopk_checkpoint_that_does_not_say_all_is_refused(tmp_path):
    """A scale that is not folded into the weights stands in activation_scaler.json; a threshold of 0 was never set."""
    t = {**random_sae(), "topk_threshold": np.array(1.5)}
    scaled = write_saelens(tmp_path, t, "batchtopk", normalize_activations="expected_average_only_in", metadata={})
    assert "expected_average_only_in is not supported: another file has the scale" in refusal(scaled)
    t["topk_threshold"] = np.zeros(24)
    assert "topk_threshold must have shape ()" in refusal(write_saelens(tmp_path, t, "batchtopk", metadata={}))
    t["topk_threshold"] = np.zeros(())
    with pytest.raises(SaeError, match=r"topk_threshold must be a positive number, found 0\.0"):
        read_sae(write_saelens(tmp_path, t, "batchtopk", metadata={}))
