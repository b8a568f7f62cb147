"""
What PEFT trains beside frozen weights: low-rank adapters, which stand in the modules, and soft prompts, which stand
before the tokens.

PEFT holds, saves and loads a soft prompt; its forward could not serve packed rows, whose masks and positions are not
those of one sequence. So the scoring forward reads the prompt itself, once per row (see `scoring.virtual`).
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fpo.errors import ModelError, RecipeError
from fpo.nearest import nearest
from fpo.recipe import Lora, Prompt
from fpo.scoring import OwnLogits, Scores, logits_at, ordinary_forward, positions, tower_modules, unwrapped


def with_lora(model: PreTrainedModel, lora: Lora, base: str, revision: str | None) -> Any:
    """
    Low-rank adapters in the model.

    base, revision  what adapter_config.json names as the weights below: a folder, or a hub id and its commit
    """
    peft = _peft("policy.lora")
    _check_saved_modules(model, lora.modules_to_save)
    try:
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.alpha,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            # In the adapter's branch alone, which is zero until the first step: the policy is the reference still.
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            modules_to_save=lora.modules_to_save or None,
            exclude_modules=tower_modules(model) or None,
        )
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"policy.lora.target_modules: {str(error).strip().splitlines()[0]}") from None
    config.base_model_name_or_path, config.revision = base, revision
    return adapted


def _check_saved_modules(model: PreTrainedModel, names: list[str]) -> None:
    """RecipeError for a name that no module ends in, or whose module shares a weight, which PEFT would part in two."""
    paths = [path for path, _ in model.named_modules()]
    for name in names:
        saved = [path for path in paths if path.endswith(name)]
        if not saved:
            near = nearest(name, {path.rpartition(".")[2] for path in paths})
            hint = f"; nearest is {near}" if near else ""
            raise RecipeError(f"policy.lora.modules_to_save: no module is called {name}{hint}")
        inside = {id(weight) for path in saved for weight in model.get_submodule(path).parameters()}
        for owner, weight in model.named_parameters(remove_duplicate=False):
            if id(weight) in inside and not any(owner.startswith(f"{path}.") for path in saved):
                other = owner.rpartition(".")[0]
                raise RecipeError(f"policy.lora.modules_to_save: {name} shares its weights with {other}; leave it out")


def with_prompt(
    model: PreTrainedModel, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, base: str, revision: str | None
) -> Any:
    """
    A soft prompt before the model, which begins as real tokens before it would: as their embeddings, or as the keys
    and values that the model itself makes of them. So both kinds begin as the same policy. A prefix of zeros would stay
    one token: what is alike has like gradients.

    model           with scoring installed
    base, revision  as in `with_lora`
    """
    peft = _peft("policy.prompt")
    kind = {"embeddings": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[prompt.kind]
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=prompt.virtual_tokens)
    ids = _first_tokens(prompt, tokenizer, model.config.get_text_config().vocab_size)
    try:
        prompted = peft.get_peft_model(model, config)
        begun = _embeddings(model, ids) if prompt.kind == "embeddings" else _keys_and_values(model, ids)
        weight = prompted.prompt_encoder["default"].embedding.weight
        weight.data.view(begun.shape).copy_(begun)  # in the shape that PEFT has for it, or not at all
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise RecipeError(f"policy.prompt.kind: {model.config.model_type} takes no {prompt.kind} ({reason})") from None
    config.base_model_name_or_path, config.revision = base, revision
    return _reading_prompt(prompted)


def _first_tokens(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """(n,) the tokens that a soft prompt begins as."""
    n = prompt.virtual_tokens
    if prompt.text is None:
        return torch.randint(vocabulary, (n,))
    said: list[int] = tokenizer(prompt.text)["input_ids"]
    if not said:
        raise RecipeError("policy.prompt.text: it has no token; give a text, or null")
    return torch.tensor((said * -(-n // len(said)))[:n])


@torch.no_grad()
def _embeddings(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(n, D) what the first layer would read of these tokens."""
    embedded: Tensor = model.get_input_embeddings()(ids)
    return embedded.float()


@torch.no_grad()
def _keys_and_values(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(n, 2 * layers * heads * head size) every layer's keys and values of these tokens, as PEFT lays them out."""
    cache = type(model).forward(model, input_ids=ids[None], use_cache=True).past_key_values
    layers = torch.stack([side[0] for layer in cache.layers for side in (layer.keys, layer.values)])
    return layers.permute(2, 0, 1, 3).flatten(1).float()


def opened_adapter(model: PreTrainedModel, folder: Path) -> Any:
    """The adapter or soft prompt in a run or one of its checkpoints, around the weights below it."""
    opened = plain_adapter(model, folder)
    return _reading_prompt(opened) if has_prompt(opened) else opened


def plain_adapter(model: PreTrainedModel, folder: Path) -> Any:
    """The same as PEFT opens it."""
    return _peft("policy").PeftModel.from_pretrained(model, folder)


def has_prompt(model: nn.Module) -> bool:
    """Whether a soft prompt is trained with this model."""
    return hasattr(model, "prompt_encoder")


def n_virtual(model: Any) -> int:
    """Virtual tokens before every sequence; 0 without a soft prompt."""
    return int(model.active_peft_config.num_virtual_tokens) if has_prompt(model) else 0


@contextlib.contextmanager
def without_prompt(model: Any) -> Iterator[None]:
    """Inside, a soft prompt is not read, in the arithmetic that training wraps the model in."""
    model.reads_prompt = False
    try:
        yield
    finally:
        model.reads_prompt = True


def own_logits(model: Any) -> OwnLogits:
    """A sequence behind the soft prompt, by PEFT's own forward: what the scores of packed rows are held against."""
    base = unwrapped(model)
    columns = n_virtual(model) if model.active_peft_config.peft_type == "PROMPT_TUNING" else 0

    def logits(sequence: Tensor, at: Tensor) -> Tensor:
        with ordinary_forward(base):
            return logits_at(functools.partial(type(model).forward, model), type(base), sequence, at + columns)

    return logits


def check_room(model: Any, longest: int) -> None:
    """RecipeError where a soft prompt and a sequence of `longest` tokens are more than the model has positions."""
    n, room = n_virtual(model), positions(model.config)
    if n and room is not None and longest + n > room:
        raise RecipeError(
            f"policy.prompt.virtual_tokens: {n} before a sequence of {longest} tokens are more than the model's {room} "
            f"positions; lower it to {room - longest}, or data.max_length"
        )


def _reading_prompt(prompted: Any) -> Any:
    """The PEFT model with a forward that scores packed rows behind its prompt."""

    def forward(self: Any, **batch: Any) -> Scores:
        prompt = self.get_prompt(len(batch["input_ids"])) if self.reads_prompt else None
        scores: Scores = self.base_model(prompt=prompt, **batch)
        return scores

    prompted.reads_prompt = True
    prompted.forward = types.MethodType(forward, prompted)
    return prompted


def _peft(field: str) -> Any:
    try:
        import peft
    except ImportError:
        raise ModelError(f"{field}: adapters need peft: pip install 'fpo[lora]'") from None
    return peft
