"""
The policy: the weights that training starts from, scoring installed in them, and what is trained on top of them - as it
is before training, and as a run saved it.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from fpo.errors import ModelError, RecipeError, RunError
from fpo.recipe import Recipe
from fpo.scoring import (
    Layout,
    adapter_folder,
    choose_layout,
    extremes,
    install_scoring,
    is_quantised,
    load_model,
    load_tokenizer,
    model_folder,
    silence_dropout,
    unwrapped,
)
from fpo.stage2_align.adapters import (
    check_room,
    has_prompt,
    opened_adapter,
    own_logits,
    with_lora,
    with_prompt,
)
from fpo.stage2_align.measure import ObjectiveMeter
from fpo.stage2_align.run import BASE_FOLDER
from fpo.store import Cache, Groups


def load_policy(recipe: Recipe, meter: ObjectiveMeter, run: Path, save: bool = True) -> PreTrainedModel:
    """
    The policy before training: loaded, scoring installed, adapters around it if asked for.

    run   where it will be saved
    save  whether this process writes there what a new adapter stands on, where no name says what that is
    """
    policy, reference = recipe.policy, recipe.reference
    name, folder = _start(recipe)
    # The reference's adapter belongs to the weights that training starts from.
    adapters = [adapter_folder(reference.adapter)] if reference.adapter and policy.model is None else []
    model = load_model(folder, policy.dtype, adapters)
    if is_quantised(model) and not policy.frozen:
        raise RecipeError(
            f"policy.lora: {name} is quantised, and quantised weights cannot be trained; set policy.lora, or name a "
            "policy.model that is not quantised"
        )
    if policy.model is not None:
        _check_vocabulary(recipe, policy.model)
    _scored(model, meter, routers=True)
    if not policy.frozen:
        return model
    if adapters:
        base, commit = str((run / BASE_FOLDER).resolve()), None
        if save:
            _save_base(model, policy_tokenizer(recipe), run)
    elif Path(name).is_dir():
        base, commit = str(folder.resolve()), None
    else:
        base, commit = name, folder.name
    if policy.lora is not None:
        return with_lora(model, policy.lora, base, commit)
    assert policy.prompt is not None
    return with_prompt(model, policy.prompt, policy_tokenizer(recipe), base, commit)


def policy_model(recipe: Recipe, meter: ObjectiveMeter, run: Path) -> PreTrainedModel:
    """
    The policy as a run folder or one of its checkpoints holds it, with scoring installed, in the
    arithmetic of training: whole weights, or an adapter on the weights that it was trained on. Never merged: weights
    in bfloat16 would round the adapter away.
    """
    dtype = recipe.policy_arithmetic().dtype
    if not (run / "adapter_config.json").is_file():
        return _scored(load_model(model_folder(str(run)), dtype), meter)
    model = opened_adapter(_scored(load_model(adapter_base(recipe, run), dtype), meter), run)
    silence_dropout(model)  # the adapter's own: the layout is chosen by forwards in training mode too
    return model


def adapter_base(recipe: Recipe, run: Path) -> Path:
    """The folder of the weights that the adapter in a run or one of its checkpoints was trained on."""
    if not recipe.reference.adapter or recipe.policy.model is not None:
        return _start(recipe)[1]
    base = (run.parent if run.name.startswith("checkpoint-") else run) / BASE_FOLDER
    if not (base / "config.json").is_file():
        raise RunError(f"{run}: its adapter was trained on the weights in {base}, which are not there")
    return base


def _start(recipe: Recipe) -> tuple[str, Path]:
    """Name and folder of the model that training starts from."""
    policy, reference = recipe.policy, recipe.reference
    field, start = ("policy", policy) if policy.model else ("reference", reference)
    name = policy.model or reference.model
    try:
        return name, model_folder(name, start.revision)
    except ModelError as error:
        raise ModelError(f"{field}.model: {error}") from None


def _save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Path) -> None:
    """Write the weights that a run's adapter is trained on, whole or not at all."""
    temporary = run / f"{BASE_FOLDER}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(run / BASE_FOLDER, ignore_errors=True)
    temporary.rename(run / BASE_FOLDER)


def _scored(model: PreTrainedModel, meter: ObjectiveMeter, *, routers: bool = False) -> PreTrainedModel:
    install_scoring(model, tuple(hookpoint.name for hookpoint in meter.hookpoints), routers=routers)
    return model


def policy_layout(model: Any, cache: Cache) -> Layout:
    """
    The layout in which a policy on its device is measured rightly, by the longest and shortest pairs of two shards: the
    first, which is a random part of the data, and the one with the longest pairs on average. Raises ModelError.
    """
    entries = cache.manifest.shards
    # A filter may leave nothing of a shard.
    read = [sid for sid, n_groups in enumerate(cache.shard_groups) if n_groups]
    longest = max(read, key=lambda sid: entries[sid].n_tokens / entries[sid].n_groups)
    few = [
        pairs.take(extremes(pairs.splits, pairs.n_completions))
        for pairs in map(cache.shard, sorted({read[0], longest}))
    ]
    pairs = Groups.concat(few)
    pairs = pairs.take(extremes(pairs.splits, pairs.n_completions))
    prompts, completions = pairs.lengths
    check_room(model, int((np.repeat(prompts, pairs.n_completions) + completions).max()))
    asked, own = (model, own_logits(model)) if has_prompt(model) else (unwrapped(model), None)
    device = next(model.parameters()).device
    # A look draws nothing that training would have drawn: a new adapter drops inputs in training mode.
    with _whole(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        return choose_layout(asked, pairs.input_ids, pairs.splits, pairs.n_completions, own)


def _whole(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Where a model that is not in training yet can compute: DeepSpeed's ZeRO-3 cuts its parameters up as they load."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    deepspeed: Any = importlib.import_module("deepspeed")
    gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(model.parameters()))
    return gathered


def policy_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the pairs; it is saved beside the policy."""
    reference, data = recipe.reference, recipe.data
    name, revision = (data.tokenizer, None) if data.tokenizer else (reference.model, reference.revision)
    return load_tokenizer(name, revision, data.chat_template)


def _check_vocabulary(recipe: Recipe, name: str) -> None:
    """RecipeError where a policy of its own reads other tokens into the pairs' ids."""
    ours = policy_tokenizer(recipe).get_vocab()
    theirs = load_tokenizer(name, recipe.policy.revision).get_vocab()
    wrong = next((token for token, number in ours.items() if theirs.get(token) != number), None)
    if wrong is not None:
        raise RecipeError(
            f"policy.model: {name} has another vocabulary than the cached pairs: token {wrong!r} is {ours[wrong]} in "
            f"the pairs, {theirs.get(wrong)} there"
        )
