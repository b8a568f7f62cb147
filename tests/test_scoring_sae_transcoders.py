"""Transcoders: features of the place that they read, and a decoder that is held against the place that it predicts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_saes import random_sae, write_gemma_scope_2, write_saelens, write_sparsify

from fpo.errors import ModelError
from fpo.scoring import install_scoring, pack
from fpo.scoring.sae import load_sae, read_decoder, sae_facts
from fpo.scoring.self_check import check_sae

D, F, D_OUT = 32, 24, 20
IN, OUT = "model.layers.1.mlp:input", "model.layers.1.mlp"
SAELENS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def tensors(d_out: int = D_OUT) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    t = random_sae(seed=1, d_in=D, d_sae=F)
    decoder = {"W_dec": (F, d_out), "b_dec": (d_out,), "W_skip": (d_out, D)}
    return t | {name: rng.standard_normal(shape).astype(np.float32) for name, shape in decoder.items()}


def write(folder: Path, kind: str, d_out: int = D_OUT) -> tuple[str, dict[str, np.ndarray]]:
    """A transcoder from a layer's MLP input to its output, and its tensors; without a skip connection that is zero."""
    t = tensors(d_out)
    if kind == "sparsify":
        return write_sparsify(folder / "layers.1.mlp", t, transcode=True, skip_connection=True), t
    if kind == "gemma_scope_2":
        config = {"hf_hook_point_in": "model.layers.1.mlp.input", "hf_hook_point_out": "model.layers.1.mlp.output"}
        own = {**t, "affine_skip_connection": np.ascontiguousarray(t["W_skip"].T)}
        return write_gemma_scope_2(folder, own, {**config, "type": "transcoder", "affine_connection": True}), t
    if "skip" not in kind:
        del t["W_skip"]
    metadata = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.mlp.hook_out", "model_name": "llama"}
    source = write_saelens(folder, t, kind, metadata=metadata, d_out=d_out, apply_b_dec_to_input=False)
    return source, {"W_skip": np.zeros((d_out, D), np.float32), **t}


def expected(t: dict[str, np.ndarray], kind: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and prediction, by the formulas of facts: b_dec is never subtracted from what is read."""
    h = x @ t["W_enc"] + t["b_enc"]
    if kind == "sparsify":
        kept = h >= np.sort(h, axis=1)[:, -4:-3]
        f = np.maximum(h, 0) * kept
    elif kind in ("transcoder", "skip_transcoder"):
        f = np.maximum(h, 0)
    else:
        f = np.maximum(h, 0) * (h > t["threshold"])
    return f, f @ t["W_dec"] + t["b_dec"] + x @ t["W_skip"].T


@pytest.mark.parametrize("kind", [*SAELENS, "sparsify", "gemma_scope_2"])
def test_a_transcoder_encodes_what_it_reads_and_is_held_against_what_it_predicts(kind, tmp_path):
    d_out = D if kind == "sparsify" else D_OUT
    source, t = write(tmp_path, kind, d_out)
    facts = sae_facts(source)
    assert (facts.d_in, facts.hook_hint, facts.predicts) == (D, IN, OUT)
    rng = np.random.default_rng(3)
    x, target = (rng.standard_normal((50, width)).astype(np.float32) for width in (D, d_out))
    f, predicted = expected(t, kind, x)
    sae = load_sae(source)
    np.testing.assert_allclose(sae.encode(torch.from_numpy(x)).numpy(), f, rtol=1e-4, atol=1e-5)
    fvu, l0 = sae.fvu_and_l0(torch.from_numpy(x), read_decoder(source), torch.from_numpy(target))
    assert fvu == pytest.approx(((predicted - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum(), rel=1e-4)
    assert l0 == pytest.approx((f > 0).sum(1).mean())


def test_sparsify_finds_a_transcoder_by_the_place_that_it_reads(tmp_path):
    write(tmp_path, "sparsify", D)
    assert sae_facts(str(tmp_path), IN).predicts == OUT


def test_the_self_check_holds_each_layer_against_what_that_layer_gives(tmp_path):
    source, t = write(tmp_path, "jumprelu_skip_transcoder", D)
    model = tiny_model("llama")
    install_scoring(model, ())
    rng = np.random.default_rng(4)
    ids = rng.integers(3, 97, 30)
    packed = pack(ids, np.array([0, 10, 30]), np.array([1]))
    check = check_sae(model, load_sae(source), read_decoder(source), IN, packed)
    assert set(check.elsewhere) == {"model.layers.0.mlp:input", "model.layers.2.mlp:input"}
    measured = {IN: check.fvu, **check.elsewhere}
    for layer in range(3):
        seen: list[torch.Tensor] = []
        hook = model.model.layers[layer].mlp.register_forward_hook(
            lambda _, args, output, seen=seen: seen.extend((args[0][0], output[0]))
        )
        with torch.no_grad():
            model.model(torch.from_numpy(ids)[None])
        hook.remove()
        x, target = (part[9:29].numpy() for part in seen)
        _, predicted = expected(t, "jumprelu_skip_transcoder", x)
        fvu = ((predicted - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
        assert measured[f"model.layers.{layer}.mlp:input"] == pytest.approx(fvu, rel=1e-3)


def test_a_prediction_of_another_width_than_the_place_is_refused(tmp_path):
    source, _ = write(tmp_path, "transcoder")
    model = tiny_model("llama")
    install_scoring(model, ())
    packed = pack(np.arange(3, 33), np.array([0, 10, 30]), np.array([1]))
    with pytest.raises(ModelError, match=r"mlp: it is not as wide as what the transcoder predicts \(20\)"):
        check_sae(model, load_sae(source), read_decoder(source), IN, packed)
