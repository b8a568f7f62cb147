"""
Tiny random models of the decoder-only text families that transformers has, and variants that a check could miss.

    make families    write docs/families.md: in which layout each of them is measured rightly
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_groups import some_groups
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fpo.errors import ModelError
from fpo.scoring import choose_layout, extremes, install_scoring
from fpo.scoring.families import silence_dropout
from fpo.scoring.hookpoints import hookpoint_names

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
# Tokens of each group's prompt and completions: beyond every window, chunk and original length below, one to four
# completions, an empty prompt, completions of one token.
SHAPES = [(60, 60, 20), (5, 20, 3), (0, 40, 2), (1, 1, 6), (3, 1, 1), (4, 5, 1, 30, 2), (2, 7)]

# By the names that configs use: a field is set where a family's config has it.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "embedding_size": 32,
    "embedding_dim": 32,
    "dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "dff": 48,
    "n_inner": 48,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "num_blocks": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "kv_channels": 8,
    "attention_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "rotary_dim": 4,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "sliding_window": 24,
    "attention_window": 24,
    "attention_window_size": 24,
    "window_size": 24,
    "attention_chunk_size": 24,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": 32,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "use_cache": False,
}

ROPE = {"rope_theta": 10000.0}
NO_MLA = {"num_key_value_heads": 4}
CONV = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
LONGROPE = {**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
FAMILIES = """
    afmoe apertus arcee aria_text bailing_hybrid bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe ctrl
    cwm deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon
    falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe
    glm4_moe_lite gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe
    granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
    internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4_text
    longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral ministral3 mistral
    mixtral modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt
    persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
    recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlstm youtu zamba zamba2
    zaya
"""
# What a family needs beside the sizes, and what makes a factor, a layer kind or a random choice show.
NEEDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "deepseek_v2": NO_MLA,
    "deepseek_v3": NO_MLA,
    "deepseek_v32": NO_MLA,
    "dots1": {"n_shared_experts": 1},
    "falcon": {"attention_dropout": 0.5, "hidden_dropout": 0.5, "alibi": False},
    "glm4_moe_lite": NO_MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 8.0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {**NO_MLA, "num_local_experts": 4, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": CONV,
    "lfm2_moe": CONV,
    "longcat_flash": NO_MLA,
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "minicpm3": {**NO_MLA, "dim_model_base": 8},
    "persimmon": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "phi3": {"original_max_position_embeddings": 256},
    "qwen2": {"use_sliding_window": False},
    "youtu": NO_MLA,
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "falcon, new architecture": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "llama, RoPE yarn": (
        "llama",
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "llama, RoPE llama3": (
        "llama",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama, RoPE dynamic, short data": ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}),
    "llama, RoPE dynamic": (
        "llama",
        {"max_position_embeddings": 64, "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}},
    ),
    "llama, stray sliding_window": ("llama", {"sliding_window": 24}),
    "llama, stray final_logit_softcapping": ("llama", {"final_logit_softcapping": 1.0}),
    "llama, stray logit_scale": ("llama", {"logit_scale": 0.25, "logits_scaling": 8.0}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "opt, layerdrop": ("opt", {"layerdrop": 0.5, "dropout": 0.5}),
    "opt, projected embeddings": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "phi3, RoPE longrope, short data": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256, "max_position_embeddings": 512},
    ),
    "phi3, RoPE longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3, windows": ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, NEEDS.get(name, {})) for name in FAMILIES.split()},
    **VARIANTS,
}


def build(case: str) -> PreTrainedModel:
    """A random float32 model as `load_model` leaves one."""
    name, needs = CASES[case]
    config_class = CONFIG_MAPPING[name]
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    settings = {field: value for field, value in SIZES.items() if field in known and field not in needs}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**settings, **needs)).eval()
    silence_dropout(model)
    return model


def hookpoint(model: PreTrainedModel) -> str:
    """The output of the second layer; of its MLP where a layer gives several streams."""
    name = hookpoint_names(model)[1]
    return f"{name}.mlp" if model.config.model_type == "gemma3n_text" else name


def outcome(model: PreTrainedModel) -> str:
    """The layout that the check chooses for a model, or in a line why it refuses; scoring is installed."""
    _, splits, n_completions = some_groups(SHAPES)
    few = [SHAPES[group] for group in extremes(splits, n_completions)]
    try:
        install_scoring(model, (hookpoint(model),))
        return str(choose_layout(model, *some_groups(few)))
    except ModelError as error:
        return "refused: " + str(error).partition(": ")[2].splitlines()[-1].strip()


def page(outcomes: dict[str, str]) -> str:
    """docs/families.md."""
    lines = [
        "# Model families",
        "",
        "What the check says about a tiny random model of each family, with windows, chunks and original lengths that "
        "the groups cross (`make families` writes this page, `make test-families` holds it against separate forwards). "
        "A name is transformers' `model_type`; the check itself runs on your model and your groups, whatever stands "
        "here.",
        "",
    ]
    for layout, title in (
        ("packed", "Right packed: all groups in one row, the prompt computed once"),
        ("masked", "Right under masks: an attention of its own, the prompt computed once"),
        ("rows", "Right in rows of their own"),
    ):
        names = [case for case, found in outcomes.items() if found == layout]
        lines += [f"## {title} ({len(names)})", "", *(f"- {name}" for name in names), ""]
    lines += ["## Refused", ""]
    for case, found in outcomes.items():
        if found.startswith("refused: "):
            lines.append(f"- {case}: {found.removeprefix('refused: ')}")
    return "\n".join(lines) + "\n"


def measure(cases: list[str]) -> dict[str, str]:
    """The outcome of each case."""
    return {case: outcome(build(case)) for case in cases}


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    PAGE.write_text(page(measure(list(CASES))), encoding="utf-8")
