"""What SAE files say is read without their weights; what we cannot read right is refused in one line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file
from tiny_saes import (
    D_IN,
    D_SAE,
    random_sae,
    refusal,
    write_gemma_scope,
    write_gemma_scope_2,
    write_saelens,
    write_sparsify,
)

from fpo.errors import SaeError
from fpo.scoring.sae import (
    SaeFacts,
    read_decoder,
    read_sae,
    sae_config,
    sae_facts,
    sae_weight_files,
)
from fpo.scoring.sae.tensors import Weights


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that reads a tensor's values."""

    def fail(self: Weights, name: str) -> None:
        raise AssertionError(f"read {name}")

    monkeypatch.setattr(Weights, "read", fail)


def facts(*, elementwise: bool, **known: Any) -> SaeFacts:
    defaults = {"d_in": D_IN, "d_sae": D_SAE, "advertised_l0": None, "hook_hint": None, "center_input": False}
    found = SaeFacts(**{**defaults, **known})
    assert found.elementwise is elementwise
    return found


@pytest.mark.usefixtures("no_weights")
def test_gemma_scope_says_everything_in_its_path(tmp_path):
    path = tmp_path / "gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55"
    expected = facts(
        architecture="jumprelu",
        elementwise=True,
        format="gemma_scope",
        advertised_l0=55.0,
        hook_hint="model.layers.25",
    )
    source = write_gemma_scope(path, random_sae())
    assert sae_facts(source) == expected
    assert sae_facts(f"{source}/params.npz") == expected
    assert sae_config(source)["apply_b_dec_to_input"] is False


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        (
            "gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_60",
            "model.layers.3.post_feedforward_layernorm",
        ),
        ("gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_60", "model.layers.3.self_attn.o_proj:input"),
        ("elsewhere/layer_3/width_16k/average_l0_60", None),
    ],
)
def test_gemma_scope_sites_are_translated(path, hint, tmp_path):
    found = sae_facts(write_gemma_scope(tmp_path / path, random_sae()))
    assert (found.hook_hint, found.advertised_l0) == (hint, 60.0)


@pytest.mark.usefixtures("no_weights")
def test_gemma_scope_2_says_it_in_config_json(tmp_path):
    config = {
        "architecture": "jump_relu",
        "hf_hook_point_in": "model.layers.12.output",
        "l0": 40,
        "type": "sae",
    }
    expected = facts(
        architecture="jumprelu",
        elementwise=True,
        format="gemma_scope_2",
        advertised_l0=40.0,
        hook_hint="model.layers.12",
    )
    assert sae_facts(write_gemma_scope_2(tmp_path, random_sae(), config)) == expected


def test_gemma_scope_2_without_config_says_it_in_its_path(tmp_path):
    path = tmp_path / "gemma-scope-2-1b-pt/resid_post/layer_7_width_16k_l0_small"
    found = sae_facts(write_gemma_scope_2(path, random_sae()))
    assert (found.hook_hint, found.advertised_l0) == ("model.layers.7", None)


@pytest.mark.usefixtures("no_weights")
def test_saelens_topk_is_coupled_and_promises_k(tmp_path):
    metadata = {"hook_name": "blocks.12.hook_resid_post", "model_name": "meta-llama/Llama-3.1-8B"}
    expected = facts(
        architecture="topk",
        elementwise=False,
        format="saelens",
        advertised_l0=16.0,
        hook_hint="model.layers.12",
    )
    assert sae_facts(write_saelens(tmp_path, random_sae(), "topk", k=16, metadata=metadata)) == expected


@pytest.mark.parametrize(
    ("hook_name", "model_name", "hint"),
    [
        ("blocks.5.hook_resid_pre", "gpt2-small", "transformer.h.4"),
        ("blocks.0.hook_resid_pre", "gpt2-small", "transformer.h.0:input"),
        ("blocks.5.hook_mlp_out", "gpt2-small", "transformer.h.5.mlp"),
        ("blocks.5.hook_attn_out", "pythia-70m-deduped", "gpt_neox.layers.5.attention"),
        ("blocks.5.hook_attn_out", "gemma-2-2b", "model.layers.5.post_attention_layernorm"),
        ("blocks.5.hook_mlp_out", "mistral-7b", "model.layers.5.mlp"),
        ("blocks.5.hook_resid_mid", "mistral-7b", "model.layers.5.post_attention_layernorm:input"),
        ("model.layers.2", "stories260K", "model.layers.2"),
    ],
)
def test_transformer_lens_names_are_translated_for_each_family(hook_name, model_name, hint, tmp_path):
    metadata = {"hook_name": hook_name, "model_name": model_name}
    assert sae_facts(write_saelens(tmp_path, random_sae(), "standard", metadata=metadata)).hook_hint == hint


def test_centred_saes_say_so(tmp_path):
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    new = write_saelens(tmp_path / "new", random_sae(), "standard", metadata=kwargs)
    legacy = write_saelens(tmp_path / "old", random_sae(), "standard", **kwargs)
    assert sae_facts(new).center_input
    assert sae_facts(legacy).center_input
    assert sae_config(new)["center_input"] is True


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("folder", "hint"),
    [("layers.10.mlp", "model.layers.10.mlp"), ("h.3.attn", "transformer.h.3.attn"), ("mine", None)],
)
def test_sparsify_hooks_where_its_folder_says(folder, hint, tmp_path):
    expected = facts(architecture="topk", elementwise=False, format="sparsify", advertised_l0=4.0, hook_hint=hint)
    assert sae_facts(write_sparsify(tmp_path / folder, random_sae())) == expected


def test_a_hookpoint_chooses_among_the_folders_of_a_sparsify_repository(tmp_path):
    for seed, name in enumerate(("layers.1", "layers.2", "h.2")):
        write_sparsify(tmp_path / name, random_sae(seed))
    chosen = read_sae(str(tmp_path), "model.layers.2")
    np.testing.assert_array_equal(chosen.W, random_sae(1)["W_enc"])
    assert sae_facts(str(tmp_path), "transformer.h.2").hook_hint == "transformer.h.2"
    assert sae_weight_files(str(tmp_path), "model.layers.1") == [tmp_path / "layers.1/sae.safetensors"]
    with pytest.raises(SaeError, match=r"no SAE here; found h\.2/, layers\.1/, layers\.2/"):
        sae_facts(str(tmp_path))


@pytest.mark.parametrize(("torch_name", "steps"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float64", 0)])
def test_weights_of_any_float_type_are_read_as_float32(torch_name, steps, tmp_path):
    """Rounding to 8 or 11 significant bits moves a value by at most half a step of its size."""
    import torch
    from safetensors.torch import save_file as save_torch

    source, t = write_sparsify(tmp_path, random_sae()), random_sae()
    tensors = load_file(tmp_path / "sae.safetensors")
    stored = {name: torch.from_numpy(a).to(getattr(torch, torch_name)) for name, a in tensors.items()}
    save_torch(stored, tmp_path / "sae.safetensors")
    W = read_sae(source).W
    assert W.dtype == np.float32
    np.testing.assert_array_equal(W, stored["encoder.weight"].float().numpy().T)
    np.testing.assert_allclose(W, t["W_enc"], rtol=steps)


def test_config_is_json_without_floats_and_decides_nothing_by_name(tmp_path):
    t = random_sae()
    one = sae_config(write_saelens(tmp_path / "a", t, "topk", k=3, metadata={"model_name": "a"}))
    other = sae_config(write_saelens(tmp_path / "b", t, "topk", k=3, metadata={"model_name": "b"}))
    assert one == other
    assert json.loads(json.dumps(one)) == one
    assert {type(value) for value in one.values()} <= {str, int, bool, type(None)}
    assert one != sae_config(write_saelens(tmp_path / "c", t, "topk", k=4, metadata={}))


def test_only_the_encoder_is_read(tmp_path, monkeypatch):
    read, names = Weights.read, []
    monkeypatch.setattr(Weights, "read", lambda self, name: names.append(name) or read(self, name))
    source = write_gemma_scope(tmp_path, random_sae())
    read_sae(source)
    assert sorted(names) == ["W_enc", "b_enc", "threshold"]
    W_dec, b_dec, _ = read_decoder(source)
    assert (W_dec.shape, b_dec.shape) == ((D_SAE, D_IN), (D_IN,))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None]]:
    """A hub that has the files under tmp_path/hub/owner/repo; the list says what was asked for."""
    asked = []

    def download(repo: str, name: str, revision: str | None = None) -> str:
        asked.append((repo, name, revision))
        path = tmp_path / "hub" / repo / name
        if not path.is_file():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


GEMMA = "google/gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55"


def test_a_hub_source_is_a_repository_and_a_folder_inside(hub, tmp_path):
    write_gemma_scope(tmp_path / "hub" / GEMMA, random_sae())
    found = sae_facts(GEMMA)
    assert (found.advertised_l0, found.hook_hint) == (55.0, "model.layers.25")
    folder = "layer_25/width_16k/average_l0_55"
    assert hub[0] == ("google/gemma-scope-2b-pt-res", f"{folder}/params.npz", None)
    assert sae_facts(f"{GEMMA}/params.npz") == found
    np.testing.assert_array_equal(read_sae(GEMMA).W, random_sae()["W_enc"])


def test_a_hub_source_may_name_a_revision_or_a_file_at_the_root(hub, tmp_path):
    write_saelens(tmp_path / "hub/me/my.sae", random_sae(), "standard", metadata={})
    assert sae_facts("me/my.sae@v1.0").architecture == "relu"
    assert set(hub) == {
        ("me/my.sae", name, "v1.0")
        for name in ("params.npz", "params.safetensors", "sae_weights.safetensors", "cfg.json", "config.json")
    }


def test_a_hookpoint_chooses_the_folder_on_the_hub(hub, tmp_path):
    write_sparsify(tmp_path / "hub/EleutherAI/sae-llama/layers.10", random_sae())
    assert sae_facts("EleutherAI/sae-llama", "model.layers.10").hook_hint == "model.layers.10"
    assert sae_facts("EleutherAI/sae-llama/layers.10").hook_hint == "model.layers.10"


def test_a_repository_without_an_sae_is_refused(hub):
    with pytest.raises(SaeError, match=r"repository me/repo has no SAE in 'folder'; accepted: Gemma Scope"):
        sae_facts("me/repo/folder")


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
    def download(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("not here") from ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(SaeError, match=r"not in the hub's cache, and the hub cannot be reached \(ConnectionError\)"):
        sae_facts("me/repo/folder")


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("temporal", "attends over positions"),
        ("matching_pursuit", "iterative"),
        ("abstopk", "signed"),
        ("batchtopk", "without topk_threshold is not supported: export it with SAELens' save_inference_model"),
        ("matryoshka_batchtopk", "a BatchTopK checkpoint without topk_threshold"),
        ("transcoder", "a transcoder without hook_name_out is not supported"),
        ("quantum", "architecture 'quantum' is not supported: supported: standard, jumprelu, gated, topk"),
    ],
)
def test_saelens_architectures_that_are_no_token_encoder_are_refused(architecture, reason, tmp_path):
    assert reason in refusal(write_saelens(tmp_path, random_sae(), architecture, metadata={}))


@pytest.mark.parametrize(
    "options",
    [
        {"hook_point": "blocks.1.attn.hook_z"},
        {"reshape_activations": "hook_z", "metadata": {"hook_name": "blocks.1.attn.hook_z"}},
    ],
)
def test_an_sae_of_attention_heads_reads_the_input_of_their_projection(options, tmp_path):
    source = write_saelens(tmp_path, random_sae(), "standard", **options)
    assert sae_facts(source).hook_hint == "model.layers.1.self_attn.o_proj:input"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"reshape_activations": "flatten", "metadata": {}}, "reshape_activations flatten"),
        ({"normalize_activations": "covariance_whitening", "metadata": {}}, "covariance_whitening"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn tanh-relu"),
        ({"d_sae": 99, "metadata": {}}, "config says d_sae 99, the weights have 24"),
    ],
)
def test_saelens_options_that_we_do_not_compute_are_refused(options, reason, tmp_path):
    assert reason in refusal(write_saelens(tmp_path, random_sae(), "standard", **options))


def test_a_topk_without_k_is_refused(tmp_path):
    assert "has no k" in refusal(write_saelens(tmp_path, random_sae(), "topk", metadata={}))


def test_more_active_features_than_there_are_is_refused(tmp_path):
    assert "k is 99, of 24 features" in refusal(write_sparsify(tmp_path, random_sae(), k=99))


def test_a_threshold_that_was_never_set_is_refused(tmp_path):
    t = {**random_sae(), "threshold": np.full(D_SAE, -1, np.float32)}
    assert "threshold -1" in refusal(write_saelens(tmp_path, t, "jumprelu", metadata={}), weights=True)


def test_a_scaling_factor_is_refused_unless_it_is_one(tmp_path):
    ones = {**random_sae(), "scaling_factor": np.ones(D_SAE, np.float32)}
    read_sae(write_saelens(tmp_path / "one", ones, "standard"))
    twos = {**ones, "scaling_factor": np.full(D_SAE, 2, np.float32)}
    assert "scaling_factor other than 1" in refusal(write_saelens(tmp_path / "two", twos, "standard"), True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"transcode": True}, "a transcoder in a folder that names no module"),
        ({"signed": True}, "signed"),
        ({"activation": "batchtopk"}, "activation batchtopk is not supported: supported: topk, groupmax"),
        ({"activation": "groupmax", "k": 5}, "24 features do not split into 5 equal groups"),
        ({"num_latents": 48}, "announces d_in 6 and 48 latents, encoder.weight has 6 and 24"),
        ({"num_latents": 0, "expansion_factor": 32}, "announces d_in 6 and 192 latents"),
    ],
)
def test_sparsify_options_that_we_do_not_compute_are_refused(options, reason, tmp_path):
    assert reason in refusal(write_sparsify(tmp_path, random_sae(), **options))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"type": "transcoder"}, "a transcoder that does not name its places"),
        ({"affine_connection": True}, "a transcoder that does not name its places"),
        ({"type": "cross_layer_transcoder"}, "a cross-layer transcoder"),
        ({"type": "crosscoder"}, "a crosscoder"),
        ({"architecture": "topk"}, "architecture topk"),
    ],
)
def test_gemma_scope_2_kinds_that_are_no_sae_are_refused(config, reason, tmp_path):
    assert reason in refusal(write_gemma_scope_2(tmp_path, random_sae(), config))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_9", "a norm's output without its gain"),
        ("transcoder_all/layer_1_width_16k_l0_small", "a transcoder that does not name its places"),
        ("clt/layer_1_width_16k_l0_small", "a cross-layer transcoder"),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_9", "an embedding SAE"),
    ],
)
def test_gemma_scope_paths_that_name_no_sae_of_a_hookpoint_are_refused(path, reason, tmp_path):
    assert reason in refusal(write_gemma_scope(tmp_path / path, random_sae()))


def test_sources_that_are_no_sae_are_refused_with_what_was_found(tmp_path):
    (tmp_path / "sae.bin").touch()
    assert "found sae.bin; accepted: Gemma Scope" in refusal(str(tmp_path))
    assert "a file named sae.bin" in refusal(str(tmp_path / "sae.bin"))
    assert "no such folder, and not a hub id" in refusal(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "found nothing" in refusal(str(tmp_path / "empty"))


def test_two_formats_in_one_folder_are_refused(tmp_path):
    write_gemma_scope(tmp_path, random_sae())
    source = write_saelens(tmp_path, random_sae(), "standard", metadata={})
    assert "holds params.npz and sae_weights.safetensors" in refusal(source)


def test_a_missing_or_broken_config_is_refused(tmp_path):
    source = write_saelens(tmp_path, random_sae(), "standard")
    (tmp_path / "cfg.json").write_text("{")
    assert "is not JSON" in refusal(source)
    (tmp_path / "cfg.json").write_text("[" * 100_000)
    assert "is not JSON" in refusal(source)
    (tmp_path / "cfg.json").write_text("[]")
    assert "holds a list" in refusal(source)
    (tmp_path / "cfg.json").unlink()
    assert "cfg.json is missing" in refusal(source)


@pytest.mark.parametrize("write", [write_gemma_scope, write_gemma_scope_2, write_sparsify])
def test_a_cut_file_or_a_git_lfs_pointer_is_refused(write, tmp_path):
    source = write(tmp_path, random_sae())
    path = sae_weight_files(source)[0]
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:5],
        whole[: len(whole) // 2],
        whole[:-1],
        b"version https://git-lfs.github.com/spec/v1\n",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ):
        path.write_bytes(damaged)
        assert "cannot be read" in refusal(source)


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_refused(tmp_path):
    """One more row in the header than the bytes hold: read on, it would take another tensor's bytes."""
    source = write_sparsify(tmp_path, random_sae())
    path = tmp_path / "sae.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[24,6]', b'"shape":[25,6]'))
    (tmp_path / "cfg.json").write_text(json.dumps({"num_latents": 25, "k": 4}))
    assert "cannot be read (Error while deserializing header: invalid shape" in refusal(source)


def test_a_flipped_byte_of_an_npz_is_refused(tmp_path):
    source = write_gemma_scope(tmp_path, random_sae())
    path = tmp_path / "params.npz"
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(bytes(content))
    assert "W_enc" in refusal(source, weights=True)


def test_values_that_are_not_finite_are_refused(tmp_path):
    t = random_sae()
    t["W_enc"][2, 3] = np.nan
    assert "W_enc" in refusal(write_gemma_scope(tmp_path, t), weights=True)


def test_missing_tensors_and_wrong_shapes_are_refused(tmp_path):
    source = write_saelens(tmp_path, random_sae(), "standard", metadata={})
    path = tmp_path / "sae_weights.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "b_enc": tensors["b_dec"]}, path)
    assert "b_enc must have shape (24,), sae_weights.safetensors has (6,)" in refusal(source)
    save_file({name: value for name, value in tensors.items() if name != "W_enc"}, path)
    assert "has no matrix W_enc; found W_dec (24, 6), b_dec (6,), b_enc (24,)" in refusal(source)


def test_a_missing_decoder_matters_only_where_it_is_asked_for(tmp_path):
    t = random_sae()
    np.savez(tmp_path / "params.npz", **{name: t[name] for name in ("W_enc", "b_enc", "threshold")})
    read_sae(str(tmp_path))
    with pytest.raises(SaeError, match=r"W_dec must have shape \(24, 6\), found no such tensor"):
        read_decoder(str(tmp_path))


@pytest.mark.parametrize("kind", ["compressed", "holes"])
def test_an_sae_that_is_far_larger_than_its_file_is_refused_before_it_is_read(kind, tmp_path):
    """Zeros: 256 MiB from 256 kB of zip, or from a file that is one hole."""
    rows = 2**26 // D_IN
    if kind == "compressed":
        tensors = {**random_sae(), "W_enc": np.zeros((D_IN, rows), np.float32)}
        np.savez_compressed(tmp_path / "params.npz", **tensors)
        weights, name = Weights("mine", tmp_path / "params.npz"), "W_enc"
    else:
        n_bytes = 4 * D_IN * rows
        header = json.dumps({"w_enc": {"dtype": "F32", "shape": [D_IN, rows], "data_offsets": [0, n_bytes]}}).encode()
        with (tmp_path / "params.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + n_bytes)
        weights, name = Weights("mine", tmp_path / "params.safetensors"), "w_enc"
    tracemalloc.start()
    with pytest.raises(SaeError, match=rf"{name} in .* claims \d+ bytes, the file holds \d+ for it"):
        weights.read(name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_integer_weights_are_refused(tmp_path):
    source = write_gemma_scope(tmp_path, random_sae())
    t = dict(np.load(tmp_path / "params.npz"))
    np.savez(tmp_path / "params.npz", **{**t, "W_enc": t["W_enc"].astype(np.int32)})
    assert "dtype int32, expected a float" in refusal(source, weights=True)
