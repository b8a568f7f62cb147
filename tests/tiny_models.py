"""Tiny random models of real architectures, built here and never downloaded."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {"vocab_size": 97, "max_position_embeddings": 64}
LLAMA_LIKE = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": LLAMA_LIKE,
    "gemma2": {
        **LLAMA_LIKE,
        "sliding_window": 5,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {**LLAMA_LIKE, "num_hidden_layers": 6, "sliding_window": 5},
    "qwen2": {**LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, "sliding_window": 5},
    "gpt2": {**COMMON, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "gpt_neox": {
        **COMMON,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
}
# Families that cannot share a prompt: ALiBi, state space, attention by distance in the row.
ROWS_FAMILIES: dict[str, dict[str, object]] = {
    "bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon_mamba": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "time_step_rank": 4},
    "gpt_neo": {
        **COMMON,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 8,
    },
}
LAYER = {
    "gpt2": "transformer.h.1",
    "gpt_neox": "gpt_neox.layers.1",
    "bloom": "transformer.h.1",
    "gpt_neo": "transformer.h.1",
    "falcon_mamba": "backbone.layers.1",
}


def tiny_model(family: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random float32 model with weights large enough that its predictions are far from uniform."""
    torch.manual_seed(seed)
    settings = {**(FAMILIES | ROWS_FAMILIES)[family], "initializer_range": 0.2, **overrides}
    config = AutoConfig.for_model(family, **settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.use_cache = False
    return model


def layer_of(family: str) -> str:
    """A middle layer's output, as a hookpoint."""
    return LAYER.get(family, "model.layers.1")
