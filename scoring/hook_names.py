"""
What SAE files say about where they hook, in our word: the path of the module whose output the SAE reads.

Where the place is no module's output (the input of the attention's output projection, between attention and
MLP) the files' own name is kept, so that a message can still show it.
"""

from __future__ import annotations

import re


def from_transformer_lens(hook_name: str, model_name: str = "") -> str:
    """`blocks.12.hook_resid_post` -> `model.layers.12`; GPT-2, GPT-NeoX and Gemma have names of their own."""
    match = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", hook_name)
    if match is None:
        return from_module_path(hook_name)
    layer, site = int(match[1]), match[2]
    layers, attention, mlp = _names(model_name.lower())
    if site == "hook_resid_pre" and layer > 0:
        return f"{layers}.{layer - 1}"
    inside = {"hook_resid_post": "", "hook_attn_out": f".{attention}", "hook_mlp_out": f".{mlp}"}.get(site)
    return hook_name if inside is None else f"{layers}.{layer}{inside}"


def from_module_path(path: str) -> str:
    """`model.layers.12.output`, as Gemma Scope 2 writes it -> `model.layers.12`; an input keeps its name."""
    return path.removesuffix(".output")


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


def from_llama_scope(place: str) -> str | None:
    """`Llama3_1-8B-Base-L15R-8x` -> `model.layers.15`; R is the residual stream, M the MLP, A attention."""
    match = re.search(r"-L(\d+)([RMA])-\d+x", place)
    if match is None:
        return None
    hook = {"R": "hook_resid_post", "M": "hook_mlp_out", "A": "hook_attn_out"}[match[2]]
    return from_transformer_lens(f"blocks.{match[1]}.{hook}", "llama")


def _names(model_name: str) -> tuple[str, str, str]:
    """Path of the layers, and of what attention and MLP add to the residual stream."""
    if "gpt2" in model_name:
        return "transformer.h", "attn", "mlp"
    if "pythia" in model_name or "neox" in model_name:
        return "gpt_neox.layers", "attention", "mlp"
    if re.search(r"gemma-?[23]", model_name):
        # These normalise attention and MLP once more before they add them.
        return "model.layers", "post_attention_layernorm", "post_feedforward_layernorm"
    return "model.layers", "self_attn", "mlp"
