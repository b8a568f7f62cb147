"""
Hookpoints: the named module whose output an SAE reads, or with `:input` behind the name, whose input.

A hookpoint is the module path that `named_modules` of the Hugging Face model shows, whatever stands around
the model (PEFT, DDP, a multimodal model): `model.layers.12` is the output of layer 12, `transformer.h.3.mlp`
that of GPT-2's fourth MLP. `model.layers.N` is understood for every family, so that one word names the same
place in a text-only and in a multimodal checkpoint. `model.layers.3.self_attn.o_proj:input` is what the attention
heads of layer 3 give, `model.layers.3.mlp:input` what its MLP reads. `hidden_states[-1]` of transformers is no
hookpoint: it stands after the final norm, where no residual SAE was trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from fpo.errors import ModelError
from fpo.nearest import nearest_few
from fpo.scoring.hook_names import INPUT

# Groups: the layer, and what is meant inside it.
_LAYER_PATH = re.compile(r"^(?:[\w.]+\.)?(?:layers|h|(?<=\.)blocks)\.(\d+)((?:\.[\w.]+)?(?::input)?)$")

# What a layer of each family contains, for check_hookpoint: (path of the layers, direct children of a layer).
_LLAMA_CHILDREN = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_GEMMA_CHILDREN = (*_LLAMA_CHILDREN, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), ("model.layers", _LLAMA_CHILDREN)),
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3"), ("model.layers", _GEMMA_CHILDREN)),
    "gpt2": ("transformer.h", ("ln_1", "attn", "ln_2", "mlp")),
    "gpt_neox": (
        "gpt_neox.layers",
        (
            "attention",
            "mlp",
            "input_layernorm",
            "post_attention_layernorm",
            "post_attention_dropout",
            "post_mlp_dropout",
        ),
    ),
}
# Where the families keep their layers; a vision tower has layers, too, and those are other places.
_LAYERS_PATHS = frozenset(("model.layers", "model.language_model.layers", "model.decoder.layers")) | {
    path for path, _ in _FAMILIES.values()
}


def resolve_hookpoint(model: nn.Module, name: str) -> nn.Module:
    """
    The module whose output (or input) `name` means in `model`, looking through DDP and PEFT wrappers.

    Raises ModelError where there is none, with the nearest names and the range of layers.
    """
    base = unwrapped(model)
    layers_path, layers = _decoder_layers(base)
    name = name.removesuffix(INPUT)
    alias = re.fullmatch(r"model\.layers\.(\d+(?:\.[\w.]+)?)", name)
    for path in (name, f"{layers_path}.{alias[1]}" if alias else ""):
        with suppress(AttributeError):
            if path:
                return base.get_submodule(path)
    names = [path for path, _ in base.named_modules()]
    raise ModelError(_no_such_hookpoint(name, names, layers_path, len(layers)))


@contextmanager
def capture(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """
    While open, every forward of `model` puts the output (or input) of each named module into the yielded dict, with
    its gradient history and in the model's own shape and dtype; of a tuple output, the first element.

    A later forward overwrites: reentrant checkpointing runs the hook again in backward. Raises ModelError for
    an unknown name, before any hook is registered.
    """
    modules = {name: resolve_hookpoint(model, name) for name in names}
    outputs: dict[str, Tensor] = {}

    def store_output(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple | list) else output

        return hook

    def store_input(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            outputs[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    with ExitStack() as hooks:
        for name, module in modules.items():
            if name.endswith(INPUT):
                handle = module.register_forward_pre_hook(store_input(name), with_kwargs=True)
            else:
                handle = module.register_forward_hook(store_output(name))
            hooks.callback(handle.remove)
        yield outputs


def hookpoint_names(model: nn.Module) -> list[str]:
    """The outputs of all decoder layers, first to last, by the paths of the model itself."""
    path, layers = _decoder_layers(unwrapped(model))
    return [f"{path}.{index}" for index in range(len(layers))]


def final_norm_name(model: nn.Module) -> str | None:
    """The norm after the last layer (where `hidden_states[-1]` is taken), or None where there is none."""
    base = unwrapped(model)
    path, _ = _decoder_layers(base)
    parent = path.rpartition(".")[0]
    decoder = base.get_submodule(parent)
    for child in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
        if isinstance(getattr(decoder, child, None), nn.Module):
            return f"{parent}.{child}" if parent else child
    return None


def same_hookpoint(one: str, other: str) -> bool:
    """Whether two names mean one place: equal, or the same layer and submodule under another prefix."""
    return _without_prefix(one) == _without_prefix(other)


def canonical_hookpoint(name: str) -> str:
    """One name for one place: `transformer.h.3.mlp` is `model.layers.3.mlp`; a path outside the decoder stays."""
    match = _LAYER_PATH.match(name)
    is_alias = match is not None and name[: match.start(1) - 1] in _LAYERS_PATHS
    return f"model.layers.{_without_prefix(name)}" if is_alias else name


def check_hookpoint(config: Mapping[str, Any], name: str) -> None:
    """
    Check a hookpoint against a model's config.json, before any weights load.

    Raises ModelError where the layer or the submodule cannot exist. Returns where the name fits and also
    where the config cannot tell: an unknown family, or a path outside the layers.
    """
    text = config.get("text_config") or config
    count = next((text[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if k in text), None)
    layers_path, children = _FAMILIES.get(config.get("model_type", ""), (None, ()))
    match = _LAYER_PATH.match(name)
    if match is None:
        _check_outside_layers(name, config, layers_path, count)
        return
    prefix, index, inside = name[: match.start(1) - 1], int(match[1]), match[2]
    if count is not None and index >= count:
        raise ModelError(f"no hookpoint {name}: this model has {count} layers, {prefix}.0 to {prefix}.{count - 1}")
    if layers_path is None:
        return
    if prefix not in (layers_path, "model.layers", "model.language_model.layers"):
        raise ModelError(
            f"no hookpoint {name}: the layers of a {config['model_type']} model are {layers_path}.N; "
            f"did you mean {layers_path}.{index}{inside}?"
        )
    child = inside.removesuffix(INPUT).removeprefix(".").split(".")[0]
    if child and child not in children:
        near = nearest_few(child, children)
        raise ModelError(
            f"no hookpoint {name}: a layer of a {config['model_type']} model has {', '.join(children)}"
            + (f"; did you mean {prefix}.{index}.{near[0]}?" if near else "")
        )


def _check_outside_layers(name: str, config: Mapping[str, Any], layers_path: str | None, count: int | None) -> None:
    """A path that names no layer is accepted unless it is plainly a misspelt one, or another library's name for one."""
    digits = re.search(r"\.(\d+)", name)
    if layers_path is None or digits is None:
        return
    known = f", {layers_path}.0 to {layers_path}.{count - 1}" if count else ""
    meant = _meant(name, int(digits[1]), layers_path, count)
    question = f"did you mean {meant}? This" if meant else "no module gives or reads it. This"
    raise ModelError(f"no hookpoint {name}: {question} model has {count} layers{known}")


def hookpoint_width(config: Mapping[str, Any], name: str) -> int | None:
    """Numbers per token that a hookpoint gives by a model's config.json; None where it cannot tell."""
    text = config.get("text_config") or config
    hidden = next((text[k] for k in ("hidden_size", "n_embd") if k in text), None)
    match = _LAYER_PATH.match(name)
    if match is None or hidden is None:
        return None
    depth = match[2].removesuffix(INPUT).count(".")
    if depth <= 1:  # a layer, or a child of it
        return int(hidden)
    if re.search(r"\.(o_proj|attn\.c_proj|attention\.dense):input$", match[2]):
        heads = next((text[k] for k in ("num_attention_heads", "n_head") if k in text), None)
        return None if heads is None else int(text.get("head_dim") or hidden // heads) * int(heads)
    return None


def _meant(name: str, number: int, layers_path: str, count: int | None) -> str | None:
    """The module that gives what transformers call so; None where no layer's module does."""
    if re.search(r"hidden_states\W", name):
        # hidden_states[0] is the embedding, [i] what layer i - 1 gives, the last one the same after the final norm.
        return f"{layers_path}.{number - 1}" if 0 < number <= (count or number) else None
    return None if name.startswith("blocks.") else f"{layers_path}.{number}"


def unwrapped(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside DDP (`module`), torch.compile (`_orig_mod`), PEFT (`get_base_model`)."""
    while True:
        for attribute in ("module", "_orig_mod"):
            if isinstance(inner := getattr(model, attribute, None), nn.Module):
                model = inner
                break
        else:
            break
    peft_base = getattr(model, "get_base_model", None)
    return peft_base() if callable(peft_base) else model


def _decoder_layers(base: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder's layers."""
    get_decoder = getattr(base, "get_decoder", None)
    # transformers 4.57 returns the language model itself for GPT-2 and GPT-NeoX; base_model is right there.
    decoders = (get_decoder() if callable(get_decoder) else None, getattr(base, "base_model", None), base)
    for decoder in (*decoders, *base.children()):
        for attribute in ("layers", "h", "blocks"):
            layers = getattr(decoder, attribute, None)
            if isinstance(layers, nn.ModuleList):
                return next(path for path, module in base.named_modules() if module is layers), layers
    raise ModelError(
        f"{type(base).__name__} has no list of decoder layers that hookpoints could name (looked for "
        "`layers`, `h` and `blocks` of get_decoder()): use a decoder-only language model"
    )


def _without_prefix(name: str) -> str:
    match = _LAYER_PATH.match(name)
    return f"{int(match[1])}{match[2]}" if match else name


def _no_such_hookpoint(name: str, names: list[str], layers_path: str, count: int) -> str:
    layers = f"this model has {count} layers, {layers_path}.0 to {layers_path}.{count - 1}"
    match = _LAYER_PATH.match(name)
    if match and int(match[1]) >= count:
        return f"no hookpoint {name}: {layers}"
    near = nearest_few(name, names)
    return f"no hookpoint {name}: {layers}" + (f"; nearest: {', '.join(near)}" if near else "")
