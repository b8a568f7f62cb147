"""`fpo align`: a recipe and its cache to a trained policy in a run folder."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from errors import FpoError, ModelError, RecipeError, RunInterrupted
from interrupts import StopRequest
from progress import say
from recipe import Lora, Recipe
from scoring import adapter_folder, check_packing, install_scoring, load_model, load_tokenizer, model_folder
from stage2_align.arguments import training_arguments
from stage2_align.callbacks import read_metrics
from stage2_align.checkpoints import explained_writes
from stage2_align.measure import ObjectiveMeter
from stage2_align.parity import check_parity
from stage2_align.run import METRICS_FILE, OpenedRun, locked, open_run, read_run, write_run
from stage2_align.stream import PairStream
from stage2_align.trainer import PairTrainer
from store import Cache


@dataclass(frozen=True)
class AlignReport:
    """What `fpo align` says when it is done."""

    run: Path
    steps: int
    pairs: int
    seconds: float
    per_step: tuple[int, int, int]
    """Processes, pairs per forward, forwards per step."""
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
    args = training_arguments(recipe, output, cache)
    first = args.process_index == 0
    with locked(output) if first else contextlib.nullcontext():
        per_step = (args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps)
        opened = _together(first, lambda: open_run(output, recipe, cache, math.prod(per_step), resume))
        if opened.finished:
            return _finished(output, per_step)
        return _train(recipe, cache, args, output, opened.checkpoint, per_step)


def _together(first: bool, opening: Callable[[], OpenedRun]) -> OpenedRun:
    """The first process opens the run, and all go the same way. Its error is the job's, and told once."""
    answer: list[OpenedRun | FpoError | None] = [None]
    if first:
        try:
            answer = [opening()]
        except FpoError as error:
            answer = [error]
    opened = broadcast_object_list(answer)[0]
    if isinstance(opened, OpenedRun):
        return opened
    if not first:
        raise SystemExit(1)
    raise opened


def _train(
    recipe: Recipe,
    cache: Cache,
    args: TrainingArguments,
    output: Path,
    checkpoint: Path | None,
    per_step: tuple[int, int, int],
) -> AlignReport:
    """
    Train, from `checkpoint` or from the beginning, and save the policy. Raises RunInterrupted after a signal, when a
    checkpoint has been saved.
    """
    if args.process_index == 0:
        say("loading the policy ...")
    request = StopRequest()
    trainer = _trainer(recipe, cache, args, output, request)
    parity = None
    if recipe.policy.model is None and checkpoint is None:
        parity = check_parity(trainer.model, trainer.meter, cache, recipe)

    started = time.monotonic()
    with request:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.monotonic() - started
    steps = trainer.state.global_step
    if trainer.stop.signum:
        raise RunInterrupted(f"interrupted after step {steps} of {trainer.state.max_steps}", trainer.stop.signum)
    trainer.check_finite()
    with explained_writes(output, "free some space, then run it again with --resume: no step is lost"):
        trainer.save_model(str(output))
        last: dict[str, float] = next(
            (row for row in reversed(trainer.state.log_history) if "rewards/margins" in row), {}
        )
        if trainer.is_world_process_zero():
            write_run(output, {**read_run(output), "complete": True, "steps": steps, "parity": parity})
    pairs = trainer.pairs_seen * args.world_size
    return AlignReport(output, steps, pairs, seconds, per_step, parity, last)


def _trainer(recipe: Recipe, cache: Cache, args: TrainingArguments, output: Path, request: StopRequest) -> PairTrainer:
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
        return PairTrainer(model, args, stream, meter, policy_tokenizer(recipe), output / METRICS_FILE, request)
    except (ValueError, ImportError, RuntimeError) as error:
        raise RecipeError(f"training: {str(error).strip().splitlines()[0]}") from None
    except Exception as error:
        if not args.push_to_hub:  # which makes its repository first, by whatever client the hub's library has
            raise
        raise RecipeError(f"training.push_to_hub: {str(error).strip().splitlines()[0]}") from None


def _finished(output: Path, per_step: tuple[int, int, int]) -> AlignReport:
    """The report of a run that was complete already."""
    facts, metrics = read_run(output), read_metrics(output / METRICS_FILE)
    return AlignReport(output, facts["steps"], 0, 0.0, per_step, facts["parity"], metrics[-1] if metrics else {})


def load_policy(recipe: Recipe, meter: ObjectiveMeter) -> PreTrainedModel:
    """The policy before training: loaded, scoring installed and checked, adapters around it if asked for."""
    model = policy_model(recipe, meter)
    if recipe.policy.model is not None:
        _check_vocabulary(recipe, recipe.policy.model)
    return model if recipe.policy.lora is None else _with_adapter(model, recipe.policy.lora)


def policy_model(recipe: Recipe, meter: ObjectiveMeter, run: Path | None = None) -> PreTrainedModel:
    """
    The policy with scoring installed and checked: as training starts from it, or as a `run` saved it - whole
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
    check_packing(model)
    return model


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
