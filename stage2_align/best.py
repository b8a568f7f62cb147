"""
Evaluations that decide: which policy a run saves (`load_best_model_at_end`), when it ends (`early_stopping_patience`),
what is kept (`save_strategy: best`). Trainer compares; here stands what makes its answer hold for a resumed run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fpo.errors import RecipeError
from fpo.nearest import nearest
from fpo.progress import say
from fpo.recipe import goes_by_evaluations
from fpo.stage2_align.checkpoints import whole_checkpoint
from fpo.stage2_align.stream import PairStream
from fpo.stage2_align.sums import AUX_LOSS, MetricSums


def check_best(values: dict[str, Any]) -> None:
    """
    RecipeError where evaluations could not decide what they are asked to.

    values  of all training arguments
    """
    problem = _unsaved(values) or _unstopped(values) or _misled(values)
    if problem is not None:
        raise RecipeError(f"training.{problem}")


def _unsaved(values: dict[str, Any]) -> str | None:
    """Where the best evaluation may have no checkpoint: Trainer would load an older one, or none."""
    strategy, saving = values["eval_strategy"], values["save_strategy"]
    if not values["load_best_model_at_end"]:
        named = saving != "best" or values["metric_for_best_model"] is not None
        return None if named else "save_strategy: best by which metric? Set metric_for_best_model: loss, or another"
    if saving == "best":
        return None
    if saving != strategy:
        return (
            f"load_best_model_at_end: evaluations by {strategy} and checkpoints by {saving} do not meet; set "
            f"save_strategy: best, or {strategy}"
        )
    evaluated, saved = values["eval_steps"] or values["logging_steps"], values["save_steps"]
    if strategy == "steps" and evaluated != saved:
        return (
            f"load_best_model_at_end: with an evaluation every {evaluated} steps and a checkpoint every {saved}, the "
            f"best may not be there; set save_strategy: best, or save_steps: {evaluated}"
        )
    return None


def _unstopped(values: dict[str, Any]) -> str | None:
    """Where early stopping would not stop, or would save what it stopped for."""
    patience, threshold = values["early_stopping_patience"], values["early_stopping_threshold"]
    if patience is None:
        return "early_stopping_threshold: nothing stops early without early_stopping_patience" if threshold else None
    if not values["load_best_model_at_end"]:
        return "early_stopping_patience: the run would save the last and worse policy; set load_best_model_at_end: true"
    return None


def _misled(values: dict[str, Any]) -> str | None:
    """Where a better evaluation would count as a worse one for the learning rate, which takes less for better."""
    if not goes_by_evaluations({"lr_scheduler_type": values["lr_scheduler_type"]}):
        return None
    metric = values["metric_for_best_model"] or "loss"
    greater = values["greater_is_better"]
    wanted = "max" if (not metric.endswith("loss") if greater is None else greater) else "min"
    mode = (values["lr_scheduler_kwargs"] or {}).get("mode", "min")
    if mode == wanted:
        return None
    return f"lr_scheduler_kwargs: mode {mode} takes a better {metric} for a worse one; set {{mode: {wanted}}}"


class Evaluations(TrainerCallback):
    """
    When the policy is evaluated: as Trainer does it, but at an epoch's end before the checkpoint of that step is
    written, which could not tell a resumed run of it otherwise; and at the start of a run, not where one is resumed.
    """

    def __init__(self, stream: PairStream, sums: MetricSums) -> None:
        """
        sums  of the pairs that are trained on: they have the names of the metrics
        """
        self.stream, self.sums = stream, sums

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step > 0:
            args.eval_on_start = False
        length = state.max_steps if args.eval_strategy == "steps" else state.max_steps / self.stream.steps
        if args.load_best_model_at_end and args.eval_delay > length:
            unit = "steps" if args.eval_strategy == "steps" else "epochs"
            raise RecipeError(
                f"training.eval_delay: the first evaluation comes after {args.eval_delay:g} {unit}, the run has "
                f"{length:g}, so none could be the best"
            )
        if args.load_best_model_at_end and state.best_global_step:
            # By its step: the run may lie in another place than when the path was written down.
            folder = whole_checkpoint(Path(args.output_dir), state.best_global_step)
            state.best_model_checkpoint = str(folder)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._check_metric(args)
        ends = state.global_step % self.stream.steps == 0 or state.global_step >= state.max_steps
        if args.eval_strategy == "epoch" and ends and args.eval_delay <= state.epoch:
            control.should_evaluate = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Done, or the end of an epoch that was broken off.
        control.should_evaluate = False

    def _check_metric(self, args: TrainingArguments) -> None:
        """RecipeError after the first step, not at the first evaluation, where no metric is called so."""
        if args.metric_for_best_model is None:
            return
        name = args.metric_for_best_model.removeprefix("eval_")
        given = [name for name in self.sums.names if name != AUX_LOSS]
        if name not in given:
            near = nearest(name, given)
            hint = f"nearest is {near}" if near else f"there are {', '.join(given)}"
            raise RecipeError(f"training.metric_for_best_model: no evaluation gives {name!r}; {hint}")


class EarlyStop(EarlyStoppingCallback):
    """Trainer's own. The evaluations without a gain that a resumed run's checkpoint has counted count on."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        super().on_train_begin(args, state, control)
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.early_stopping_patience_counter = saved["early_stopping_patience_counter"]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        super().on_evaluate(args, state, control, metrics)
        count = self.early_stopping_patience_counter
        early = count >= self.early_stopping_patience and state.global_step < state.max_steps
        if early and state.is_world_process_zero:
            say(f"evaluate: {count} without a gain; the run stops early, at step {state.global_step:,}")


def best_step(args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
    """Step, metric and value of the evaluation whose policy a run saves; None where it saves the last."""
    if not args.load_best_model_at_end:
        return None
    metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    return {"step": state.best_global_step, "metric": metric, "value": state.best_metric}
