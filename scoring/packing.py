"""
Pairs packed into rows. Chosen and rejected share their prompt, so a pair is one run of tokens
`[prompt | chosen | rejected]`, its position ids start again after the prompt for the rejected branch, and
whole pairs stand first-fit behind each other in rows no longer than the longest pair of the batch.
Almost no token is padding, and every token is computed once.

Dimension key:  P pairs   R rows   L row length   N scored completion tokens   C completions (2P)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

PROMPT, CHOSEN, REJECTED = 0, 1, 2
PAD = -1


class Packed(NamedTuple):
    """
    A batch of pairs as a model reads it. Completion c is `2 * pair + side`, side 0 chosen, 1 rejected.

    A completion token is scored where something precedes it: after an empty prompt the first token of each
    completion is not, as in TRL.
    """

    input_ids: Int[Tensor, "R L"]
    position_ids: Int[Tensor, "R L"]
    pair: Int[Tensor, "R L"]
    """Which pair a token belongs to; -1 is padding."""
    branch: Int[Tensor, "R L"]
    """0 prompt, 1 chosen, 2 rejected."""
    predictors: Int[Tensor, " N"]
    """Flat position (row * L + column) whose output predicts the token; completion by completion."""
    targets: Int[Tensor, " N"]
    """The token that is predicted."""
    lengths: Int[Tensor, " C"]
    """Scored tokens of each completion; they sum to N."""

    @property
    def completion(self) -> Int[Tensor, " N"]:
        """Which completion each scored token belongs to."""
        return torch.repeat_interleave(
            torch.arange(len(self.lengths), device=self.lengths.device),
            self.lengths,
            output_size=len(self.targets),
        )


def pack(input_ids: Integer[np.ndarray, " T"], splits: Integer[np.ndarray, " S"], pad_id: int = 0) -> Packed:
    """
    Pack pairs into rows.

    input_ids  (T,)      prompt, chosen, rejected of every pair, back to back
    splits     (3P+1,)   where each of them starts; the last is T
    pad_id               any valid token id; padding is never attended to nor scored
    """
    starts = np.asarray(splits, dtype=np.int64)
    prompts, chosen, rejected = np.diff(starts).reshape(-1, 3).T
    sizes = prompts + chosen + rejected
    longest = int(sizes.max(initial=1))
    row_of, offset_of, n_rows = _first_fit(sizes, longest)
    # A multiple of 8 keeps the attention mask aligned for the fused kernels.
    width = -(-longest // 8) * 8

    # Per token: its pair, its place in it, its branch, and its flat position in the rows.
    tokens = np.asarray(input_ids[starts[0] : starts[-1]], dtype=np.int64)
    pair = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(tokens)) - np.repeat(starts[:-1:3] - starts[0], sizes)
    branch = (place >= prompts[pair]).astype(np.int8) + (place >= (prompts + chosen)[pair])
    flat = (row_of * width + offset_of)[pair] + place
    position = place - np.where(branch == REJECTED, chosen[pair], 0)

    # The first token of either completion is predicted by the last prompt token, each other by its predecessor.
    scored = (branch != PROMPT) & (position > 0)
    first_rejected = (branch == REJECTED) & (position == prompts[pair])
    predictors = flat - 1 - np.where(first_rejected, chosen[pair], 0)
    lengths = np.maximum(np.stack([chosen, rejected], axis=1) - (prompts == 0)[:, None], 0)

    def in_rows(values: np.ndarray, fill: int, dtype: type[np.integer]) -> torch.Tensor:
        rows = np.full(n_rows * width, fill, dtype=dtype)
        rows[flat] = values
        return torch.from_numpy(rows.reshape(n_rows, width))

    return Packed(
        input_ids=in_rows(tokens, pad_id, np.int64),
        position_ids=in_rows(position, 0, np.int64),
        pair=in_rows(pair, PAD, np.int32),
        branch=in_rows(branch, PROMPT, np.int8),
        predictors=torch.from_numpy(predictors[scored]),
        targets=torch.from_numpy(tokens[scored]),
        lengths=torch.from_numpy(lengths.ravel()),
    )


def _first_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Row and offset of each pair: longest first, into the first row that has room (ties by position)."""
    row_of, offset_of = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
    used: list[int] = []
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        row = next((r for r, filled in enumerate(used) if filled + size <= capacity), len(used))
        if row == len(used):
            used.append(0)
        row_of[index], offset_of[index] = row, used[row]
        used[row] += size
    return row_of, offset_of, max(len(used), 1)


def attention_mask(
    pair: Int[Tensor, "R L"],
    branch: Int[Tensor, "R L"],
    position_ids: Int[Tensor, "R L"],
    sliding_window: int | None = None,
) -> Bool[Tensor, "R 1 L L"]:
    """
    True where the query (third axis) may look at the key (last axis): same pair, earlier or same, and the
    key in the prompt or on the query's own branch; within a sliding window, fewer than `sliding_window`
    position ids apart. Padding looks at earlier padding, so that no row of the softmax is empty.
    """
    length = pair.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=pair.device).tril()
    allowed = causal & (pair[:, :, None] == pair[:, None, :])
    allowed &= (branch[:, None, :] == PROMPT) | (branch[:, :, None] == branch[:, None, :])
    if sliding_window is not None:
        near = (position_ids[:, :, None] - position_ids[:, None, :]) < sliding_window
        allowed &= near | (pair[:, :, None] == PAD)
    return allowed[:, None]
