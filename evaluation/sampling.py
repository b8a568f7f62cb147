"""
Completions of a batch of prompts by transformers' `generate`, each from random numbers of its own: what is drawn for
a prompt depends on its seed and on nothing that stands beside it, but for the rounding of a padded batch.

Dimension key:  R rows   L longest prompt   T tokens drawn so far   V vocabulary
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fpo.errors import DataError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Only the likeliest tokens that have this much probability together; 1: all."""
    top_k: int | None = None
    """Only so many of the likeliest; None: all."""
    seed: int = 0


class Written(NamedTuple):
    """A completion."""

    tokens: list[int]
    """With the one that ends it."""
    ended: bool
    """Whether one does; else it was cut at the longest length."""


Engine = Callable[[Sequence[Sequence[int]], NDArray[np.float64], Sampling], list[Written]]
"""
Prompts (token ids, none empty), of each the numbers that decide its tokens (`uniforms`; not looked at where the
temperature is 0), and how to sample -> a completion of each.
"""


def uniforms(seed: int, prompt: int, sample: int, turn: int, count: int) -> NDArray[np.float64]:
    """The random numbers in [0, 1) that decide the tokens of one completion."""
    return np.random.default_rng([seed, prompt, sample, turn]).random(count)


def check_room(asked: Sequence[Sequence[int]], sampling: Sampling, room: int | None) -> None:
    """DataError where a prompt has no token, or with its completion more than `room` (None: no limit)."""
    if any(not ids for ids in asked):
        raise DataError("a prompt is of no tokens, so there is nothing to go on from; leave it out of the prompt set")
    longest = max(map(len, asked))
    if room is not None and longest + sampling.max_new_tokens > room:
        raise DataError(
            f"--max-new-tokens {sampling.max_new_tokens} behind a prompt of {longest} tokens are more than the model's "
            f"{room} positions" + (f"; lower it to {room - longest}" if room > longest else "")
        )


class Draw(LogitsProcessor):
    """
    Leaves one token of each row, drawn by the row's own number: the first whose cumulative probability exceeds it. So
    the most likely of what is left is a sample, and `generate` keeps its caches, masks and positions to itself.
    """

    def __init__(self, numbers: Float[Tensor, "R longest"]) -> None:
        self.numbers, self.step = numbers, 0

    def __call__(self, input_ids: Int[Tensor, "R T"], scores: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        cumulative = scores.double().softmax(-1).cumsum(-1)
        # Rounding may leave the last sum below 1; then it is the last token that can be drawn.
        number = torch.minimum(self.numbers[:, self.step, None], cumulative[:, -1:] * (1 - 2**-52))
        drawn = torch.searchsorted(cumulative, number, right=True)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    numbers: NDArray[np.float64],
    sampling: Sampling,
) -> list[Written]:
    """
    One completion of each prompt, see `Engine`.

    model    what `generate` is called of: a causal model, or PEFT's around one
    numbers  (R, max_new_tokens)
    """
    device, width = model.device, max(map(len, prompts))
    config = copy.deepcopy(model.generation_config)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # What the model's authors recommend to sample by is none of ours; what ends a completion is.
    config.update(do_sample=False, temperature=1.0, top_p=1.0, top_k=None, num_beams=1, pad_token_id=pad)
    config.update(max_length=None, max_new_tokens=sampling.max_new_tokens, use_cache=True)
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    ids = torch.full((len(prompts), width), 0 if pad is None else pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the left, so that all rows go on at the same column
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    written = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        logits_processor=_processors(sampling, torch.from_numpy(numbers).to(device)),
    )
    ends = config.eos_token_id
    ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return [_until_end(row, ends) for row in written[:, width:].tolist()]


def _processors(sampling: Sampling, numbers: Tensor) -> LogitsProcessorList:
    if sampling.temperature == 0:
        return LogitsProcessorList()
    chosen: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k is not None:
        chosen.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chosen.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*chosen, Draw(numbers)])


def _until_end(tokens: list[int], ends: set[int]) -> Written:
    stop = next((place for place, token in enumerate(tokens) if token in ends), None)
    return Written(tokens, ended=False) if stop is None else Written(tokens[: stop + 1], ended=True)
