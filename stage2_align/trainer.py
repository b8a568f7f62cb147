"""
`transformers.Trainer` over a cache. Its arguments, checkpoints, resume, loggers, PEFT, DDP and FSDP come with it;
here stand the data (a stream), the loss (an objective) and the metrics.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from scoring import Packed, router_coefficient
from stage2_align.measure import ObjectiveMeter, batch_metrics
from stage2_align.stream import Batch, PairStream


class PairTrainer(Trainer):
    """Trains a policy on the pairs of a cache under an objective. No reference model is in memory."""

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        stream: PairStream,
        meter: ObjectiveMeter,
        tokenizer: PreTrainedTokenizerBase,
        metrics_file: Path,
    ) -> None:
        """
        model  causal LM with scoring installed, or a PEFT model around one
        """
        super().__init__(
            model=model,
            args=args,
            train_dataset=stream,
            processing_class=tokenizer,
        )
        self.sums = MetricSums()
        self.position = _StreamPosition(stream)
        for callback in (self.position, _Progress(stream), MetricsFile(metrics_file), self.sums):
            self.add_callback(callback)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.stream = stream
        self.meter = meter.to(args.device)
        self.router_coefficient = router_coefficient(model)
        # The loss is a mean over pairs; Trainer must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Batch | None]:
        """The stream as it is: it does the shuffling, batching and the split over processes."""
        return DataLoader(self.stream, batch_size=None, collate_fn=_unchanged)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The pairs' losses by weight: their mean over forwards and processes is the mean over the step's pairs."""
        scores = model(**{name: inputs[name] for name in Packed._fields})
        measurement = self.meter.measure(scores, inputs)
        weight = inputs["weight"]
        pairs = (weight > 0).sum()
        loss, sums = (measurement.value.losses * weight).sum(), batch_metrics(measurement, inputs)
        if scores.router_loss is not None:
            # A mean over the batch's tokens, so it counts as often as the batch has pairs, as in TRL.
            loss = loss + self.router_coefficient * scores.router_loss * weight.sum()
            sums["aux_loss"] = scores.router_loss.detach() * pairs
            sums["loss"] = sums["loss"] + self.router_coefficient * sums["aux_loss"]
        self.sums.add(sums, pairs)
        return (loss, measurement) if return_outputs else loss

    @property
    def pairs_seen(self) -> int:
        """Pairs that this start has trained on, over all processes; repeats are none."""
        return self.stream.pairs_until(self.state.global_step) - self.stream.pairs_until(self.position.first_step)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Pairs of an epoch; Trainer would count micro-batches."""
        return self.stream.cache.n_pairs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's metrics, averaged over the pairs of all processes since the last log."""
        super().log({**logs, **self.sums.means(self.accelerator)}, start_time)


class MetricSums(TrainerCallback):
    """
    Sums over the pairs since the last log. They are saved beside each checkpoint, so that a resumed run logs the same
    means as one never interrupted, wherever between two logs it was saved.
    """

    # How many batches' sums may wait on the device between two logs.
    WAITING = 256

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self._names: list[str] = []
        self._waiting: list[Tensor] = []

    def add(self, sums: dict[str, Tensor], pairs: Tensor) -> None:
        """`sums` over this many more pairs. They stay on their device, so that no step waits for it."""
        self._names = [*sums, "pairs"]
        self._waiting.append(torch.stack([*sums.values(), pairs.float()]))
        if len(self._waiting) == MetricSums.WAITING:
            self._fold()

    def _fold(self) -> None:
        """
        Add up what waits, batch after batch in float64 on the host: the same numbers, bit by bit, whenever it is done.
        """
        for row in torch.stack(self._waiting).tolist() if self._waiting else []:
            for name, value in zip(self._names, row, strict=True):
                self.totals[name] = self.totals.get(name, 0.0) + value
        self._waiting = []

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the pairs of all processes since the last call; nothing where there were none."""
        self._fold()
        if not self.totals:
            return {}
        names = sorted(self.totals)
        values = [self.totals[name] for name in names]
        if accelerator.num_processes > 1:
            totals = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
            values = accelerator.reduce(totals, reduction="sum").tolist()
        means = dict(zip(names, values, strict=True))
        pairs = means.pop("pairs")
        self.totals = {}
        return {name: value / pairs for name, value in means.items()}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._fold()
        sums_file(args, state).write_text(json.dumps(self.totals), encoding="utf-8")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        path = sums_file(args, state)
        if state.global_step and path.is_file():
            self.totals = json.loads(path.read_text(encoding="utf-8"))


def sums_file(args: TrainingArguments, state: TrainerState) -> Path:
    """Where a rank keeps its sums at a checkpoint."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / f"metric_sums_{args.process_index}.json"


def _unchanged(batch: Any) -> Any:
    return batch


class _StreamPosition(TrainerCallback):
    """Tells the stream which epoch begins, and how far into it a resumed run is."""

    def __init__(self, stream: PairStream) -> None:
        self.stream = stream
        self.first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first_step = state.global_step

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        epoch, done = divmod(state.global_step, self.stream.steps)
        self.stream.start(epoch, done * self.stream.accumulation)


class _Progress(TrainerCallback):
    """A progress bar in pairs, on stderr, with the latest loss and reward margin."""

    def __init__(self, stream: PairStream) -> None:
        self.stream = stream
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            total, done = (self.stream.pairs_until(step) for step in (state.max_steps, state.global_step))
            self.bar = tqdm(total=total, initial=done, desc="align", unit=" pairs", disable=None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.stream.pairs_until(state.global_step) - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.bar is not None and logs and "rewards/margins" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}, reward margin {logs['rewards/margins']:.4f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one object per logged step, floats in full; a resumed run continues where its checkpoint was."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "rewards/margins" in logs:
            # The last log also carries Trainer's summary of the whole run: train_runtime and the like.
            shown = {name: value for name, value in logs.items() if not name.startswith(("train_", "total_"))}
            row = {"step": state.global_step, **shown}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, without a last line that a killed run left unfinished."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
