"""What happens around Trainer's steps: the stream's position, progress, metrics.jsonl, an orderly end by a signal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fpo.interrupts import StopRequest
from fpo.progress import Progress, progress_bar, say
from fpo.stage2_align.checkpoints import explained_writes
from fpo.stage2_align.run import write_whole
from fpo.stage2_align.stream import PairStream


class StreamPosition(TrainerCallback):
    """Tells the stream which epoch begins, and how far into it a resumed run is."""

    def __init__(self, stream: PairStream) -> None:
        self.stream = stream
        self.first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first_step = state.global_step

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        epoch, done = divmod(state.global_step, self.stream.steps)
        self.stream.start(epoch, done * self.stream.accumulation)


class StepCounts(TrainerCallback):
    """Log and save as often as the recipe says now; Trainer would go on as the checkpoint's did."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)
        # A resumed run that has all its steps takes no other.
        control.should_training_stop = state.global_step >= state.max_steps


class AlignProgress(TrainerCallback):
    """A bar in pairs with the latest loss and reward margin; without a terminal a line per log, or per minute."""

    def __init__(self, stream: PairStream) -> None:
        self.stream = stream
        self.bar: Progress | None = None
        self.latest = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            total, done = (self.stream.pairs_until(step) for step in (state.max_steps, state.global_step))
            self.bar = progress_bar(total, "pairs", "align", initial=done)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(self.latest, place=f"step {state.global_step:,}/{state.max_steps:,}")
            self.bar.update(self.stream.pairs_until(state.global_step) - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        # The summary at the end (train_runtime and the like) is no step.
        if self.bar is not None and logs and "loss" in logs and "train_runtime" not in logs:
            self.latest = _in_short(logs, ("loss", "rewards/margins"))
            self.bar.set_postfix_str(self.latest, place=f"step {state.global_step:,}/{state.max_steps:,}")
            self.bar.line()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        if self.bar is not None:
            own = {name.removeprefix("eval_"): value for name, value in metrics.items()}
            said = _in_short(own, ("loss", "rewards/margins", "rewards/accuracies"))
            say(f"evaluate: step {state.global_step:,}/{state.max_steps:,}, {said}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _in_short(metrics: dict[str, float], names: tuple[str, ...]) -> str:
    """loss 0.693 margin 0.1, of those that are there"""
    short = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    return " ".join(f"{short[name]} {metrics[name]:.3g}" for name in names if name in metrics)


def is_evaluation(row: dict[str, float]) -> bool:
    """Whether a row of metrics is of held-out groups."""
    return "eval_loss" in row


class MetricsFile(TrainerCallback):
    """
    metrics.jsonl: one object per logged step and one per evaluation, floats in full; a resumed run continues where its
    checkpoint was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            # What was logged after the checkpoint, also by an interrupted run as its last word, comes again.
            logged = {(row["step"], is_evaluation(row)) for row in state.log_history}
            kept = [row for row in read_metrics(self.path) if (row["step"], is_evaluation(row)) in logged]
            with explained_writes(self.path, "free some space, then continue with --resume"):
                write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs and ("loss" in logs or is_evaluation(logs)):
            # The last log also carries Trainer's summary of the whole run: train_runtime and the like.
            shown = {name: value for name, value in logs.items() if not name.startswith(("train_", "total_"))}
            row = {"step": state.global_step, **shown}
            with (
                explained_writes(self.path, "free some space, then continue with --resume"),
                self.path.open("a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(row, allow_nan=False) + "\n")


def ends(rows: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last row that say what the policy was trained on; empty where there are none."""
    trained = [row for row in rows if "loss" in row]
    return (trained[0], trained[-1]) if trained else ({}, {})


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, without a last line that a killed run left unfinished."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class StopAtStepEnd(TrainerCallback):
    """
    Where a signal asked for it, save after the step and stop: all processes after the same one.

    Signals reach the processes of a job at different moments, so each says at the end of a step what it has heard,
    and all act on it at the end of the next. That goes between the hosts; the device is not waited for.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.signum = 0
        """The signal by which the run was stopped; 0 where it was not."""
        self._heard: Tensor | None = None
        self._waiting: Any = None
        self._group: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size > 1:
            self._group = distributed.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        heard = self._agreed() if self._group is not None else self.request.signum
        if heard and state.global_step < state.max_steps:
            self.signum = heard
            control.should_save = control.should_training_stop = True

    def _agreed(self) -> int:
        """What any process had heard at the end of the step before."""
        heard = self._result()
        self._heard = torch.tensor(self.request.signum)
        self._waiting = distributed.all_reduce(self._heard, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        return heard

    def _result(self) -> int:
        if self._waiting is None or self._heard is None:
            return 0
        self._waiting.wait()
        self._waiting = None
        return int(self._heard)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._result()
