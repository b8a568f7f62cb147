"""What of a recipe needs held-out groups while it trains, and what goes by their metrics."""

from __future__ import annotations

from typing import Any

from fpo.errors import RecipeError
from fpo.recipe.experiment import Recipe

# Arguments of transformers.EarlyStoppingCallback; with these and TrainingArguments' own, `training` is complete.
EARLY_STOPPING = ("early_stopping_patience", "early_stopping_threshold")
# Without an evaluation strategy these would do nothing.
_GO_BY_EVALUATIONS = (
    *EARLY_STOPPING,
    "eval_steps",
    "eval_delay",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
)
_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


def evaluates(recipe: Recipe) -> bool:
    """Whether the policy is evaluated while it trains."""
    training = recipe.training
    return training.get("eval_strategy", "no") != "no" or bool(training.get("eval_on_start"))


def reads_held_out(recipe: Recipe) -> bool:
    """Whether `fpo align` needs the cache of the held-out groups."""
    return evaluates(recipe) or recipe.generate is not None


def goes_by_evaluations(training: dict[str, Any]) -> bool:
    """Whether the weights that a run saves depend on its evaluations: on when they are, and of which groups."""
    return bool(training.get("load_best_model_at_end")) or training.get("lr_scheduler_type") in _SCHEDULES


def check_evaluation(recipe: Recipe, origin: str) -> None:
    """
    RecipeError where a recipe evaluates or generates and has nothing to do it on, or goes by evaluations and has none.
    """
    training = recipe.training
    if recipe.data.held_out_split is None and reads_held_out(recipe):
        name = "training.eval_on_start" if training.get("eval_on_start") else "training.eval_strategy"
        name = name if evaluates(recipe) else "generate"
        raise RecipeError(
            f"{origin}: {name}: there are no held-out groups; name a split in data.eval_split, or "
            "set data.held_out: 0.1"
        )
    sharding = next((name for name in ("fsdp", "deepspeed") if training.get(name)), None)
    if recipe.generate is not None and sharding is not None:
        raise RecipeError(f"{origin}: generate: training.{sharding} leaves no process the whole policy; leave it out")
    if training.get("eval_strategy", "no") != "no":
        return
    # Spelled out, `no` turns off what else the recipe says of evaluations, but for what a run cannot do without them.
    idle = [name for name in _GO_BY_EVALUATIONS if training.get(name) and "eval_strategy" not in training]
    lost = [name for name in ("load_best_model_at_end", EARLY_STOPPING[0]) if training.get(name)]
    lost += ["save_strategy"] if training.get("save_strategy") == "best" else []
    lost += ["lr_scheduler_type"] if training.get("lr_scheduler_type") in _SCHEDULES else []
    for name in [*lost, *idle]:
        raise RecipeError(
            f"{origin}: training.{name}: {training[name]} goes by evaluations, and there are none; set "
            "training.eval_strategy: steps, or epoch"
        )
