"""TrainingArguments of a recipe, and which of them a resumed run may change."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from fpo.errors import RecipeError
from fpo.recipe import PUBLISHING_ARGUMENTS, Recipe, goes_by_evaluations
from fpo.stage2_align.best import check_best
from fpo.store import Cache

# Where TrainingArguments' own default would surprise; as in TRL's DPOConfig.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "logging_steps": 10,
    "report_to": "none",
    "ddp_find_unused_parameters": False,
}

# transformers' old names, which it warns of in every process.
_NEW_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

# What an optimizer that heeds these arguments is made with.
_OPTIMIZER_SETTINGS = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}

# What moves no weight: a resumed run may change it. All else is held, an argument of a later transformers too. How
# the pairs of a step are made up is free as well (their number is held on its own), and how long the run is, where
# the learning rate does not depend on it.
FREE_ARGUMENTS = frozenset(
    {
        *PUBLISHING_ARGUMENTS,
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_steps",
        "num_train_epochs",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "torch_empty_cache_steps",
        "use_cpu",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "log_on_each_node",
        "log_level",
        "log_level_replica",
        "include_num_input_tokens_seen",
        "report_to",
        "run_name",
        "project",
        "per_device_eval_batch_size",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "dataloader_pin_memory",
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "ddp_backend",
        "ddp_timeout",
        "debug",
        "skip_memory_metrics",
    }
)

# Free as well where neither the learning rate nor the choice of a policy goes by evaluations.
_EVALUATION_ARGUMENTS = frozenset({"eval_strategy", "eval_steps", "eval_delay", "eval_on_start"})

# Learning rates that do not depend on how long the run is, as long as the warm-up is counted in steps.
_ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")


@dataclasses.dataclass(repr=False, eq=False)
class AlignArguments(TrainingArguments):
    """
    TrainingArguments with those of EarlyStoppingCallback, that also tell the loggers (wandb, tensorboard, ...) of the
    experiment, so that runs differ.
    """

    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    experiment: dict[str, Any] = dataclasses.field(init=False, default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What Trainer's loggers take as the config: the arguments, and the recipe's sections beside them."""
        return {**super().to_dict(), **self.experiment}


def training_arguments(recipe: Recipe, output: Path, cache: Cache | None = None) -> AlignArguments:
    """
    TrainingArguments of a recipe.

    cache  what the loggers name as the run's data
    Raises RecipeError for values that transformers or a package that is missing refuses, before a model is loaded.
    """
    given = {_NEW_NAMES.get(name, name): value for name, value in {**DEFAULTS, **recipe.training}.items()}
    if given.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise RecipeError("training.deepspeed: the package is not installed: pip install deepspeed")
    check_best(resolved(recipe.training))
    try:
        # Where a loss is not a number the run stops; the filter would wait for the device at every forward.
        args = AlignArguments(output_dir=str(output), **given, disable_tqdm=True, logging_nan_inf_filter=False)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"training: {str(error).strip().splitlines()[0]}") from None
    _check_device(args)
    _check_parts(args, set(given) - set(DEFAULTS))
    args.experiment = recipe.model_dump(mode="json", exclude={"training"})
    if cache is not None:
        args.experiment |= {"cache_key": cache.key, "cache_manifest": cache.digest}
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


def _check_device(args: TrainingArguments) -> None:
    """RecipeError where a run would use the CPU although something else was asked for."""
    if args.device.type != "cpu":
        return
    if args.fp16:
        raise RecipeError(
            "training.fp16: float16 needs a GPU, and torch finds none; on a CPU use bf16 with use_cpu: true"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible not in ("", "-1") and not args.use_cpu:
        raise RecipeError(
            f"CUDA_VISIBLE_DEVICES={visible} asks for a GPU, and torch finds none; set training.use_cpu: true to train "
            "on the CPU"
        )


def _check_parts(args: TrainingArguments, given: set[str]) -> None:
    """
    Make optimizer, schedule and loggers once on nothing, so that what they refuse is told before a model loads; and
    refuse what is `given` for them and would not reach them.
    """

    def refused(field: str, error: Exception) -> RecipeError:
        return RecipeError(f"training.{field}: {str(error).strip().splitlines()[0]}")

    try:
        for logger in get_reporting_integration_callbacks(args.report_to):
            logger()
    except (ValueError, ImportError, RuntimeError) as error:
        raise refused("report_to", error) from None
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, _Nothing())
        optimizer = kind([torch.nn.Parameter(torch.zeros(2, 2))], **settings)
    except (ImportError, RuntimeError) as error:
        raise refused(f"optim: {args.optim.value}", error) from None
    except (ValueError, TypeError, AttributeError) as error:
        if args.optim_target_modules is not None or "lomo" in args.optim.value:
            return  # these look for modules by name, which nothing has
        raise refused(f"optim: {args.optim.value}", error) from None
    for name, setting in _OPTIMIZER_SETTINGS.items():
        if name in given and setting not in settings:
            raise RecipeError(f"training.{name}: the optimizer {args.optim.value} has none")
    for one in (args.optim_args or "").split(","):
        if one and _settings_with(args, one) == _settings_with(args, None):
            raise RecipeError(f"training.optim_args: {one.strip()}: the optimizer {args.optim.value} does not take it")
    if args.optim_target_modules:
        raise RecipeError(f"training.optim_target_modules: the optimizer {args.optim.value} has none")
    schedule = args.lr_scheduler_type.value
    if schedule in ("constant", "reduce_lr_on_plateau", "greedy") and args.warmup_steps:
        instead = "; take constant_with_warmup" if schedule == "constant" else ""
        raise RecipeError(f"training.warmup_steps: lr_scheduler_type {schedule} has none{instead}")
    if schedule.startswith("constant") and args.lr_scheduler_kwargs:
        raise RecipeError(f"training.lr_scheduler_kwargs: lr_scheduler_type {schedule} takes none")
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(100), 100, args.lr_scheduler_kwargs)
    except (ValueError, TypeError) as error:
        raise refused(f"lr_scheduler_type: {schedule}", error) from None


def _settings_with(args: TrainingArguments, optim_args: str | None) -> Any:
    """What transformers makes the optimizer with; it leaves out of `optim_args` what it does not know."""
    other = copy.copy(args)
    other.optim_args = optim_args
    return Trainer.get_optimizer_cls_and_kwargs(other, _Nothing())[1]


class _Nothing(torch.nn.Module):
    """A model without modules."""


def resolved(training: dict[str, Any]) -> dict[str, Any]:
    """Every argument with the value that it has in a run, defaults included."""
    given = {**DEFAULTS, **training}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(AlignArguments):
        if field.init:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            values[field.name] = given.get(field.name, default)
    return values


def free_arguments(training: dict[str, Any]) -> frozenset[str]:
    """The arguments that a resumed run may change."""
    return FREE_ARGUMENTS if goes_by_evaluations(training) else FREE_ARGUMENTS | _EVALUATION_ARGUMENTS


def total_steps(training: dict[str, Any], pairs: int, pairs_per_step: int) -> int:
    """Optimiser steps of a run."""
    values = resolved(training)
    if values["max_steps"] > 0:
        return int(values["max_steps"])
    epochs: float = values["num_train_epochs"]
    return math.ceil(epochs * math.ceil(pairs / pairs_per_step))


def rate_depends_on_length(training: dict[str, Any]) -> bool:
    """Whether another number of steps would have given the steps already taken other learning rates."""
    values = resolved(training)
    share = isinstance(values["warmup_steps"], float) and 0 < values["warmup_steps"] < 1
    return values["lr_scheduler_type"] not in _ENDLESS_SCHEDULES or share
