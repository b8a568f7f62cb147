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
    bounds = np.stack([starts[:-1:3], starts[1::3], starts[2::3], starts[3::3]], axis=1)  # (P, 4)
    sizes = bounds[:, 3] - bounds[:, 0]
    row_of, offset_of, n_rows = _first_fit(sizes, int(sizes.max(initial=1)))
    # A multiple of 8 keeps the attention mask aligned for the fused kernels.
    width = -(-int(sizes.max(initial=1)) // 8) * 8

    ids = np.full((n_rows, width), pad_id, dtype=np.int64)
    positions = np.zeros((n_rows, width), dtype=np.int64)
    pair = np.full((n_rows, width), PAD, dtype=np.int32)
    branch = np.zeros((n_rows, width), dtype=np.int8)
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for index, (start, chosen, rejected, end) in enumerate(bounds):
        row, offset = row_of[index], offset_of[index]
        prompt_size = chosen - start
        span = slice(offset, offset + end - start)
        ids[row, span] = input_ids[start:end]
        pair[row, span] = index
        positions[row, span] = np.arange(end - start)
        base = row * width + offset - start  # flat position of input_ids[0], were it in this row
        for side, first, last in ((CHOSEN, chosen, rejected), (REJECTED, rejected, end)):
            here = slice(offset + first - start, offset + last - start)
            branch[row, here] = side
            positions[row, here] = prompt_size + np.arange(last - first)
            # The first token is predicted by the last prompt token, each other by its predecessor.
            before = np.arange(first, last) - 1
            if last > first:
                before[0] = chosen - 1
            unscored = 1 if prompt_size == 0 else 0
            predictors.append(base + before[unscored:])
            targets.append(np.asarray(input_ids[first + unscored : last], dtype=np.int64))
    lengths = np.array([len(part) for part in targets], dtype=np.int64)
    flat = np.concatenate(predictors) if predictors else np.empty(0, np.int64)
    return Packed(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        pair=torch.from_numpy(pair),
        branch=torch.from_numpy(branch),
        predictors=torch.from_numpy(flat.astype(np.int64)),
        targets=torch.from_numpy(np.concatenate(targets) if targets else np.empty(0, np.int64)),
        lengths=torch.from_numpy(lengths),
    )


def _first_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Row and offset of each pair: longest first, into the first row that has room (ties by position)."""
    row_of, offset_of = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
    used: list[int] = []
    for index in np.argsort(-sizes, kind="stable"):
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
