"""
Activations of every supported format are those of the format's own formula, written out here in float64, and
the cheap ways to some of them (columns, pooled) say what the dense encoder says, gradients included.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_saes import (
    D_IN,
    D_SAE,
    Tensors,
    random_sae,
    random_tokens,
    write_gemma_scope,
    write_gemma_scope_2,
    write_saelens,
    write_sparsify,
)

import fpo.scoring.sae.encoder as sae_module
from fpo.scoring import pool_top_features
from fpo.scoring.sae import Sae, load_sae, read_decoder

Float64 = NDArray[np.float64]
DATA = Path(__file__).parents[2] / "shared/data"
REAL = DATA / "saes/stories260K-hs3-topk16-512"


def wide(t: Tensors) -> dict[str, Float64]:
    return {name: array.astype(np.float64) for name, array in t.items()}


def largest(h: Float64, k: int) -> NDArray[np.bool_]:
    """Whether a value is among the k largest of its row."""
    return h >= np.sort(h, axis=1)[:, -k][:, None]


def assert_encodes(source: str, expected: Float64, x: NDArray[np.float32] | None = None) -> None:
    x = random_tokens() if x is None else x
    f = load_sae(source).encode(torch.from_numpy(x))
    assert f.dtype == torch.float32
    assert 0.02 < (expected > 0).mean() < 0.98
    np.testing.assert_array_equal(f.numpy() > 0, expected > 0)
    np.testing.assert_allclose(f.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("write", [write_gemma_scope, write_gemma_scope_2])
def test_gemma_scope_is_a_jumprelu_of_the_raw_input_without_b_dec(write, tmp_path):
    """h = x @ W_enc + b_enc, f = h where h > threshold; a threshold that equals h lets nothing through."""
    t, x = random_sae(), random_tokens()
    w = wide(t)
    h = x @ w["W_enc"] + w["b_enc"]
    expected = np.where(h > np.maximum(w["threshold"], 0), h, 0)
    assert_encodes(write(tmp_path, t), expected)


def test_jumprelu_threshold_is_strict(tmp_path):
    """x = (1, 0, ...), W_enc all 1, b_enc 0: h is exactly 1 everywhere; thresholds 1 and 0.999."""
    t = {**random_sae(), "W_enc": np.ones((D_IN, D_SAE), np.float32), "b_enc": np.zeros(D_SAE, np.float32)}
    t["threshold"] = np.where(np.arange(D_SAE) % 2, 1.0, 0.999).astype(np.float32)
    x = torch.eye(D_IN)[:1]
    f = load_sae(write_gemma_scope(tmp_path, t)).encode(x)
    assert f[0].tolist() == [1.0, 0.0] * (D_SAE // 2)


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
def test_saelens_encodes_as_its_formula(architecture, norm, subtracts, tmp_path):
    """The norm comes first, then b_dec is subtracted; expected_average_only_in does nothing here."""
    t, x, k = random_sae(), random_tokens(), 5
    source = write_saelens(
        tmp_path,
        t,
        architecture,
        apply_b_dec_to_input=subtracts,
        normalize_activations=norm,
        metadata={},
        **({"k": k} if architecture == "topk" else {}),
    )
    w, y = wide(t), x.astype(np.float64)
    if norm == "layer_norm":
        y = y - y.mean(1, keepdims=True)
        y = y / (y.std(1, ddof=1, keepdims=True) + 1e-5)
    elif norm == "constant_norm_rescale":
        y = y * np.sqrt(D_IN) / np.linalg.norm(y, axis=1, keepdims=True)
    y = y - w["b_dec"] * subtracts
    h = y @ w["W_enc"] + w["b_enc"]
    expected = {
        "standard": lambda: np.maximum(h, 0),
        "jumprelu": lambda: np.maximum(h, 0) * (h > w["threshold"]),
        "gated": lambda: (
            (y @ w["W_enc"] + w["b_gate"] > 0) * np.maximum(y @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"], 0)
        ),
        "topk": lambda: np.maximum(h, 0) * largest(h, k),
    }[architecture]()
    assert_encodes(source, expected)


def test_topk_with_rescaled_activations_selects_and_returns_in_units_of_the_decoder_norm(tmp_path):
    """h_j is multiplied by the norm of decoder row j before the cut, and stays so."""
    t, x, k = random_sae(), random_tokens(), 5
    w = wide(t)
    h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    h *= np.linalg.norm(w["W_dec"], axis=1)
    source = write_saelens(tmp_path, t, "topk", k=k, rescale_acts_by_decoder_norm=True, metadata={})
    assert_encodes(source, np.maximum(h, 0) * largest(h, k))
    W_dec = read_decoder(source).W
    np.testing.assert_allclose(np.linalg.norm(W_dec, axis=1), 1, rtol=1e-6)


def test_a_topk_value_below_zero_is_zero(tmp_path):
    """b_enc = -100: every pre-activation is negative, so the k largest are, too."""
    t = {**random_sae(), "b_enc": np.full(D_SAE, -100, np.float32)}
    sae = load_sae(write_saelens(tmp_path, t, "topk", k=3, metadata={}))
    assert not sae.encode(torch.from_numpy(random_tokens())).any()


def test_legacy_saelens_configs_are_read_as_saelens_6_reads_them(tmp_path):
    """Flat, b_dec subtracted by default, topk said by activation_fn_str, log_threshold for the threshold."""
    t, x = random_sae(), random_tokens()
    w = wide(t)
    h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    topk = write_saelens(
        tmp_path / "topk",
        t,
        "standard",
        hook_point="blocks.3.hook_resid_post",
        activation_fn_str="topk",
        activation_fn_kwargs={"k": 7},
        normalize_activations=False,
    )
    assert_encodes(topk, np.maximum(h, 0) * largest(h, 7))
    with_log = {**t, "log_threshold": np.log(t["threshold"])}
    jumprelu = write_saelens(tmp_path / "log", with_log, "jumprelu", hook_name="blocks.3.hook_resid_post")
    assert_encodes(jumprelu, h * (h > w["threshold"]))


def test_centred_saes_subtract_the_mean_of_every_token(tmp_path):
    """GPT-2 SAEs trained with center_writing_weights saw x - mean over d_in."""
    t, x = random_sae(), random_tokens()
    w = wide(t)
    metadata = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    y = x - x.mean(1, keepdims=True) - w["b_dec"]
    source = write_saelens(tmp_path, t, "standard", metadata=metadata)
    assert_encodes(source, np.maximum(y @ w["W_enc"] + w["b_enc"], 0))


@pytest.mark.parametrize("config", [{}, {"num_latents": 0, "expansion_factor": D_SAE // D_IN}])
def test_sparsify_takes_the_k_largest_after_subtracting_b_dec(config, tmp_path):
    t, x = random_sae(), random_tokens()
    w = wide(t)
    h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    assert_encodes(write_sparsify(tmp_path, t, **config), np.maximum(h, 0) * largest(h, 4))


def test_sparsify_groupmax_takes_the_largest_of_each_group(tmp_path):
    """24 features in 4 groups of 6 neighbours, one activation each."""
    t, x = random_sae(), random_tokens()
    w = wide(t)
    h = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).reshape(len(x), 4, 6)
    expected = (np.maximum(h, 0) * (h == h.max(2, keepdims=True))).reshape(len(x), D_SAE)
    assert_encodes(write_sparsify(tmp_path, t, activation="groupmax"), expected)


def test_a_large_pre_bias_is_folded_without_losing_digits(tmp_path):
    """
    b_dec of 1e4 and x around it. The fold's own rounding is that of one float32 bias of size ~1e4: 1e-3;
    folded in float32 sums over D_IN terms it would be several times that.
    """
    t = random_sae()
    t["b_dec"] = t["b_dec"] + np.float32(1e4)
    sae = load_sae(write_saelens(tmp_path, t, "standard", metadata={}))
    w = wide(t)
    exact = w["b_enc"] - w["b_dec"] @ w["W_enc"]
    np.testing.assert_array_equal(sae.bias_F.numpy(), exact.astype(np.float32))


SAES = ["gemma_scope", "standard", "gated", "layer_norm", "centred", "topk", "rescaled topk", "groupmax"]


def build(kind: str, folder: Path) -> Sae:
    t = random_sae()
    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    source = {
        "gemma_scope": lambda: write_gemma_scope(folder, t),
        "standard": lambda: write_saelens(folder, t, "standard", metadata={}),
        "gated": lambda: write_saelens(folder, t, "gated", metadata={}),
        "layer_norm": lambda: write_saelens(folder, t, "jumprelu", normalize_activations="layer_norm", metadata={}),
        "centred": lambda: write_saelens(folder, t, "standard", metadata=centred),
        "topk": lambda: write_sparsify(folder, t),
        "rescaled topk": lambda: write_saelens(folder, t, "topk", k=4, rescale_acts_by_decoder_norm=True, metadata={}),
        "groupmax": lambda: write_sparsify(folder, t, activation="groupmax"),
    }[kind]()
    return load_sae(source)


def columns_of_tokens(sae, x, columns):
    """`encode(x)[:, columns]`, of tokens that are completions of their own."""
    return sae.pooled_columns(x, [1] * len(x), columns.expand(len(x), -1))


@pytest.mark.parametrize("kind", SAES)
def test_columns_and_their_gradient_equal_the_dense_encoder(kind, tmp_path, monkeypatch):
    """Columns in any order, repeated ones too; coupled SAEs find their support in chunks of 7 tokens."""
    monkeypatch.setattr(sae_module, "MEMORY_BUDGET", 7 * D_SAE * 4)
    sae, columns = build(kind, tmp_path), torch.tensor([3, 17, 0, 3, 23, 9])
    dense_x = torch.from_numpy(random_tokens()).requires_grad_()
    sparse_x = dense_x.detach().clone().requires_grad_()
    dense, sparse = sae.encode(dense_x)[:, columns], columns_of_tokens(sae, sparse_x, columns)
    assert (dense > 0).any()
    torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-6)
    weights = torch.randn_like(dense)
    (dense * weights).sum().backward()
    (sparse * weights).sum().backward()
    torch.testing.assert_close(sparse_x.grad, dense_x.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SAES)
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_pooled_activations_are_means_over_each_completion(kind, chunk, tmp_path, monkeypatch):
    """Whatever the chunk: completions that span several, several in one, and one of no tokens, which is 0."""
    monkeypatch.setattr(sae_module, "MEMORY_BUDGET", chunk * D_SAE * 4)
    sae, lengths = build(kind, tmp_path), [3, 0, 17, 1, 19]
    x = torch.from_numpy(random_tokens())
    f = sae.encode(x)
    expected = torch.stack([f[0:3].mean(0), torch.zeros(D_SAE), f[3:20].mean(0), f[20], f[21:40].mean(0)])
    torch.testing.assert_close(sae.pooled_mean(x, lengths), expected, rtol=1e-6, atol=1e-6)
    columns = torch.stack([torch.randperm(D_SAE)[:4] for _ in lengths])
    pooled = sae.pooled_columns(x, lengths, columns)
    torch.testing.assert_close(pooled, expected.gather(1, columns), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", SAES)
@pytest.mark.parametrize("tile", [1, 5, 8, 23])
def test_tiles_of_features_pool_and_keep_what_all_features_at_once_do(kind, tile, tmp_path, monkeypatch):
    """24 features in tiles that divide them or not, in chunks of tokens that cut completions; the same 4 are kept."""
    sae, lengths = build(kind, tmp_path), torch.tensor([3, 0, 17, 1, 19])
    x = torch.from_numpy(random_tokens())
    expected = sae.pooled_mean(x, lengths.tolist())
    kept = [pool_top_features(sae, x, lengths, top_k) for top_k in (4, "all")]
    monkeypatch.setattr(sae_module, "TILE", tile)
    monkeypatch.setattr(sae_module, "MEMORY_BUDGET", 7 * tile * 4)
    tiles = [tile for tile, _ in sae.pooled_tiles(x, lengths.tolist())]
    assert len(tiles) > 1
    assert [tile.start for tile in tiles] + [D_SAE] == [0] + [tile.stop for tile in tiles]
    torch.testing.assert_close(sae.pooled_mean(x, lengths.tolist()), expected, rtol=1e-6, atol=1e-6)
    for top_k, whole in zip((4, "all"), kept, strict=True):
        tiled = pool_top_features(sae, x, lengths, top_k)
        for name in ("indices", "counts", "active"):
            assert torch.equal(getattr(tiled, name), getattr(whole, name)), (name, top_k)
        torch.testing.assert_close(tiled.acts, whole.acts, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(tiled.tail_sq, whole.tail_sq, rtol=1e-6, atol=1e-6)


PEAK = """
import sys
import numpy as np
import torch
from fpo.scoring import features, pool_top_features
from fpo.scoring.sae import Sae, SaeArrays, SaeFacts, encoder
from fpo.stage2_align.cost import peak_resident
kind, d_in, d_sae, n_tokens = sys.argv[1], *map(int, sys.argv[2:])
encoder.TILE = features.TILE = 2**13
encoder.MEMORY_BUDGET = features.MEMORY_BUDGET = 2**24
torch.set_num_threads(1)
rng = np.random.default_rng(0)
facts = SaeFacts(d_in, d_sae, kind, "test", None, None, False)
W = rng.standard_normal((d_in, d_sae), dtype=np.float32)
sae = Sae(SaeArrays(facts, W, np.zeros(d_sae, np.float32), kind, "none", **({} if kind == "relu" else {"k": 32})))
del W
x = torch.randn(n_tokens, d_in)
open('/proc/self/clear_refs', 'w').write('5')  # the peak is what is resident now
before = peak_resident()
kept = pool_top_features(sae, x, torch.full((n_tokens // 32,), 32), 64)
assert kept.counts.tolist() == [64] * (n_tokens // 32)
print(peak_resident() - before)
"""


@pytest.mark.long
@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_a_wide_sae_takes_no_more_memory_than_its_budget_allows(kind):
    """
    131,072 features of 1,024 tokens would be 512 MiB dense. Of a budget of 16 MiB, dense activations are one, what
    decides of them a quarter, pooled ones and their squares one; a TopK holds as much again while it looks for the
    strongest, and what is freed in between is not always given back: 39 to 43 MiB and 63 to 96 MiB were measured.
    """
    command = [sys.executable, "-c", PEAK, kind, "256", str(2**17), "1024"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 2**24 < int(done.stdout) < 2**27


@pytest.mark.parametrize("kind", ["gemma_scope", "topk"])
def test_pooled_columns_carry_the_gradient_of_the_dense_mean(kind, tmp_path):
    sae, lengths = build(kind, tmp_path), [15, 25]
    columns = torch.tensor([[0, 5, 9], [9, 2, 20]])
    sparse_x = torch.from_numpy(random_tokens()).requires_grad_()
    dense_x = sparse_x.detach().clone().requires_grad_()
    sae.pooled_columns(sparse_x, lengths, columns).square().sum().backward()
    f = sae.encode(dense_x)
    dense = torch.stack([f[:15].mean(0), f[15:].mean(0)]).gather(1, columns)
    dense.square().sum().backward()
    torch.testing.assert_close(sparse_x.grad, dense_x.grad, rtol=1e-5, atol=1e-6)


def test_lengths_that_do_not_add_up_are_refused(tmp_path):
    sae, x = build("gemma_scope", tmp_path), torch.from_numpy(random_tokens())
    with pytest.raises(ValueError, match="add up to 39 tokens, x has 40"):
        sae.pooled_mean(x, [20, 19])
    with pytest.raises(ValueError, match="add up to 41 tokens, x has 40"):
        sae.pooled_columns(x, [20, 21], torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["gemma_scope", "topk"])
def test_bfloat16_inputs_and_autocast_change_nothing_but_the_input(kind, tmp_path):
    """The encoder computes in float32: a bfloat16 x gives what the same numbers in float32 give."""
    sae, x = build(kind, tmp_path), torch.from_numpy(random_tokens()).bfloat16()
    expected, columns = sae.encode(x.float()), torch.arange(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sae.encode(x), expected)
        torch.testing.assert_close(columns_of_tokens(sae, x, columns), expected[:, :5], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sae.pooled_mean(x, [40])[0], expected.mean(0), rtol=1e-6, atol=1e-6)


def test_fvu_and_l0_match_hand_calculation(tmp_path):
    """
    Features j < D_IN copy x_j where it exceeds 0.5, the others never fire. x = [1, 0.4, 0, ..], [3, ..]:
    what is missed is 0.4 per token; variance over tokens is (1-2)^2 + (3-2)^2. FVU = 2 * 0.16 / 2, L0 = 1.
    """
    t = random_sae()
    t["W_enc"] = np.eye(D_IN, D_SAE, dtype=np.float32)
    t["W_dec"] = np.eye(D_SAE, D_IN, dtype=np.float32)
    t["b_enc"], t["b_dec"] = np.zeros(D_SAE, np.float32), np.zeros(D_IN, np.float32)
    t["threshold"] = np.full(D_SAE, 0.5, np.float32)
    x = torch.zeros(2, D_IN)
    x[:, 0], x[:, 1] = torch.tensor([1.0, 3.0]), 0.4
    source = write_gemma_scope(tmp_path, t)
    fvu, l0 = load_sae(source).fvu_and_l0(x, read_decoder(source))
    assert fvu == pytest.approx(0.16, rel=1e-6)
    assert l0 == 1.0


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_fvu_is_measured_in_the_units_of_the_input(norm, tmp_path):
    """An SAE that copies the positive and the negative part of its input is perfect, whatever the norm."""
    eye, t = np.eye(D_IN, dtype=np.float32), random_sae(d_sae=2 * D_IN)
    t["W_enc"], t["W_dec"] = np.hstack([eye, -eye]), np.vstack([eye, -eye])
    t["b_enc"], t["b_dec"] = np.zeros(2 * D_IN, np.float32), np.zeros(D_IN, np.float32)
    source = write_saelens(tmp_path, t, "standard", normalize_activations=norm, metadata={})
    fvu, l0 = load_sae(source).fvu_and_l0(torch.from_numpy(random_tokens()), read_decoder(source))
    assert fvu == pytest.approx(0, abs=1e-10)
    assert l0 == D_IN


def test_to_moves_every_tensor_and_keeps_the_rest(tmp_path):
    sae = build("gated", tmp_path)
    moved = sae.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.facts == sae.facts
    assert sae.weight_FD.device.type == "cpu"


@pytest.fixture(scope="module")
def own_stories() -> dict[str, torch.Tensor]:
    """Output of every layer and of the final norm on the model's own stories, without the first token."""
    from transformers import AutoModelForCausalLM

    from fpo.scoring.hookpoints import capture, final_norm_name, hookpoint_names

    model = AutoModelForCausalLM.from_pretrained(DATA / "models/stories260K")
    names = [*hookpoint_names(model), final_norm_name(model)]
    torch.manual_seed(0)
    start = torch.ones(16, 1, dtype=torch.int64)
    options = {"max_new_tokens": 200, "do_sample": True, "eos_token_id": None}
    with torch.no_grad(), capture(model, names) as outputs:
        model(model.generate(start, attention_mask=torch.ones_like(start), **options))
    return {name: output[:, 1:].flatten(0, 1) for name, output in outputs.items()}


@pytest.mark.skipif(not REAL.exists(), reason="needs the real SAEs")
@pytest.mark.parametrize(
    ("sae_format", "fvu", "l0"),
    [("gemmascope", 0.086, 17.4), ("saelens", 0.063, 16), ("sparsify", 0.063, 16)],
)
def test_real_saes_show_their_advertised_l0_and_fvu_at_their_layer_alone(sae_format, fvu, l0, own_stories):
    """The figures that came with them; every other layer and the final norm are at least twice as bad."""
    sae, decoder = load_sae(str(REAL / sae_format)), read_decoder(str(REAL / sae_format))
    fvus = {}
    for name, x in own_stories.items():
        fvus[name], measured_l0 = sae.fvu_and_l0(x, decoder)
        if name == "model.layers.2":
            assert measured_l0 == pytest.approx(l0, rel=0.05)
    assert fvus.pop("model.layers.2") == pytest.approx(fvu, rel=0.15)
    assert min(fvus.values()) > 2 * fvu


def test_one_sae_in_three_formats_is_the_same_encoder(tmp_path):
    """b_dec = 0 makes the formats' conventions agree: jumprelu as Gemma Scope 1, 2 and SAELens write it."""
    t = {**random_sae(), "b_dec": np.zeros(D_IN, np.float32)}
    sources = [
        write_gemma_scope(tmp_path / "a", t),
        write_gemma_scope_2(tmp_path / "b", t),
        write_saelens(tmp_path / "c", t, "jumprelu", metadata={}),
    ]
    x = torch.from_numpy(random_tokens())
    first, *others = (load_sae(source) for source in sources)
    assert all(torch.equal(first.encode(x), other.encode(x)) for other in others)
    assert {dataclasses.replace(o.facts, format="") for o in others} == {dataclasses.replace(first.facts, format="")}
