"""
A model's configuration as transformers resolves it: what config.json leaves out filled in, old spellings turned into
new ones, no weights loaded. Checkpoints of the hub are often sparse (Gemma-3 names no vocabulary), so nothing else
reads config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from fpo.errors import ModelError

# What a configuration says that changes no log-prob: bookkeeping, generation, training, and dropout, which is off.
_NOISE = frozenset(
    (
        "_name_or_path",
        "architectures",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "torchscript",
        "pretraining_tp",
        "unsloth_version",
        "unsloth_fixed",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "cls_token_id",
        "sep_token_id",
        "id2label",
        "label2id",
        "task_specific_params",
        "problem_type",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "initializer_range",
        "tokenizer_class",
        "auto_map",
        "chunk_size_feed_forward",
        "attention_dropout",
        "hidden_dropout",
        "classifier_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "summary_first_dropout",
    )
)
# With these the angle of a position depends on nothing but the position; the others stretch it by the maximum.
_ROPE_WITHOUT_MAXIMUM = frozenset(("default", "linear", "llama3"))


def model_config(folder: Path) -> PretrainedConfig:
    """
    The configuration of a causal language model, from its folder. Raises ModelError for a file that transformers
    cannot read and for what is no causal language model.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"it holds a {type(raw).__name__}, not an object")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a stranger's file, read by code that has no common base class for its complaints
        if "custom code" in str(error):
            raise ModelError(
                f"{folder}: this model brings code of its own (auto_map), which is never run; "
                "use a family that transformers knows"
            ) from None
        raise ModelError(f"{path}: cannot be read: {one_line(error)}") from None
    _check_causal(folder, config)
    if (weights := getattr(config, "transformers_weights", None)) is not None:
        raise ModelError(
            f"{path}: transformers_weights names another weights file, {weights}; name it model.safetensors"
        )
    return config


def positions(config: PretrainedConfig) -> int | None:
    """How many positions the model was made for; None where its configuration does not say."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def significant_config(config: PretrainedConfig) -> dict[str, Any]:
    """
    What of a configuration can change a log-prob, as canonical JSON takes it.

    Left out are noise and whatever equals the family's default: a field that a later version of transformers adds
    keeps what models without it compute. Two configurations that compute differently never give the same.
    """
    try:
        defaults = type(config)().to_dict()
    except Exception:  # a family whose configuration has required fields
        defaults = {}
    found: dict[str, Any] = _reduced(config.to_dict(), defaults)
    return {"model_type": config.model_type, **found}


def _reduced(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields that are neither noise nor at their default, section by section."""
    noise = _NOISE | ({"max_position_embeddings"} if _ignores_maximum(values) else set())
    if "rope_type" in values:
        noise |= {"type"}  # its name before transformers 4.43, kept beside the new one
    reduced = {}
    for name, value in values.items():
        default = defaults.get(name)
        spelled, usual = _spelled(value), _spelled(default)
        if name in noise or (type(spelled) is type(usual) and spelled == usual):
            continue
        if isinstance(value, dict):
            reduced[str(name)] = _reduced(value, default if isinstance(default, dict) else {})
        else:
            reduced[str(name)] = spelled
    return reduced


def _ignores_maximum(values: dict[str, Any]) -> bool:
    """Whether max_position_embeddings moves no number: rotary positions, not stretched by the maximum."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return False
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    return bool(kinds) and all(kind.get("rope_type") in _ROPE_WITHOUT_MAXIMUM for kind in kinds)


def _spelled(value: Any) -> Any:
    """A canonical key holds no floats: a whole one as its integer, since files write 10000 or 10000.0 at will."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else repr(value)
    if isinstance(value, dict):
        return {str(name): _spelled(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    return value if isinstance(value, str | int | None) else str(value)


def _check_causal(folder: Path, config: PretrainedConfig) -> None:
    """ModelError, before any weights load, where a model does not predict each token from those before it."""
    kind = config.model_type
    where = f"{folder}: {kind} is not a causal language model"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{where}: it has an encoder and a decoder; name a decoder-only model")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{where}, or transformers has no such class for it; name a decoder-only model")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ModelError(f"{where}: it looks at what follows a token (is_decoder is false); name a decoder-only model")


def one_line(error: BaseException) -> str:
    """A library's complaint on one line, cut where it goes on about its own options."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 300 else text[:300].rsplit(" ", 1)[0] + " ...") or type(error).__name__
