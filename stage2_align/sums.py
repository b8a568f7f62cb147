"""Metrics added up: over the batches between two logs, over all held-out groups, over the processes of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fpo.stage2_align.checkpoints import read_sums
from fpo.stage2_align.measure import Metric

TOKENS_READ = "num_tokens"
"""What is no mean but a total since the run began, by TRL's name; it is over nothing."""

AUX_LOSS = "aux_loss"
"""The router's load-balancing loss, which is trained on and not evaluated."""


class MetricSums(TrainerCallback):
    """
    Sums of every metric since the last log, and over how much each is; of TOKENS_READ since the run began. They are
    saved beside each checkpoint, so that a resumed run logs what one never interrupted does, wherever between two logs
    it was saved.
    """

    # How many batches' sums may wait on the device between two logs.
    WAITING = 256

    def __init__(self) -> None:
        self.totals: dict[str, tuple[float, float]] = {}
        self._names: list[str] = []
        self._waiting: list[Tensor] = []

    @property
    def names(self) -> list[str]:
        """What means there are, from the first batch on."""
        return [name for name in self._names if name != TOKENS_READ]

    def add(self, metrics: dict[str, Metric]) -> None:
        """Those of one more batch. They stay on their device, so that no step waits for it."""
        self._names = [*metrics]
        self._waiting.append(torch.stack([number for metric in metrics.values() for number in metric]).view(-1, 2))
        if len(self._waiting) == MetricSums.WAITING:
            self._fold()

    def _fold(self) -> None:
        """
        Add up what waits, batch after batch in float64 on the host: the same numbers, bit by bit, whenever it is done.
        """
        for row in torch.stack(self._waiting).tolist() if self._waiting else []:
            for name, (value, count) in zip(self._names, row, strict=True):
                total, counted = self.totals.get(name, (0.0, 0.0))
                self.totals[name] = (total + value, counted + count)
        self._waiting = []

    def means(self, world: int, device: torch.device) -> dict[str, float]:
        """
        Means over all processes since the last call, and TOKENS_READ; nothing where nothing was added.

        device  where this process talks to the others, if there are any
        """
        self._fold()
        if not self.totals.keys() - {TOKENS_READ}:
            return {}
        names = sorted(self.totals)
        values = [self.totals[name] for name in names]
        if world > 1:
            values = reduce(torch.tensor(values, dtype=torch.float64, device=device), reduction="sum").tolist()
        self.totals = {name: total for name, total in self.totals.items() if name == TOKENS_READ}
        # Where no group has a pair, each sum is 0; of single completions there may be none of one side.
        nothing = not any(count for _, count in values)
        means = {
            name: total / (n or 1.0)
            for name, (total, n) in zip(names, values, strict=True)
            if n or nothing or name == TOKENS_READ
        }
        return _with_margins(means)

    def state(self) -> dict[str, tuple[float, float]]:
        """What a checkpoint must keep of them."""
        self._fold()
        return dict(self.totals)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.totals = read_sums(checkpoint, args.process_index, args.world_size)


def _with_margins(means: dict[str, float]) -> dict[str, float]:
    """With the reward margin of single completions: the difference of two means, of as many as there were of each."""
    chosen, rejected = (means.get(f"rewards/{side}") for side in ("chosen", "rejected"))
    if "rewards/margins" in means or chosen is None or rejected is None:
        return means
    return {**means, "rewards/margins": chosen - rejected}
