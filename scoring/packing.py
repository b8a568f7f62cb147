"""
Pairs laid out in rows, in one of two layouts.

    packed  chosen and rejected share their prompt: a pair is one run of tokens `[prompt | chosen | rejected]`, its
            position ids start again after the prompt for the rejected branch, and whole pairs stand first-fit behind
            each other in rows no longer than the longest pair of the batch. Almost no token is padding, and every
            token is computed once.
    rows    each completion stands behind its prompt in a row of its own, padded on the right, as the family's own
            forward reads it. The prompt is computed twice; state-space, convolution and ALiBi families need it.

Which of them is right for a model, `check.choose_layout` finds out.

Dimension key:  P pairs   R rows   L row length   N scored completion tokens   C completions (2P)
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

PROMPT, CHOSEN, REJECTED = 0, 1, 2
PAD = -1


# (row, head, position of the query, position of the key) -> may look; broadcasts, as transformers' mask functions do.
Reach = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Layout(StrEnum):
    """How pairs become rows."""

    PACKED = "packed"
    ROWS = "rows"


class Packed(NamedTuple):
    """
    A batch of pairs as a model reads it. Completion c is `2 * pair + side`, side 0 chosen, 1 rejected.

    A completion token is scored where something precedes it: after an empty prompt the first token of each
    completion is not, as in TRL.
    """

    input_ids: Int[Tensor, "R L"]
    position_ids: Int[Tensor, "R L"]
    pair: Int[Tensor, "R S"]
    """Which pair a token belongs to, -1 is padding. S is L where a row holds many branches, 1 where it holds one."""
    branch: Int[Tensor, "R S"]
    """0 prompt, 1 chosen, 2 rejected; in a row of one completion its side."""
    predictors: Int[Tensor, " N"]
    """Flat position (row * L + column) whose output predicts the token; completion by completion."""
    targets: Int[Tensor, " N"]
    """The token that is predicted."""
    lengths: Int[Tensor, " C"]
    """Scored tokens of each completion; they sum to N."""

    @property
    def layout(self) -> Layout:
        """Told from the shapes alone, so that no step waits for the device; rows are never one token wide."""
        return Layout.PACKED if self.branch.shape == self.input_ids.shape else Layout.ROWS

    @property
    def completion(self) -> Int[Tensor, " N"]:
        """Which completion each scored token belongs to."""
        return torch.repeat_interleave(
            torch.arange(len(self.lengths), device=self.lengths.device),
            self.lengths,
            output_size=len(self.targets),
        )


def pack(
    input_ids: Integer[np.ndarray, " T"],
    splits: Integer[np.ndarray, " S"],
    layout: Layout = Layout.PACKED,
    pad_id: int | None = None,
) -> Packed:
    """
    Lay pairs out in rows.

    input_ids  (T,)      prompt, chosen, rejected of every pair, back to back
    splits     (3P+1,)   where each of them starts; the last is T
    pad_id               any token id; no scored token sees padding, and padding is not scored. None takes the batch's
                         first token: the embedding of a padding token may be zero, where a norm's gradient is NaN
    """
    starts = np.asarray(splits, dtype=np.int64)
    if pad_id is None:
        pad_id = int(input_ids[starts[0]]) if len(input_ids) > starts[0] else 0
    return (_share_prompts if layout is Layout.PACKED else _repeat_prompts)(input_ids, starts, pad_id)


def _share_prompts(input_ids: Integer[np.ndarray, " T"], starts: Integer[np.ndarray, " S"], pad_id: int) -> Packed:
    prompts, chosen, rejected = np.diff(starts).reshape(-1, 3).T
    sizes = prompts + chosen + rejected
    longest = int(sizes.max(initial=1))
    row_of, offset_of, n_rows = _first_fit(sizes, longest)
    width = _row_width(longest)

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


def _repeat_prompts(input_ids: Integer[np.ndarray, " T"], starts: Integer[np.ndarray, " S"], pad_id: int) -> Packed:
    # Row c holds completion c: the prompt, then the completion.
    prompts = np.repeat(np.diff(starts)[::3], 2)
    completions = np.delete(np.diff(starts).reshape(-1, 3), 0, axis=1).ravel()
    sizes = prompts + completions
    width = _row_width(int(sizes.max(initial=1)))
    row = np.repeat(np.arange(len(sizes)), sizes)
    column = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    inside = column - prompts[row]
    firsts = np.repeat(starts[:-1:3], 2), np.delete(starts[:-1].reshape(-1, 3), 0, axis=1).ravel()
    tokens = np.asarray(input_ids, dtype=np.int64)[
        np.where(inside < 0, firsts[0][row] + column, firsts[1][row] + inside)
    ]
    scored = (inside >= 0) & (column > 0)
    rows = np.full((max(len(sizes), 1), width), pad_id, dtype=np.int64)
    rows[row, column] = tokens
    positions = np.broadcast_to(np.arange(width), rows.shape)
    return Packed(
        input_ids=torch.from_numpy(rows),
        position_ids=torch.from_numpy(positions.copy()),
        pair=torch.from_numpy((np.arange(len(rows)) // 2).astype(np.int32)[:, None]),
        branch=torch.from_numpy((CHOSEN + np.arange(len(rows)) % 2).astype(np.int8)[:, None]),
        predictors=torch.from_numpy((row * width + column - 1)[scored]),
        targets=torch.from_numpy(tokens[scored]),
        lengths=torch.from_numpy(np.maximum(completions - (prompts == 0), 0)),
    )


def _row_width(longest: int) -> int:
    """A multiple of 8 keeps the attention mask aligned for the fused kernels."""
    return max(-(-longest // 8) * 8, 8)


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


def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A token sees what precedes it, and itself."""
    return key <= query


def attention_mask(
    pair: Int[Tensor, "R L"],
    branch: Int[Tensor, "R L"],
    position_ids: Int[Tensor, "R L"],
    reach: Reach = causal,
) -> Bool[Tensor, "R 1 L L"]:
    """
    True where the query (third axis) of a packed row may look at the key (last axis): same pair, the key in the prompt
    or on the query's own branch, and within the reach of the family's own mask, of which both positions are asked.
    Padding, which stands at position 0, looks at padding, so that no row of the softmax is empty.
    """
    rows = torch.arange(len(pair), device=pair.device)[:, None, None, None]
    queries, keys = position_ids[:, None, :, None], position_ids[:, None, None, :]
    # Nothing here is wider than a bool over (R, L, L): the positions are compared, never subtracted from each other.
    allowed = reach(rows, rows.new_zeros(1, 1, 1, 1), queries, keys)
    allowed = allowed & (pair[:, None, :, None] == pair[:, None, None, :])
    allowed &= (branch[:, None, None, :] == PROMPT) | (branch[:, None, :, None] == branch[:, None, None, :])
    return allowed
