"""
`transformers.Trainer` over a cache. Its arguments, checkpoints, resume, loggers, PEFT, DDP and FSDP come with it;
here stand the data (a stream), the loss (an objective) and the metrics.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
)

from fpo.errors import RunError
from fpo.interrupts import StopRequest
from fpo.scoring import Packed, router_coefficient
from fpo.stage2_align.arguments import AlignArguments
from fpo.stage2_align.best import EarlyStop, Evaluations
from fpo.stage2_align.callbacks import AlignProgress, MetricsFile, StepCounts, StopAtStepEnd, StreamPosition
from fpo.stage2_align.checkpoints import explained_writes, newest_name, rotate, seal, whole_checkpoint
from fpo.stage2_align.finite import FiniteWatch
from fpo.stage2_align.held_out import held_out_metrics
from fpo.stage2_align.measure import Metric, ObjectiveMeter, batch_metrics, counted_groups
from fpo.stage2_align.stream import Batch, PairStream, on_device
from fpo.stage2_align.sums import AUX_LOSS, TOKENS_READ, MetricSums


class PairTrainer(Trainer):
    """Trains a policy on the pairs of a cache under an objective. No reference model is in memory."""

    control: TrainerControl

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: AlignArguments,
        stream: PairStream,
        meter: ObjectiveMeter,
        tokenizer: PreTrainedTokenizerBase,
        metrics_file: Path,
        request: StopRequest,
        held_out: PairStream | None = None,
    ) -> None:
        """
        model     causal LM with scoring installed, or a PEFT model around one
        request   where a signal asks for the end
        held_out  what the policy is evaluated on
        """
        super().__init__(
            model=model,
            args=args,
            train_dataset=stream,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
        # Trainer would remove checkpoints as it likes, at the end the newest too.
        self.keep, args.save_total_limit = args.save_total_limit, None
        self.sums = MetricSums()
        self.position = StreamPosition(stream)
        self.stop = StopAtStepEnd(request)
        self.watch = FiniteWatch(Path(args.output_dir), args.learning_rate)
        self.tokens_seen = 0
        """By this process, since it was started."""
        self._saved_step = -1
        for callback in (
            StepCounts(),
            self.position,
            AlignProgress(stream),
            MetricsFile(metrics_file),
            self.sums,
            self.stop,
            Evaluations(stream, self.sums),
        ):
            self.add_callback(callback)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStop(args.early_stopping_patience, args.early_stopping_threshold))
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.stream = stream
        self.meter = meter.to(args.device)
        self.router_coefficient = router_coefficient(model)
        # The loss is a mean over pairs; Trainer must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Batch | None]:
        """The stream as it is: it does the shuffling, batching and the split over processes."""
        pinned = self.args.dataloader_pin_memory and torch.cuda.is_available()
        return DataLoader(self.stream, batch_size=None, collate_fn=_unchanged, pin_memory=pinned)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        prepared: Batch = super()._prepare_inputs(on_device(inputs, self.args.device))
        return prepared

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The pairs' losses by weight: their mean over forwards and processes is the mean over the step's pairs."""
        scores = model(**Packed.of(inputs)._asdict())
        measurement = self.meter.measure(scores, inputs, self.args.world_size)
        weight = inputs["weight"]
        loss, metrics = (measurement.value.losses * weight).sum(), batch_metrics(measurement, scores, inputs)
        metrics[TOKENS_READ] = Metric(inputs["tokens_read"], torch.zeros_like(inputs["tokens_read"]))
        if scores.router_loss is not None:
            # A mean over the batch's tokens, so it counts as often as the batch has pairs, as in TRL.
            loss = loss + self.router_coefficient * scores.router_loss * weight.sum()
            groups = counted_groups(inputs).sum()
            metrics[AUX_LOSS] = Metric(scores.router_loss.detach() * groups, groups)
            own = metrics["loss"]
            metrics["loss"] = own._replace(total=own.total + self.router_coefficient * metrics[AUX_LOSS].total)
        self.sums.add(metrics)
        return (loss, measurement) if return_outputs else loss

    @property
    def pairs_seen(self) -> int:
        """Pairs that this start has trained on, over all processes; repeats are none."""
        return self.stream.pairs_until(self.state.global_step) - self.stream.pairs_until(self.position.first_step)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Pairs of an epoch; Trainer would count micro-batches."""
        return self.stream.cache.n_groups

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Add the objective's metrics, averaged over the pairs of all processes since the last log. Raises RunError where
        anything is not finite.
        """
        self.watch.check(self.accelerator, self.state.global_step)
        row = {**logs, **self.sums.means(self.args.world_size, self.accelerator.device)}
        if self._scales_loss() and not math.isfinite(row.get("grad_norm", 0.0)):
            del row["grad_norm"]
        self.watch.check_row(row, self.state.global_step)
        super().log(row, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """What `fpo evaluate` says of the policy as it is now. Nothing of the training changes by it."""
        model: nn.Module = self.model_wrapped
        training = model.training
        model.eval()
        metrics = held_out_metrics(model, self.meter, self.eval_dataset, self.args.device)
        model.train(training)
        self.watch.check_row(metrics, self.state.global_step)
        # Not by `log` above: what was trained on since the last row belongs to the next one.
        super().log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Under `save_strategy: best` the answer says whether to save, and what a signal asks for is saved anyway."""
        return bool(super()._determine_best_metric(metrics, trial)) or bool(self.stop.signum)

    def _load_best_model(self) -> None:
        if self.stop.signum:
            return  # the run goes on from its last step
        whole_checkpoint(Path(self.args.output_dir), self.state.best_global_step)
        super()._load_best_model()

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        self.tokens_seen += Packed.of(inputs).n_tokens
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self.watch.note(loss, self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        # A scaled float16 gradient may overflow: that step is skipped and the scale lowered.
        if not self._scales_loss():
            self.watch.note(norm, self.state.global_step + 1)
        return norm

    def _scales_loss(self) -> bool:
        return bool(self.accelerator.mixed_precision == "fp16")

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        # Trainer looks whether a run has ended after a step, never before the first.
        if self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def check_finite(self) -> None:
        """RunError in all processes where the policy is not worth saving."""
        self.watch.check(self.accelerator, self.state.global_step)
        self.watch.check_weights(self.model, self.accelerator, self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, sealed when all ranks have written their part; then old ones may go."""
        if self._saved_step == self.state.global_step:
            return  # the end of an interrupted epoch asks again
        self.check_finite()
        run = Path(self.args.output_dir)
        folder = run / f"checkpoint-{self.state.global_step}"
        failure: RunError | None = None
        try:
            with explained_writes(folder, f"continue with --resume from {newest_name(run) or 'the beginning'}"):
                super()._save_checkpoint(model, trial)
        except RunError as error:
            failure = error
        # Also the point where all ranks have written.
        ranks = gather_object([(failure is None, self.sums.state())])
        if not all(written for written, _ in ranks):
            shutil.rmtree(folder, ignore_errors=True)
            raise failure or SystemExit(1)  # the rank that failed says why
        if self.is_world_process_zero():
            with explained_writes(folder, f"continue with --resume from {newest_name(run) or 'the beginning'}"):
                seal(folder, [sums for _, sums in ranks])
            with explained_writes(run, f"continue with --resume from {folder.name}"):
                best = self.state.best_model_checkpoint
                rotate(run, self.keep, None if best is None else Path(best).name)
        self._saved_step = self.state.global_step

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As Trainer; safetensors writes for its owner alone, a run is as readable as the umask lets files be."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            mode = (folder / "training_args.bin").stat().st_mode
            for path in folder.glob("*.safetensors"):
                path.chmod(mode)


def _unchanged(batch: Any) -> Any:
    return batch
