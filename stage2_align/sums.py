"""Metrics added up: over the pairs between two logs, over all held-out pairs, over the processes of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fpo.stage2_align.checkpoints import read_sums


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

    @property
    def names(self) -> list[str]:
        """What is summed up, from the first batch on."""
        return [name for name in self._names if name != "pairs"]

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

    def means(self, world: int, device: torch.device) -> dict[str, float]:
        """
        Means over the pairs of all processes since the last call; nothing where there were none.

        device  where this process talks to the others, if there are any
        """
        self._fold()
        if not self.totals:
            return {}
        names = sorted(self.totals)
        values = [self.totals[name] for name in names]
        if world > 1:
            values = reduce(torch.tensor(values, dtype=torch.float64, device=device), reduction="sum").tolist()
        means = dict(zip(names, values, strict=True))
        pairs = means.pop("pairs")
        self.totals = {}
        # Where no group has a pair, each sum is 0.
        return {name: value / (pairs or 1.0) for name, value in means.items()}

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep of them."""
        self._fold()
        return dict(self.totals)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.totals = read_sums(checkpoint, args.process_index, args.world_size)
