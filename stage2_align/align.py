"""`fpo align`: a recipe and its cache to a trained policy in a run folder."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from errors import ModelError, RecipeError
from recipe import Lora, Recipe
from scoring import (
    Layout,
    adapter_folder,
    choose_layout,
    extremes,
    install_scoring,
    load_model,
    load_tokenizer,
    model_folder,
)
from stage2_align.measure import ObjectiveMeter
from stage2_align.parity import check_parity
from stage2_align.run import METRICS_FILE, last_checkpoint, open_run, read_run, write_run
from stage2_align.stream import PairStream
from stage2_align.trainer import PairTrainer, read_metrics
from store import Cache, Pairs

# Where TrainingArguments' own default would surprise; as in TRL's DPOConfig.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "logging_steps": 10,
    "report_to": "none",
    "ddp_find_unused_parameters": False,
}


@dataclass(frozen=True)
class AlignReport:
    """What `fpo align` says when it is done."""

    run: Path
    steps: int
    pairs: int
    seconds: float
    layout: str | None
    """How pairs were laid out for the policy; None where nothing was trained."""
    parity: float | None
    """Mean |difference| of token log-probs to the cache before the first step; None where it was not checked."""
    last: dict[str, float]
    """The last logged metrics."""


def align(recipe: Recipe, cache: Cache, output: Path, resume: bool = False) -> AlignReport:
    """
    Train the recipe's policy from a complete cache.

    output  the run folder; `resume` continues the run that stands there, if there is one
    Raises RecipeError, RunError, ParityError, ModelError, CacheDamaged.
    """
    args = training_arguments(recipe, output)
    pairs_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    with args.main_process_first(local=False, desc="run folder"):
        if args.process_index == 0:
            checkpoint = open_run(output, recipe, cache, pairs_per_step, resume)
        else:
            checkpoint = last_checkpoint(output) if resume else None
    if resume and read_run(output)["complete"]:
        return _finished(output)
    trainer = _trainer(recipe, cache, args, output)
    layout = trainer.stream.layout = policy_layout(trainer.model, cache)
    parity = None
    if recipe.policy.model is None and checkpoint is None:
        parity = check_parity(trainer.model, trainer.meter, cache, recipe, layout)

    started = time.monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.monotonic() - started
    trainer.save_model(str(output))
    steps = trainer.state.global_step
    last: dict[str, float] = next((row for row in reversed(trainer.state.log_history) if "rewards/margins" in row), {})
    if trainer.is_world_process_zero():
        write_run(output, {**read_run(output), "complete": True, "steps": steps, "parity": parity})
    return AlignReport(output, steps, trainer.pairs_seen * args.world_size, seconds, layout, parity, last)


def _trainer(recipe: Recipe, cache: Cache, args: TrainingArguments, output: Path) -> PairTrainer:
    """Everything loaded. Raises RecipeError for arguments that transformers or a missing package refuses."""
    set_seed(args.seed)
    meter = ObjectiveMeter.of(recipe)
    model = load_policy(recipe, meter)
    stream = PairStream(
        cache,
        meter.feature,
        seed=args.seed,
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        rank=args.process_index,
        world=args.world_size,
    )
    try:
        return PairTrainer(model, args, stream, meter, policy_tokenizer(recipe), output / METRICS_FILE)
    except (ValueError, ImportError, RuntimeError) as error:
        raise RecipeError(f"training: {str(error).strip().splitlines()[0]}") from None


def _finished(output: Path) -> AlignReport:
    """The report of a run that was complete already."""
    facts, metrics = read_run(output), read_metrics(output / METRICS_FILE)
    return AlignReport(output, facts["steps"], 0, 0.0, None, facts["parity"], metrics[-1] if metrics else {})


def training_arguments(recipe: Recipe, output: Path) -> TrainingArguments:
    """TrainingArguments of a recipe. Raises RecipeError for values that transformers refuses."""
    try:
        args = TrainingArguments(output_dir=str(output), **{**DEFAULTS, **recipe.training}, disable_tqdm=True)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"training: {str(error).strip().splitlines()[0]}") from None
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != world:
        raise RecipeError(
            f"training: started as {world} processes, transformers sees {args.world_size}; "
            "on CPUs set training.use_cpu: true"
        )
    # Several GPUs in one process would be DataParallel, which cannot split packed rows: use torchrun.
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


def load_policy(recipe: Recipe, meter: ObjectiveMeter) -> PreTrainedModel:
    """The policy before training: loaded, scoring installed, adapters around it if asked for."""
    model = policy_model(recipe, meter)
    if recipe.policy.model is not None:
        _check_vocabulary(recipe, recipe.policy.model)
    return model if recipe.policy.lora is None else _with_adapter(model, recipe.policy.lora)


def policy_model(recipe: Recipe, meter: ObjectiveMeter, run: Path | None = None) -> PreTrainedModel:
    """
    The policy with scoring installed: as training starts from it, or as a `run` saved it - whole
    weights, or an adapter on the weights that it was trained on.
    """
    policy, reference = recipe.policy, recipe.reference
    adapted = run is None or (run / "adapter_config.json").is_file()
    if run is not None and not adapted:
        model = load_model(model_folder(str(run)), policy.dtype)
    else:
        name, revision = (policy.model, policy.revision) if policy.model else (reference.model, reference.revision)
        # The reference's adapter belongs to the weights that training starts from.
        adapters = [adapter_folder(reference.adapter)] if reference.adapter and policy.model is None else []
        adapters += [run] if run is not None else []
        model = load_model(model_folder(name, revision), policy.dtype, adapters)
    install_scoring(model, () if meter.hookpoint is None else (meter.hookpoint,))
    return model


def policy_layout(model: nn.Module, cache: Cache) -> Layout:
    """
    The layout in which a policy on its device is measured rightly, by the longest and shortest pairs of two shards: the
    first, which is a random part of the data, and the one with the longest pairs on average. Raises ModelError.
    """
    entries = cache.manifest.shards
    longest = max(range(len(entries)), key=lambda sid: entries[sid].n_tokens / max(entries[sid].n_pairs, 1))
    few = [pairs.take(extremes(pairs.lengths)) for pairs in map(cache.shard, sorted({0, longest}))]
    pairs = Pairs.concat(few)
    pairs = pairs.take(extremes(pairs.lengths))
    peft_base: Any = getattr(model, "get_base_model", None)
    return choose_layout(model if peft_base is None else peft_base(), pairs.input_ids, pairs.splits)


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


def _with_adapter(model: PreTrainedModel, lora: Lora) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ModelError("policy.lora: adapters need peft: pip install 'fpo[lora]'") from None
    targets = lora.target_modules
    try:
        config = LoraConfig(
            task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets
        )
        return get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"policy.lora.target_modules: {str(error).strip().splitlines()[0]}") from None
