"""
One run after another in one process: each starts as it would alone, whatever the runs before it left behind.

What Python, numpy and torch draw starts from `training.seed` in every run, and TrainingArguments resets accelerate's
state. What neither does is done here, and what cannot be done in one process is refused.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fpo.errors import RecipeError, RunError
from fpo.recipe import Recipe
from fpo.stage2_align.align import AlignReport, align
from fpo.stage2_align.arguments import resolved, training_arguments
from fpo.stage2_align.run import RUN_FILE
from fpo.store import Cache

# transformers and accelerate set these for the whole process, and do not set them back.
_OF_THE_PROCESS = ("ddp_backend", "deepspeed", "fsdp", "fsdp_config", "full_determinism", "tf32", "use_cpu")
# Loggers that are told when a run has ended, also one that failed, or the next would be logged into it; None: each run
# has its own file.
_ENDED_BY = {"tensorboard": None, "wandb": "finish", "mlflow": "end_run"}


def check_sweep(recipes: Sequence[Recipe], folder: Path) -> None:
    """
    RecipeError where recipes cannot be trained one after another; also what each of them says of training. RunError
    where the folder of their runs is a run itself.
    """
    if (folder / RUN_FILE).exists():
        raise RunError(f"{folder}: a run lies there, and a sweep's folder holds runs; give another --output")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            f"--set: a sweep trains in one process, this start has {os.environ['WORLD_SIZE']}, which a run that fails "
            "in one of them would leave waiting for each other; start every run by itself"
        )
    for name in _OF_THE_PROCESS:
        values = list({str(resolved(recipe.training)[name]): None for recipe in recipes})
        if len(values) > 1:
            raise RecipeError(
                f"training.{name}: it is set once in a process, a sweep has {' and '.join(values)}; start one fpo "
                "align for each"
            )
    for recipe in recipes:
        unknown = [name for name in training_arguments(recipe, folder).report_to if name not in _ENDED_BY]
        if unknown:
            raise RecipeError(
                f"training.report_to: {unknown[0]} may log a sweep's runs as one; take {', '.join(_ENDED_BY)}, or "
                "start every run by itself"
            )


def align_in_turn(recipe: Recipe, cache: Cache, output: Path, held_out: Cache | None = None) -> AlignReport:
    """`align`, going on where the run was begun; after it nothing of it is left in the process."""
    try:
        return align(recipe, cache, output, resume=True, held_out=held_out)
    finally:
        for name, end in _ENDED_BY.items():
            if end is not None and (logger := sys.modules.get(name)) is not None:
                getattr(logger, end)()
        # Trainer and its callbacks hold each other, and with them the model.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
