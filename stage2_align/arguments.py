"""TrainingArguments of a recipe, and which of them a resumed run may change."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from errors import RecipeError
from recipe import Recipe
from store import Cache

# Where TrainingArguments' own default would surprise; as in TRL's DPOConfig.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "logging_steps": 10,
    "report_to": "none",
    "ddp_find_unused_parameters": False,
}

# What moves no weight: a resumed run may change it. All else is held, an argument of a later transformers too. How
# the pairs of a step are made up is free as well (their number is held on its own), and how long the run is, where
# the learning rate does not depend on it.
FREE_ARGUMENTS = frozenset(
    {
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
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "per_device_eval_batch_size",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
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

# Learning rates that do not depend on how long the run is, as long as the warm-up is counted in steps.
_ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")


class AlignArguments(TrainingArguments):
    """TrainingArguments that also tell the loggers (wandb, tensorboard, ...) of the experiment, so that runs differ."""

    experiment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """What Trainer's loggers take as the config: the arguments, and the recipe's sections beside them."""
        return {**super().to_dict(), **self.experiment}


def training_arguments(recipe: Recipe, output: Path, cache: Cache | None = None) -> TrainingArguments:
    """
    TrainingArguments of a recipe.

    cache  what the loggers name as the run's data
    Raises RecipeError for values that transformers refuses.
    """
    try:
        args = AlignArguments(output_dir=str(output), **{**DEFAULTS, **recipe.training}, disable_tqdm=True)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"training: {str(error).strip().splitlines()[0]}") from None
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


def resolved(training: dict[str, Any]) -> dict[str, Any]:
    """Every argument with the value that it has in a run, defaults included."""
    given = {**DEFAULTS, **training}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(TrainingArguments):
        if field.init:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            values[field.name] = given.get(field.name, default)
    return values


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
