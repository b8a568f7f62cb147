"""
Groups laid out in rows, in one of three layouts. A group is a prompt with one or more completions.

    packed  the completions of a group share their prompt: a group is one run of tokens
            `[prompt | completion 1 | completion 2 | ...]`, its position ids start again after the prompt for every
            completion, and all groups stand behind each other in one row without padding. Every token is computed
            once; what a token sees is left to the attention, which works branch by branch (see `attention`).
    masked  the same runs of tokens, first-fit in rows no longer than the longest group of the batch, under a mask of
            each row: for families with an attention of their own. Few tokens are padding.
    rows    each completion stands behind its prompt in a row of its own, padded on the right, as the family's own
            forward reads it. The prompt is computed once per completion; state-space, convolution and ALiBi families
            need it.

Which of them is right for a model, `check.choose_layout` finds out.

Dimension key:  T tokens   S segments (prompts and completions)   G groups   C completions   N scored completion tokens
                R rows   L row length   A tokens asked for beside each scored one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer, Shaped
from torch import Tensor

PROMPT = 0
PAD = -1
VIRTUAL = -2
"""Among the groups: a soft prompt's tokens, which all groups of their row see (see `virtual`)."""


# (row, head, position of the query, position of the key) -> may look; broadcasts, as transformers' mask functions do.
Reach = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Layout(StrEnum):
    """How groups become rows."""

    PACKED = "packed"
    MASKED = "masked"
    ROWS = "rows"


class Packed(NamedTuple):
    """
    A batch of groups as a model reads it. Completions are numbered through the batch, group after group.

    A completion token is scored where something precedes it: after an empty prompt the first token of each
    completion is not, as in TRL. A scored token counts where the score mask does not say otherwise.
    """

    input_ids: Int[Tensor, "R L"]
    position_ids: Int[Tensor, "R L"]
    group: Int[Tensor, "R W"]
    """Which group a token belongs to, -1 is padding. W is L where a row holds many branches, 1 where it holds one."""
    branch: Int[Tensor, "R W"]
    """0 prompt, 1 to n the group's completions; in a row of one completion which one it is."""
    predictors: Int[Tensor, " N"]
    """Flat position (row * L + column) whose output predicts the token; completion by completion."""
    targets: Int[Tensor, " N"]
    """The token that is predicted."""
    lengths: Int[Tensor, " C"]
    """Scored tokens of each completion; they sum to N."""
    counted: Int[Tensor, " counted"]
    """Places among the scored tokens of those that count, ascending."""
    counts: Int[Tensor, " C"]
    """How many of them each completion has."""
    prompt_predictors: Int[Tensor, " prompt_tokens"]
    """Flat positions that predict a prompt's own tokens, group by group; none unless prompts were asked for."""
    prompt_lengths: Int[Tensor, " G"]
    """How many of them each group has; empty unless prompts were asked for."""
    asked: Int[Tensor, "N A"]
    """Further tokens whose log-prob is asked for in the place of each scored one; (N, 0) asks for none."""
    sizes: tuple[tuple[int, ...], ...]
    """Tokens of each group's prompt and completions, on the host, where all groups stand in one row; else empty."""

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Packed:
        """Its fields among those of a batch."""
        fields: dict[str, Any] = {name: batch[name] for name in cls._fields}
        return cls(**fields)

    @property
    def layout(self) -> Layout:
        """Told from the shapes alone, so that no step waits for the device; rows are never one token wide."""
        if self.sizes:
            return Layout.PACKED
        return Layout.MASKED if self.branch.shape == self.position_ids.shape else Layout.ROWS

    @property
    def n_virtual(self) -> int:
        """Tokens of the soft prompt that the rows stand behind (see `virtual.behind`)."""
        return self.position_ids.shape[1] - self.input_ids.shape[1]

    def to(self, device: torch.device) -> Packed:
        """On a device, all but what the host must know."""
        moved: dict[str, Any] = {
            name: field.to(device) for name, field in self._asdict().items() if isinstance(field, Tensor)
        }
        return self._replace(**moved)

    @property
    def n_tokens(self) -> int:
        """Tokens that are no padding, as they are computed: to be asked before the batch is on a device."""
        if self.layout is not Layout.ROWS:
            return int((self.group >= 0).sum())
        # A row ends with the token that its completion's last predictor predicts.
        last = self.predictors[self.lengths.cumsum(0)[self.lengths > 0] - 1] % self.input_ids.shape[1]
        return int((last + 2).sum())

    @property
    def completion(self) -> Int[Tensor, " N"]:
        """Which completion each scored token belongs to."""
        return torch.repeat_interleave(
            torch.arange(len(self.lengths), device=self.lengths.device),
            self.lengths,
            output_size=len(self.targets),
        )

    def counting(self, scored: Shaped[Tensor, "N ..."]) -> Shaped[Tensor, "counted ..."]:
        """Of one value per scored token, those of the tokens that count."""
        return scored if len(self.counted) == len(self.targets) else scored[self.counted]


class _Segments(NamedTuple):
    """Where the prompts and completions of a batch stand in its tokens, and whose they are."""

    tokens: Int[np.ndarray, " T"]
    starts: Int[np.ndarray, " S"]
    sizes: Int[np.ndarray, " S"]
    group: Int[np.ndarray, " S"]
    branch: Int[np.ndarray, " S"]
    prompts: Int[np.ndarray, " G"]
    """Which segment is each group's prompt."""
    completions: Int[np.ndarray, " C"]
    """Which segments are completions."""
    n_completions: Int[np.ndarray, " G"]

    @property
    def prompt_sizes(self) -> Int[np.ndarray, " G"]:
        """Tokens of each group's prompt."""
        sizes: np.ndarray = self.sizes[self.prompts]
        return sizes

    @property
    def scored(self) -> Int[np.ndarray, " C"]:
        """Scored tokens of each completion."""
        empty = self.prompt_sizes[self.group[self.completions]] == 0
        scored: np.ndarray = np.maximum(self.sizes[self.completions] - empty, 0)
        return scored

    def by_group(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each group's prompt and completions."""
        return tuple(tuple(part.tolist()) for part in np.split(self.sizes, self.prompts[1:]))


class _Rows(NamedTuple):
    """Segments laid out: what the model reads, and the flat positions of what it is asked about."""

    input_ids: Int[np.ndarray, "R L"]
    position_ids: Int[np.ndarray, "R L"]
    group: Int[np.ndarray, "R W"]
    branch: Int[np.ndarray, "R W"]
    predictors: Int[np.ndarray, " N"]
    targets: Int[np.ndarray, " N"]
    origins: Int[np.ndarray, " G"]
    """Flat position of each group's first token."""


def pack(
    input_ids: Integer[np.ndarray, " T"],
    splits: Integer[np.ndarray, " S1"],
    n_completions: Integer[np.ndarray, " G"],
    layout: Layout = Layout.PACKED,
    *,
    score_mask: Integer[np.ndarray, " N"] | None = None,
    prompts: bool = False,
    asked: Integer[np.ndarray, "N A"] | None = None,
    pad_id: int | None = None,
) -> Packed:
    """
    Lay groups out in rows.

    input_ids      (T,)      prompt, then its completions, back to back, group after group
    splits         (G+C+1,)  where each of these segments starts; the last is T
    n_completions  (G,)      completions of each group, one or more
    score_mask     (N,)      per scored token, completion by completion: 0 does not count. None: all count
    prompts        whether to ask about the prompts' own tokens, too
    asked          (N, A)    further tokens to ask about in the place of each scored one; None: none
    pad_id         any token id; no scored token sees padding, and padding is not scored. None takes the batch's
                   first token: the embedding of a padding token may be zero, where a norm's gradient is NaN
    """
    segments = _segments(input_ids, splits, n_completions)
    if pad_id is None:
        pad_id = int(segments.tokens[0]) if len(segments.tokens) else 0
    one_row = layout is Layout.PACKED and len(segments.prompts) > 0
    if layout is Layout.ROWS:
        rows = _repeat_prompts(segments, pad_id)
    else:
        rows = _share_prompts(segments, pad_id, one_row=one_row)
    lengths = segments.scored
    counted, counts = _counted(lengths, score_mask)
    own = np.maximum(segments.prompt_sizes - 1, 0) if prompts else np.zeros(0, np.int64)
    predictors = _runs(rows.origins, own) if prompts else own
    further = np.zeros((len(rows.targets), 0), np.int64) if asked is None else np.asarray(asked, dtype=np.int64)
    if len(further) != len(rows.targets):
        raise ValueError(f"tokens are asked for at {len(further)} places, the groups have {len(rows.targets)} scored")
    arrays = (*rows[:-1], lengths, counted, counts, predictors, own, further)
    tensors = dict(zip(Packed._fields, map(torch.from_numpy, arrays), strict=False))
    return Packed.of({**tensors, "sizes": segments.by_group() if one_row else ()})


def _segments(input_ids: np.ndarray, splits: np.ndarray, n_completions: np.ndarray) -> _Segments:
    bounds, n = np.asarray(splits, dtype=np.int64), np.asarray(n_completions, dtype=np.int64)
    if len(bounds) != len(n) + n.sum() + 1:
        raise ValueError(
            f"{len(n)} groups of {n.sum()} completions have {len(n) + n.sum() + 1} splits, not {len(bounds)}"
        )
    group = np.repeat(np.arange(len(n)), n + 1)
    prompts = np.cumsum(n + 1) - (n + 1)
    branch = np.arange(len(group)) - prompts[group]
    return _Segments(
        tokens=np.asarray(input_ids[bounds[0] : bounds[-1]], dtype=np.int64),
        starts=bounds[:-1] - bounds[0],
        sizes=np.diff(bounds),
        group=group,
        branch=branch,
        prompts=prompts,
        completions=np.flatnonzero(branch),
        n_completions=n,
    )


def _share_prompts(segments: _Segments, pad_id: int, *, one_row: bool) -> _Rows:
    starts, sizes, group, branch = segments.starts, segments.sizes, segments.group, segments.branch
    first = starts[segments.prompts]
    totals = np.diff(np.append(first, len(segments.tokens)))
    if one_row:
        row_of, offset_of, n_rows, width = np.zeros_like(first), first, 1, len(segments.tokens)
    else:
        longest = int(totals.max(initial=1))
        row_of, offset_of, n_rows = _first_fit(totals, longest)
        width = _row_width(longest)
    origins = row_of * width + offset_of

    # Per token: its flat position in the rows, its branch, and its position, which every branch counts from its prompt.
    place = np.arange(len(segments.tokens))
    flat = place + np.repeat(origins - first, totals)
    prompt_of = segments.prompt_sizes[group]
    position = place - np.repeat(starts - np.where(branch == PROMPT, 0, prompt_of), sizes)
    branch_of = np.repeat(branch, sizes)

    # The last prompt token predicts the first token of every completion, any other token predicts the next.
    predictors = flat - 1
    begun = segments.completions[sizes[segments.completions] > 0]
    predictors[starts[begun]] = origins[group[begun]] + prompt_of[begun] - 1
    scored = (branch_of != PROMPT) & (position > 0)

    def in_rows(values: np.ndarray, fill: int, dtype: type[np.integer]) -> np.ndarray:
        rows = np.full(n_rows * width, fill, dtype=dtype)
        rows[flat] = values
        return rows.reshape(n_rows, width)

    return _Rows(
        input_ids=in_rows(segments.tokens, pad_id, np.int64),
        position_ids=in_rows(position, 0, np.int64),
        group=in_rows(np.repeat(group, sizes), PAD, np.int32),
        branch=in_rows(branch_of, PROMPT, np.int16),
        predictors=predictors[scored],
        targets=segments.tokens[scored],
        origins=origins,
    )


def _repeat_prompts(segments: _Segments, pad_id: int) -> _Rows:
    # Row c holds completion c: the prompt, then the completion.
    own = segments.completions
    group = segments.group[own]
    prompt_of = segments.prompt_sizes[group]
    sizes = prompt_of + segments.sizes[own]
    width = _row_width(int(sizes.max(initial=1)))
    row = np.repeat(np.arange(len(sizes)), sizes)
    column = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    inside = column - prompt_of[row]
    prompt_start = segments.starts[segments.prompts][group]
    tokens = segments.tokens[np.where(inside < 0, prompt_start[row] + column, segments.starts[own][row] + inside)]
    scored = (inside >= 0) & (column > 0)
    # A batch of no groups is one row of padding.
    shape = max(len(sizes), 1), width
    rows = np.full(shape, pad_id, dtype=np.int64)
    rows[row, column] = tokens
    return _Rows(
        input_ids=rows,
        position_ids=np.tile(np.arange(width), (len(rows), 1)),
        group=(group if len(group) else np.array([PAD])).astype(np.int32)[:, None],
        branch=(segments.branch[own] if len(own) else np.array([PROMPT])).astype(np.int16)[:, None],
        predictors=(row * width + column - 1)[scored],
        targets=tokens[scored],
        origins=(np.cumsum(segments.n_completions) - segments.n_completions) * width,
    )


def _counted(lengths: np.ndarray, score_mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Places of the scored tokens that count, and how many of them each completion has."""
    n_scored = int(lengths.sum())
    if score_mask is None:
        return np.arange(n_scored), lengths.copy()
    if len(score_mask) != n_scored:
        raise ValueError(f"the score mask has {len(score_mask)} entries, the groups have {n_scored} scored tokens")
    before = np.append(0, np.cumsum(score_mask != 0))
    ends = np.cumsum(lengths)
    return np.flatnonzero(score_mask), before[ends] - before[ends - lengths]


def _runs(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """`sizes` consecutive numbers from each start on, back to back."""
    numbers: np.ndarray = np.arange(sizes.sum()) + np.repeat(starts - np.cumsum(sizes) + sizes, sizes)
    return numbers


def _row_width(longest: int) -> int:
    """A multiple of 8 keeps the attention mask aligned for the fused kernels."""
    return max(-(-longest // 8) * 8, 8)


def _first_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Row and offset of each group: longest first, into the first row that has room (ties by position)."""
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
    group: Int[Tensor, "R L"],
    branch: Int[Tensor, "R L"],
    position_ids: Int[Tensor, "R L"],
    reach: Reach = causal,
    *,
    virtual: bool = False,
) -> Bool[Tensor, "R 1 L L"]:
    """
    True where the query (third axis) of a packed row may look at the key (last axis): same group, the key in the prompt
    or on the query's own branch, and within the reach of the family's own mask, of which both positions are asked.
    Padding, which stands where a group begins, looks at padding, so that no row of the softmax is empty.

    virtual  whether rows begin with tokens of the group VIRTUAL, which every group may look at
    """
    rows = torch.arange(len(group), device=group.device)[:, None, None, None]
    queries, keys = position_ids[:, None, :, None], position_ids[:, None, None, :]
    # Nothing here is wider than a bool over (R, L, L): the positions are compared, never subtracted from each other.
    allowed = reach(rows, rows.new_zeros(1, 1, 1, 1), queries, keys)
    shared = group[:, None, :, None] == group[:, None, None, :]
    allowed = allowed & ((shared | (group == VIRTUAL)[:, None, None, :]) if virtual else shared)
    allowed &= (branch[:, None, None, :] == PROMPT) | (branch[:, None, :, None] == branch[:, None, None, :])
    return allowed
