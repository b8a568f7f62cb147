"""Groups of random tokens, and what a family's own forward says about each of their completions alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fpo.scoring.hookpoints import capture

Shape = tuple[int, ...]
"""Tokens of a group's prompt and of each of its completions."""


def some_groups(shapes: list[Shape]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random tokens in groups of these shapes, as `pack` takes them."""
    sizes = np.array([size for shape in shapes for size in shape])
    ids = np.random.default_rng(1).integers(3, 97, sizes.sum()).astype(np.uint32)
    splits = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)
    return ids, splits, np.array([len(shape) - 1 for shape in shapes], np.uint32)


def sequences(ids: np.ndarray, splits: np.ndarray, n_completions: np.ndarray) -> Iterator[tuple[int, Tensor, int]]:
    """Group, tokens and length of the prompt of every completion behind its prompt."""
    segments = iter(np.split(ids.astype(np.int64), splits[1:-1].astype(int)))
    for group, n in enumerate(n_completions):
        prompt = next(segments)
        for _ in range(n):
            yield group, torch.from_numpy(np.concatenate([prompt, next(segments)])), len(prompt)


def separate_forwards(
    model: PreTrainedModel, ids: np.ndarray, splits: np.ndarray, n_completions: np.ndarray, hookpoint: str
) -> tuple[Tensor, Tensor]:
    """Log-probs and hookpoint outputs at the scored positions, one unpadded sequence at a time through transformers."""
    logps, residuals = [], []
    for _, tokens, prompt in sequences(ids, splits, n_completions):
        with capture(model, [hookpoint]) as outputs:
            logits = type(model).forward(model, input_ids=tokens[None], use_cache=False).logits[0].float()
        at = torch.arange(max(prompt, 1), len(tokens))
        logps.append(logits[at - 1].log_softmax(-1)[torch.arange(len(at)), tokens[at]])
        residuals.append(outputs[hookpoint][0, at - 1])
    return torch.cat(logps), torch.cat(residuals)
