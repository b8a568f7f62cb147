"""Small random SAEs in files of torch.save, as each library writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_saes import Tensors


def as_torch(t: Tensors, *names: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(t[name].copy()) for name in names}


def linear(t: Tensors) -> dict[str, torch.Tensor]:
    """Two nn.Linear without biases: rows are outputs."""
    return {
        "encoder.weight": torch.from_numpy(t["W_enc"].T.copy()),
        "decoder.weight": torch.from_numpy(t["W_dec"].T.copy()),
    }


def dictionary_state(dict_class: str, t: Tensors) -> dict[str, torch.Tensor]:
    """The state dict of a class of dictionary_learning; `threshold` of the BatchTopK ones is 0.7."""
    b_enc, b_dec = torch.from_numpy(t["b_enc"]), torch.from_numpy(t["b_dec"])
    one = {"k": torch.tensor(4, dtype=torch.int), "threshold": torch.tensor(0.7)}
    return {
        "AutoEncoder": {**linear(t), "encoder.bias": b_enc, "bias": b_dec},
        "AutoEncoderNew": {**linear(t), "encoder.bias": b_enc, "decoder.bias": b_dec},
        "GatedAutoEncoder": {
            **linear(t),
            "decoder_bias": b_dec,
            "r_mag": torch.from_numpy(t["r_mag"]),
            "gate_bias": torch.from_numpy(t["b_gate"]),
            "mag_bias": torch.from_numpy(t["b_mag"]),
        },
        "JumpReluAutoEncoder": as_torch(t, "W_enc", "W_dec", "b_enc", "b_dec", "threshold"),
        "AutoEncoderTopK": {**linear(t), "encoder.bias": b_enc, "b_dec": b_dec, **one},
        "BatchTopKSAE": {**linear(t), "encoder.bias": b_enc, "b_dec": b_dec, **one},
        "MatryoshkaBatchTopKSAE": {
            **as_torch(t, "W_enc", "W_dec", "b_enc", "b_dec"),
            **one,
            "group_sizes": torch.tensor([len(t["b_enc"]) // 4, len(t["b_enc"]) * 3 // 4]),
        },
    }[dict_class]


def write_dictionary(
    folder: Path, t: Tensors, dict_class: str, /, buffer: dict[str, Any] | None = None, **trainer: Any
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dictionary_state(dict_class, t), folder / "ae.pt")
    d_in, d_sae = t["W_enc"].shape
    said = {"dict_class": dict_class, "activation_dim": d_in, "dict_size": d_sae, "lm_name": "Qwen/Qwen3-4B"}
    config = {"trainer": {**said, **trainer}, "buffer": {"ctx_len": 128, **(buffer or {})}}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write_goodfire(path: Path, t: Tensors, suffix: str = "_linear") -> str:
    """qresearch's names have no suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name.replace(".", f"{suffix}."): matrix for name, matrix in linear(t).items()}
    biases = {f"encoder{suffix}.bias": t["b_enc"], f"decoder{suffix}.bias": t["b_dec"]}
    torch.save({**state, **{name: torch.from_numpy(bias) for name, bias in biases.items()}}, path)
    return str(path)


def write_qwen_scope(path: Path, t: Tensors) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    turned = {name: torch.from_numpy(t[name].T.copy()) for name in ("W_enc", "W_dec")}
    torch.save({**turned, **as_torch(t, "b_enc", "b_dec")}, path)
    return str(path)


def write_connor_rob(path: Path, t: Tensors, **config: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(as_torch(t, "W_enc", "W_dec", "b_enc", "b_dec"), path)
    d_in, d_sae = t["W_enc"].shape
    said = {"act_size": d_in, "dict_size": d_sae, "act_name": "blocks.5.attn.hook_z", "model_name": "gpt2-small"}
    path.with_name(f"{path.stem}_cfg.json").write_text(json.dumps({**said, **config}))
    return str(path)
