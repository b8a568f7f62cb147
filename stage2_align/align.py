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
from transformers import set_seed

from fpo.errors import FpoError, RecipeError, RunInterrupted
from fpo.interrupts import StopRequest
from fpo.progress import is_first_rank, say
from fpo.recipe import (
    MIXED_PRECISION,
    Arithmetic,
    Filter,
    Recipe,
    check_arithmetic,
    evaluates,
    reads_held_out,
    training_arithmetic,
)
from fpo.stage2_align.arguments import AlignArguments, training_arguments
from fpo.stage2_align.best import best_step
from fpo.stage2_align.callbacks import ends, read_metrics
from fpo.stage2_align.checkpoints import explained_writes
from fpo.stage2_align.cost import Cost, cost_of, count_weights, forget_peak
from fpo.stage2_align.displacement import without_worst
from fpo.stage2_align.held_out import check_held_out, held_out_stream
from fpo.stage2_align.measure import ObjectiveMeter
from fpo.stage2_align.parity import ParityCheck
from fpo.stage2_align.policy import load_policy, policy_layout, policy_tokenizer
from fpo.stage2_align.run import (
    METRICS_FILE,
    SAMPLES_FOLDER,
    OpenedRun,
    locked,
    open_run,
    read_run,
    write_run,
)
from fpo.stage2_align.samples import Samples
from fpo.stage2_align.saved import expected_weights, save_policy
from fpo.stage2_align.stream import PairStream, check_groups
from fpo.stage2_align.trainer import PairTrainer
from fpo.store import Cache


@dataclass(frozen=True)
class AlignReport:
    """What `fpo align` says when it is done."""

    run: Path
    steps: int
    pairs: int
    seconds: float
    """Of training, of the start that took the last step."""
    per_step: tuple[int, int, int]
    """Processes, pairs per forward, forwards per step."""
    layout: str | None
    """How pairs were laid out for the policy; None where nothing was trained."""
    parity: float | None
    """Mean |difference| of token log-probs to the cache before the first step; None where it was not checked."""
    first: dict[str, float]
    """The first logged metrics."""
    last: dict[str, float]
    """The last logged ones."""
    cost: Cost
    best: dict[str, Any] | None = None
    """Step, metric and value of the evaluation whose policy was saved; None where it is the last step's."""

    @property
    def rate(self) -> float:
        """Pairs per second."""
        return self.pairs / self.seconds if self.seconds else 0.0


def align(
    recipe: Recipe, cache: Cache, output: Path, resume: bool = False, held_out: Cache | None = None
) -> AlignReport:
    """
    Train the recipe's policy from a complete cache, opened with the column that the objective reads.

    output    the run folder; `resume` continues the run that stands there, if there is one
    held_out  the cache of the held-out groups, where the recipe reads them (`reads_held_out`)
    Raises RecipeError, DataError, RunError, ParityError, ModelError, CacheDamaged.
    """
    cache.keep(None)  # what a run before this one left out
    check_groups(cache, recipe.objective)
    if recipe.data.filter is not None:
        _leave_out(cache, recipe, recipe.data.filter)
    args = training_arguments(recipe, output, cache)
    assert (held_out is not None) == reads_held_out(recipe), "the held-out groups' cache, where the recipe reads it"
    first = args.process_index == 0
    with locked(output) if first else contextlib.nullcontext():
        per_step = (args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps)
        opened = _together(first, lambda: open_run(output, recipe, cache, math.prod(per_step), resume, held_out))
        if opened.finished:
            return _finished(output, per_step)
        if held_out is not None:
            check_held_out(recipe, held_out, output, read_run(output))
        return _train(recipe, cache, held_out, args, output, opened.checkpoint, per_step)


def _leave_out(cache: Cache, recipe: Recipe, wanted: Filter) -> None:
    found = without_worst(cache, recipe.objective.units, wanted)
    cache.keep(found.kept)
    if is_first_rank():
        of = cache.n_groups + found.n_dropped
        say(
            f"data.filter: {found.n_dropped:,} of {of:,} groups are left out, whose {wanted.by} is "
            f"{found.above:.4g} or more"
        )


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
    held_out: Cache | None,
    args: AlignArguments,
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
    trainer = _trainer(recipe, cache, args, output, request, held_out)
    arithmetic = _launched_arithmetic(recipe, trainer)
    layout = trainer.stream.layout = policy_layout(trainer.model, cache)
    if held_out is not None and trainer.eval_dataset is not None:
        trainer.eval_dataset.layout = policy_layout(trainer.model, held_out)
    if held_out is not None and recipe.generate is not None:
        trainer.add_callback(Samples(trainer, held_out, recipe.generate, output / SAMPLES_FOLDER))
    parity = None
    if recipe.policy.model is None and checkpoint is None:
        parity = ParityCheck(trainer, (arithmetic, recipe.reference.arithmetic))

    expected, weights = expected_weights(trainer.model), count_weights(trainer.model)
    forget_peak(args.device)
    started = time.monotonic()
    with request:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.monotonic() - started
    steps = trainer.state.global_step
    if trainer.stop.signum:
        raise RunInterrupted(f"interrupted after step {steps} of {trainer.state.max_steps}", trainer.stop.signum)
    trainer.check_finite()
    cost = cost_of(recipe, weights, trainer)
    difference = None if parity is None else parity.difference
    with explained_writes(output, "free some space, then run it again with --resume: no step is lost"):
        save_policy(trainer, output, expected)
        best = best_step(args, trainer.state)
        if trainer.is_world_process_zero():
            found = {"steps": steps, "stopped_early": steps < trainer.state.max_steps, "parity": difference}
            found |= {"seconds": seconds, "cost": cost._asdict()}
            write_run(output, {**read_run(output), "complete": True, **found, "best": best})
    logged = ends(trainer.state.log_history)
    return AlignReport(output, steps, trainer.pairs_seen, seconds, per_step, layout, difference, *logged, cost, best)


def _trainer(
    recipe: Recipe,
    cache: Cache,
    args: AlignArguments,
    output: Path,
    request: StopRequest,
    held_out: Cache | None = None,
) -> PairTrainer:
    """Everything loaded. Raises RecipeError for arguments that transformers or a missing package refuses."""
    set_seed(args.seed)
    meter = ObjectiveMeter.of(recipe)
    model = load_policy(recipe, meter, output, save=args.process_index == 0)
    stream = PairStream(
        cache,
        seed=args.seed,
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        rank=args.process_index,
        world=args.world_size,
        objective=recipe.objective,
    )
    evaluated = None
    if held_out is not None and evaluates(recipe):
        evaluated = held_out_stream(recipe, held_out, args.process_index, args.world_size)
    tokenizer = policy_tokenizer(recipe)
    try:
        return PairTrainer(model, args, stream, meter, tokenizer, output / METRICS_FILE, request, evaluated)
    except (ValueError, ImportError, RuntimeError) as error:
        raise RecipeError(f"training: {str(error).strip().splitlines()[0]}") from None
    except Exception as error:
        if not args.push_to_hub:  # which makes its repository first, by whatever client the hub's library has
            raise
        raise RecipeError(f"training.push_to_hub: {str(error).strip().splitlines()[0]}") from None


def _launched_arithmetic(recipe: Recipe, trainer: PairTrainer) -> Arithmetic:
    """
    What the policy computes in as it was started: the launcher has a say in mixed precision and sharding. Raises
    RecipeError where that is not the recipe's, or not the reference's.
    """
    launched = trainer.accelerator.mixed_precision
    asked = next((name for name in MIXED_PRECISION if recipe.training.get(name)), "no")
    if launched != asked:
        raise RecipeError(
            f"training: this start runs in mixed precision {launched}, the recipe says {asked}; set training.bf16 or "
            "training.fp16 there, or leave it out of the launcher's settings"
        )
    if recipe.training.get("fsdp") and not trainer.is_fsdp_enabled:
        raise RecipeError(
            "training.fsdp: this start would shard nothing: accelerate turns FSDP on between GPUs alone; leave it out, "
            "or start with torchrun on GPUs and without use_cpu"
        )
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded and recipe.generate is not None:
        raise RecipeError("generate: started so, no process holds the whole policy; leave it out")
    if sharded and recipe.policy.prompt is not None:
        raise RecipeError("policy.prompt: PEFT saves no soft prompt that is sharded; start without FSDP and DeepSpeed")
    arithmetic = training_arithmetic(recipe.policy.dtype, MIXED_PRECISION.get(asked), sharded)
    try:
        check_arithmetic(recipe, arithmetic)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return arithmetic


def _finished(output: Path, per_step: tuple[int, int, int]) -> AlignReport:
    """The report of a run that was complete already."""
    facts, logged = read_run(output), ends(read_metrics(output / METRICS_FILE))
    seconds, cost = facts["seconds"], Cost(**facts["cost"])
    return AlignReport(
        output, facts["steps"], 0, seconds, per_step, None, facts["parity"], *logged, cost, facts["best"]
    )
