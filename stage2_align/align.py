"""`fpo align`: a recipe and its cache to a trained policy in a run folder."""

from __future__ import annotations

import contextlib
import importlib
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from fpo.errors import FpoError, ModelError, RecipeError, RunError, RunInterrupted
from fpo.interrupts import StopRequest
from fpo.nearest import nearest
from fpo.progress import say
from fpo.recipe import (
    MIXED_PRECISION,
    Arithmetic,
    Lora,
    Recipe,
    check_arithmetic,
    evaluates,
    reads_held_out,
    training_arithmetic,
)
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
    tower_modules,
)
from fpo.stage2_align.arguments import AlignArguments, training_arguments
from fpo.stage2_align.best import best_step
from fpo.stage2_align.callbacks import ends, read_metrics
from fpo.stage2_align.checkpoints import explained_writes
from fpo.stage2_align.cost import Cost, cost_of, count_weights, forget_peak
from fpo.stage2_align.held_out import check_held_out, held_out_stream
from fpo.stage2_align.measure import ObjectiveMeter
from fpo.stage2_align.parity import ParityCheck
from fpo.stage2_align.run import (
    BASE_FOLDER,
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
from fpo.store import Cache, Groups


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
    check_groups(cache, recipe.objective)
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
    if is_quantised(model) and policy.lora is None:
        raise RecipeError(
            f"policy.lora: {name} is quantised, and quantised weights cannot be trained; set policy.lora, or name a "
            "policy.model that is not quantised"
        )
    if policy.model is not None:
        _check_vocabulary(recipe, policy.model)
    if policy.lora is None:
        return _scored(model, meter, routers=True)
    if adapters:
        base, commit = str((run / BASE_FOLDER).resolve()), None
        if save:
            _save_base(model, policy_tokenizer(recipe), run)
    elif Path(name).is_dir():
        base, commit = str(folder.resolve()), None
    else:
        base, commit = name, folder.name
    return _with_adapter(_scored(model, meter, routers=True), policy.lora, base, commit)


def policy_model(recipe: Recipe, meter: ObjectiveMeter, run: Path) -> PreTrainedModel:
    """
    The policy as a run folder or one of its checkpoints holds it, with scoring installed, in the
    arithmetic of training: whole weights, or an adapter on the weights that it was trained on. Never merged: weights
    in bfloat16 would round the adapter away.
    """
    dtype = recipe.policy_arithmetic().dtype
    if not (run / "adapter_config.json").is_file():
        return _scored(load_model(model_folder(str(run)), dtype), meter)
    model: Any = adapter_model(_scored(load_model(adapter_base(recipe, run), dtype), meter), run)
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


def adapter_model(base: PreTrainedModel, run: Path) -> Any:
    """The adapter in a run or one of its checkpoints around the weights below it."""
    return _peft().PeftModel.from_pretrained(base, run)


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
    hookpoints = tuple(hookpoint.name for hookpoint in meter.hookpoints)
    install_scoring(model, hookpoints, routers=routers, squares=meter.objective.needs.typicality)
    return model


def policy_layout(model: nn.Module, cache: Cache) -> Layout:
    """
    The layout in which a policy on its device is measured rightly, by the longest and shortest pairs of two shards: the
    first, which is a random part of the data, and the one with the longest pairs on average. Raises ModelError.
    """
    entries = cache.manifest.shards
    longest = max(range(len(entries)), key=lambda sid: entries[sid].n_tokens / max(entries[sid].n_groups, 1))
    few = [pairs.take(extremes(pairs.splits, pairs.n_completions)) for pairs in map(cache.shard, sorted({0, longest}))]
    pairs = Groups.concat(few)
    pairs = pairs.take(extremes(pairs.splits, pairs.n_completions))
    peft_base: Any = getattr(model, "get_base_model", None)
    device = next(model.parameters()).device
    # A look draws nothing that training would have drawn: a new adapter drops inputs in training mode.
    with _whole(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        return choose_layout(
            model if peft_base is None else peft_base(), pairs.input_ids, pairs.splits, pairs.n_completions
        )


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


def _with_adapter(model: PreTrainedModel, lora: Lora, base: str, revision: str | None) -> Any:
    """
    Adapters around the model.

    base, revision  what adapter_config.json names as the weights below: a folder, or a hub id and its commit
    """
    peft = _peft()
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


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ModelError("policy.lora: adapters need peft: pip install 'fpo[lora]'") from None
    return peft
