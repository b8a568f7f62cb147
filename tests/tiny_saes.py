"""Small random SAEs, written to disk as each format writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fpo.errors import SaeError
from fpo.scoring.sae import read_sae, sae_facts

D_IN, D_SAE = 6, 24
Tensors = dict[str, NDArray[np.float32]]


def random_sae(seed: int = 0, d_in: int = D_IN, d_sae: int = D_SAE) -> Tensors:
    """All tensors that any format knows; a threshold that a quarter of the active features do not pass."""
    rng = np.random.default_rng(seed)
    shapes = {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "b_enc": (d_sae,),
        "b_dec": (d_in,),
        "b_gate": (d_sae,),
        "b_mag": (d_sae,),
        "r_mag": (d_sae,),
    }
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {**tensors, "threshold": rng.uniform(0.2, 1.5, d_sae).astype(np.float32)}


def random_tokens(n: int = 40, seed: int = 1, d_in: int = D_IN) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((n, d_in)) + 0.5).astype(np.float32)


def write_gemma_scope(folder: Path, t: Tensors) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **pick(t, "W_enc", "W_dec", "b_enc", "b_dec", "threshold"))
    return str(folder)


def write_gemma_scope_2(folder: Path, t: Tensors, config: dict[str, Any] | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = pick(t, "W_enc", "W_dec", "b_enc", "b_dec", "threshold", *(n for n in t if "affine" in n))
    save_file({name.lower(): array for name, array in tensors.items()}, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


SAELENS_TENSORS = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "jumprelu_transcoder": ("b_enc", "threshold"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold"),
}


def write_saelens(folder: Path, t: Tensors, architecture: str, **config: Any) -> str:
    """`config` goes into cfg.json as it is; without `metadata` the file is a legacy one."""
    folder.mkdir(parents=True, exist_ok=True)
    names = SAELENS_TENSORS.get(architecture, ("b_enc",))
    extra = [n for n in ("scaling_factor", "log_threshold", "topk_threshold") if n in t]
    kept = [n for n in (*names, "W_skip") if n in t]
    save_file(pick(t, "W_enc", "W_dec", "b_dec", *kept, *extra), folder / "sae_weights.safetensors")
    d_in, d_sae = t["W_enc"].shape
    cfg = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}
    (folder / "cfg.json").write_text(json.dumps({**cfg, **config}))
    return str(folder)


def write_sparsify(folder: Path, t: Tensors, **config: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "encoder.weight": np.ascontiguousarray(t["W_enc"].T),
        "encoder.bias": t["b_enc"],
        "W_dec": t["W_dec"],
        "b_dec": t["b_dec"],
    }
    save_file(tensors | {n: t[n] for n in ("W_skip",) if n in t}, folder / "sae.safetensors")
    d_in, d_sae = t["W_enc"].shape
    cfg = {"activation": "topk", "num_latents": d_sae, "k": 4, "d_in": d_in, **config}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return str(folder)


def write_llama_scope(folder: Path, t: Tensors, **config: Any) -> str:
    """Trained on inputs of mean norm 5; one threshold for all features."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_file(linear_layers(t), folder / "checkpoints/final.safetensors")
    d_in, d_sae = t["W_enc"].shape
    hyperparams = {
        "d_model": d_in,
        "d_sae": d_sae,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.75,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 5.0, "out": 5.0},
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "top_k": 50,
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
    }
    (folder / "hyperparams.json").write_text(json.dumps({**hyperparams, **config}))
    return str(folder)


def write_openmoss(folder: Path, t: Tensors, act_fn: str, **config: Any) -> str:
    """Trained on inputs of mean norm 5; where t has W_glu and b_glu, a GLU encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    hook = "blocks.15.hook_resid_post"
    names = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D", "W_glu": "W_E_glu", "b_glu": "b_E_glu"}
    tensors = {names[name]: array for name, array in t.items() if name in names}
    tensors[f"dataset_average_activation_norm.{hook}"] = np.array(5, np.float32)
    if act_fn == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = np.log(t["threshold"])
    save_file(tensors, folder / "sae_weights.safetensors")
    cfg = {
        "sae_type": "sae",
        "d_model": t["W_enc"].shape[0],
        "expansion_factor": t["W_enc"].shape[1] / t["W_enc"].shape[0],
        "act_fn": act_fn,
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 50,
        "use_decoder_bias": True,
        "use_glu_encoder": "W_glu" in t,
        "hook_point_in": hook,
        "hook_point_out": hook,
    }
    (folder / "config.json").write_text(json.dumps({**cfg, **config}))
    return str(folder)


def write_llama_scope_r1(folder: Path, t: Tensors, **config: Any) -> str:
    """The scale of its input is 0.5; None is none."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {**linear_layers(t), "log_jumprelu_threshold": np.log(t["threshold"])}
    save_file(tensors, folder / "sae_weights.safetensors")
    cfg = {
        "sae_type": "sae",
        "d_model": t["W_enc"].shape[0],
        "expansion_factor": t["W_enc"].shape[1] // t["W_enc"].shape[0],
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "norm_scaling_factor": 0.5,
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_glu_encoder": False,
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
    }
    said = {name: value for name, value in {**cfg, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(said))
    return str(folder)


def linear_layers(t: Tensors) -> Tensors:
    """Encoder and decoder as torch's linear layers keep them."""
    return {
        "encoder.weight": np.ascontiguousarray(t["W_enc"].T),
        "encoder.bias": t["b_enc"],
        "decoder.weight": np.ascontiguousarray(t["W_dec"].T),
        "decoder.bias": t["b_dec"],
    }


def pick(t: Tensors, *names: str) -> Tensors:
    return {name: t[name] for name in names}


def refusal(source: str, weights: bool = False) -> str:
    """What reading an SAE is refused with: one line that begins with its source."""
    with pytest.raises(SaeError) as error:
        read_sae(source) if weights else sae_facts(source)
    message = str(error.value)
    assert message.startswith(f"SAE {source}: ")
    assert "\n" not in message
    return message
