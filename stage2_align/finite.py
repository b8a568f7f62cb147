"""
A run whose loss is not a number trains nothing, whatever it goes on to print. Which step was the first is noted on the
device, and looked at where the host waits for the device anyway: when a row is logged and when anything is saved.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fpo.errors import RunError
from fpo.stage2_align.checkpoints import newest_name

_NEVER = 2**62


class FiniteWatch:
    """The first step of this process whose loss or gradient was not finite."""

    def __init__(self, run: Path, learning_rate: float) -> None:
        self.run, self.learning_rate = run, learning_rate
        self._first: Tensor | None = None

    def note(self, value: Tensor | float | None, step: int) -> None:
        """`value` belongs to `step`; no process waits."""
        if value is None:
            return
        tensor = torch.as_tensor(value).detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        first = torch.where(torch.isfinite(tensor).all(), _NEVER, step)
        self._first = first if self._first is None else torch.minimum(self._first.to(first.device), first)

    def check(self, accelerator: Accelerator, step: int) -> None:
        """RunError in all processes, where any of them noted something before `step` ended."""
        if self._first is None:
            return
        first = int(accelerator.gather(self._first.to(accelerator.device).reshape(1)).min())
        if first < _NEVER:
            self.stop("the loss or its gradient", first, step)

    def check_weights(self, model: nn.Module, accelerator: Accelerator, step: int) -> None:
        """RunError in all processes, where a weight that is trained is not finite in any of them."""
        local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters() if p.requires_grad]
        broken = [~torch.isfinite(weights.detach()).all() for weights in local if weights.numel()]
        flag = torch.stack(broken).any() if broken else torch.tensor(False, device=accelerator.device)
        if int(accelerator.gather(flag.to(accelerator.device).int().reshape(1)).max()):
            self.stop("a weight", step, step)

    def check_row(self, row: dict[str, float], step: int) -> None:
        """RunError where a metric is not finite."""
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                self.stop(name, step, step)

    def stop(self, what: str, first: int, now: int) -> None:
        noticed = f", noticed at step {now}" if now != first else ""
        raise RunError(
            f"{self.run}: {what} is not a number from step {first} on{noticed}; training.learning_rate "
            f"{self.learning_rate:g} may be too high\n"
            f"  nothing was saved after that; the last checkpoint is {newest_name(self.run) or 'none'}\n"
            "  another learning rate is another run: give another --output"
        )
