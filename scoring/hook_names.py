"""
Names of places in a model, as SAE files and users write them, in our word: a hookpoint, the path of the module whose
output an SAE reads, or with `:input` behind it, whose input.

What is neither (an input that a norm's gain has not seen yet) keeps its name, so that a message can show it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

INPUT = ":input"
"""Behind the path of a module whose input is meant."""


class _Names(NamedTuple):
    """Where a family has what TransformerLens names; inside a layer but for `layers`."""

    layers: str
    attention: str
    mlp: str
    attention_out: str
    """What attention adds to the residual stream."""
    mlp_out: str
    projection: str
    """Of the heads' outputs, concatenated."""
    middle: str | None
    """The norm that reads the residual stream between attention and MLP; None where these stand side by side."""


_LLAMA = _Names("model.layers", "self_attn", "mlp", "self_attn", "mlp", "self_attn.o_proj", "post_attention_layernorm")
# These normalise attention and MLP once more before they add them.
_GEMMA = _LLAMA._replace(
    attention_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    middle="pre_feedforward_layernorm",
)
_GPT2 = _Names("transformer.h", "attn", "mlp", "attn", "mlp", "attn.c_proj", "ln_2")
_NEOX = _Names("gpt_neox.layers", "attention", "mlp", "attention", "mlp", "attention.dense", None)


def from_transformer_lens(hook_name: str, model_name: str = "") -> str:
    """
    `blocks.12.hook_resid_post` -> `model.layers.12`, `blocks.3.attn.hook_z` -> `model.layers.3.self_attn.o_proj:input`.

    model_name  of a checkpoint, or a config's model_type: GPT-2, GPT-NeoX and Gemma have names of their own
    """
    match = re.fullmatch(r"blocks\.(\d+)\.((?:attn\.|mlp\.)?hook_\w+)", hook_name)
    if match is None:
        return from_module_path(hook_name)
    layer, site = int(match[1]), match[2]
    names = _names(model_name.lower())
    if site == "hook_resid_pre":
        return f"{names.layers}.{layer - 1}" if layer > 0 else f"{names.layers}.0{INPUT}"
    inside = {
        "hook_resid_post": "",
        "hook_resid_mid": None if names.middle is None else f".{names.middle}{INPUT}",
        "hook_attn_out": f".{names.attention_out}",
        "hook_mlp_out": f".{names.mlp_out}",
        "attn.hook_z": f".{names.projection}{INPUT}",
        "mlp.hook_in": f".{names.mlp}{INPUT}",
        "mlp.hook_out": f".{names.mlp}",
    }.get(site)
    return hook_name if inside is None else f"{names.layers}.{layer}{inside}"


def from_module_path(path: str) -> str:
    """`model.layers.12.output`, as Gemma Scope 2 writes it -> `model.layers.12`; `.input` is `:input` here."""
    return re.sub(r"\.input$", INPUT, path).removesuffix(".output")


def from_sparsify(place: str) -> str | None:
    """sparsify names its folders by the path inside the model: `layers.10.mlp` -> `model.layers.10.mlp`."""
    name = place.rstrip("/").rpartition("/")[2]
    if re.fullmatch(r"layers\.\d+(\.[\w.]+)?|embed_tokens", name):
        return f"model.{name}"
    return f"transformer.{name}" if re.fullmatch(r"h\.\d+(\.[\w.]+)?", name) else None


def from_gemma_scope(place: str) -> str | None:
    """Repository and path: `gemma-scope-2b-pt-res/layer_25/...` -> `model.layers.25`."""
    layer = re.search(r"layer_(\d+)(?:/|_width)", place)
    site = re.search(r"gemma-scope-[\w.]+-(?:pt|it)-(res|mlp|att)\b|/(resid_post|mlp_out|attn_out)\w*/", place)
    if layer is None or site is None:
        return None
    hook = {
        "res": "hook_resid_post",
        "resid_post": "hook_resid_post",
        "mlp": "hook_mlp_out",
        "mlp_out": "hook_mlp_out",
    }.get(site[1] or site[2], "attn.hook_z")
    return from_transformer_lens(f"blocks.{layer[1]}.{hook}", "gemma-2")


def in_our_words(name: str, model_type: str) -> str:
    """
    A hookpoint as users of SAELens, sparsify and Gemma Scope write it, of a model of this type; a name that none of
    them has stays as it is.
    """
    if name.startswith("blocks."):
        return from_transformer_lens(name, model_type)
    layer = re.fullmatch(r"(?:layers|h)\.(\d+)((?:\.[\w.]+)?(?::input)?)", name)
    if layer is not None:
        return f"model.layers.{layer[1]}{layer[2]}"
    return from_module_path(name)


def from_llama_scope(place: str) -> str | None:
    """`Llama3_1-8B-Base-L15R-8x` -> `model.layers.15`; R is the residual stream, M the MLP, A attention."""
    match = re.search(r"-L(\d+)([RMA])-\d+x", place)
    if match is None:
        return None
    hook = {"R": "hook_resid_post", "M": "hook_mlp_out", "A": "hook_attn_out"}[match[2]]
    return from_transformer_lens(f"blocks.{match[1]}.{hook}", "llama")


def _names(model_name: str) -> _Names:
    if "gpt2" in model_name:
        return _GPT2
    if "pythia" in model_name or "neox" in model_name:
        return _NEOX
    return _GEMMA if re.search(r"gemma-?[23]", model_name) else _LLAMA
