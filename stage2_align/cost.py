"""
What a run cost, and what a reference in memory would have added: counted, not guessed.

    memory   the reference's weights: their number times the size of its dtype; with adapters none, for the policy with
             its adapter switched off is the reference
    compute  one forward of the tokens that were trained on. Of N weights and T tokens a forward takes 2 N T operations
             of matrix products, a backward 2 N T for the activations and 2 N T for the weights that are trained, and
             activation checkpointing another 2 N T: 6 N T in all where all are trained, and the reference's 2 N T
             beside them. What attention adds to both is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from torch import nn

from fpo.recipe import Recipe
from fpo.scoring import model_folder, weight_files
from fpo.stage2_align.trainer import PairTrainer

if sys.platform != "win32":
    import resource


class Cost(NamedTuple):
    """What the start that took the last step cost, and what a reference would have added to it."""

    tokens: int
    """Trained on, over all processes; a prompt counts once for all its completions where they share it."""
    peak_bytes: int | None
    """Memory of the first process at its peak; None where the system does not tell."""
    peak_of: Literal["device", "resident set"]
    """What is counted: what torch allocated on the GPU, or all that the process held, of a sweep's earlier runs too."""
    needs_reference: bool
    """Whether the objective asks for one."""
    reference_bytes: int | None
    """Its weights; 0 with adapters, None where none is needed or its files are not here to be counted."""
    reference_share: float | None
    """Its forward, as a share of the matrix products of training; None as above."""


class Weights(NamedTuple):
    """How many a policy has, and how many of them are trained."""

    all: int
    trained: int


def count_weights(model: nn.Module) -> Weights:
    """To be asked before anything shards the model."""
    # Under DeepSpeed's ZeRO-3 a parameter is empty and knows its size by another name.
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in model.parameters()]
    return Weights(sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained))


def forget_peak(device: torch.device) -> None:
    """Of what was allocated on a GPU before; a process' resident set has no such beginning."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def cost_of(recipe: Recipe, weights: Weights, trainer: PairTrainer) -> Cost:
    """The cost of what a trainer has just trained; all processes must ask."""
    tokens = sum(gather_object([trainer.tokens_seen]))
    device = trainer.args.device
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
    peak_of: Literal["device", "resident set"] = "device" if device.type == "cuda" else "resident set"
    if not recipe.objective.needs.reference:
        return Cost(tokens, peak, peak_of, False, None, None)
    added = _reference_weights(recipe, weights)
    if added is None:
        return Cost(tokens, peak, peak_of, True, None, None)
    frozen = recipe.policy.frozen
    # Of a whole policy the towers that no token passes through are neither trained nor multiplied.
    trained = weights.trained / weights.all if frozen else 1.0
    share = added / weights.all / (2 + trained + bool(trainer.args.activation_checkpointing))
    switched_off = frozen and recipe.policy.model is None
    size = 0 if switched_off else added * getattr(torch, recipe.reference.dtype).itemsize
    return Cost(tokens, peak, peak_of, True, size, share)


def _reference_weights(recipe: Recipe, policy: Weights) -> int | None:
    """How many weights the reference has: the policy's, where it starts as the reference, else by its files here."""
    if recipe.policy.model is None:
        return policy.all
    if not Path(recipe.reference.model).is_dir():
        return None  # on the hub: training has no need of it, and fetches nothing to count it
    total = 0
    for file in weight_files(model_folder(recipe.reference.model)):
        with safe_open(file, "pt") as tensors:
            total += sum(torch.Size(tensors.get_slice(name).get_shape()).numel() for name in tensors.keys())  # noqa: SIM118 - no dict
    return total


def peak_resident() -> int | None:
    """Bytes that this process held at its peak; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage begins with the peak of whoever started the process.
        lines = status.read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
