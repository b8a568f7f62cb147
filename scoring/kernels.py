"""
Attention over all branches of a row in one kernel, for GPUs, where a kernel for every branch costs more in launches
than in work.

    varlen  flash attention of unequal lengths: the keys of the branches behind each other, a prompt's once per branch.
            Half precision, and every token sees all that precedes it.
    flex    FlexAttention: a mask of blocks, computed from three small vectors. Any reach, soft caps and sinks.

Dimension key:  H heads   K key heads   T tokens of the row   L keys of the row   S keys of all branches   B branches
                D, E head sizes   P, Q blocks of queries and of keys
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import flex_attention as flexible

from fpo.scoring.branches import Branches
from fpo.scoring.packing import PROMPT, VIRTUAL

varlen_attn: Any = None
with suppress(ImportError):  # before torch 2.10
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn

BLOCK = 128
"""Tokens of a block of FlexAttention's mask."""

WIDEST_HEAD = 256
"""That flash attention takes."""


class Settings(NamedTuple):
    """What a family's layer asks of its attention."""

    scale: float | None
    softcap: float | None
    sinks: Float[Tensor, " H"] | None


Kernel = Callable[[Tensor, Tensor, Tensor, Branches, Settings], "Tensor | None"]
"""Query (1, H, T, D), key and value (1, K, L, D or E) -> (1, T, H, E), or None where this is nothing for the kernel."""


def varlen(query: Tensor, key: Tensor, value: Tensor, branches: Branches, settings: Settings) -> Tensor | None:
    """Flash attention over the branches, each query behind the last of its keys."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    plain = settings.softcap is None and settings.sinks is None and query.shape[-1] == value.shape[-1] <= WIDEST_HEAD
    if not (half and plain and _varlen_is_whole() and branches.reaches_all):
        return None
    runs = branches.kept("varlen", lambda: _runs(branches, query.device))
    keys, values = (states[0].transpose(0, 1).index_select(0, runs.places) for states in (key, value))
    output: Tensor = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        runs.queries,
        runs.keys,
        runs.most_queries,
        runs.most_keys,
        scale=settings.scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None]


@cache
def _varlen_is_whole() -> bool:
    """Whether torch's varlen_attn has what is asked of it: windows and grouped heads came after it."""
    return varlen_attn is not None and {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


class _Runs(NamedTuple):
    """The branches as flash attention reads them."""

    places: Int[Tensor, " S"]
    """Among the row's keys, those of every branch."""
    queries: Int[Tensor, " B1"]
    """Where each branch's begin; int32, as the kernel asks."""
    keys: Int[Tensor, " B1"]
    most_queries: int
    most_keys: int


def _runs(branches: Branches, device: torch.device) -> _Runs:
    seen = [branches.seen(branch) for branch in branches.branches]
    places = np.concatenate([np.arange(begin, end) for ranges in seen for begin, end in ranges])
    keys = [sum(end - begin for begin, end in ranges) for ranges in seen]
    queries = [branches.parts[branch.own] for branch in branches.branches]
    query_starts, key_starts = (
        _on(np.append(0, np.cumsum(sizes)).astype(np.int32), device) for sizes in (queries, keys)
    )
    return _Runs(_on(places, device), query_starts, key_starts, max(queries), max(keys))


def flex(query: Tensor, key: Tensor, value: Tensor, branches: Branches, settings: Settings) -> Tensor:
    """FlexAttention over the row, whose mask is computed block by block where a block has anything to see."""
    mask = branches.kept("flex", lambda: _block_mask(branches, query.shape[2], query.device))
    attend = flexible.flex_attention if query.device.type == "cpu" else _compiled_flex()
    cap = settings.softcap

    @no_type_check  # torch traces it, and the tests' checks with it
    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if cap is None else cap * torch.tanh(score / cap)

    wanted = None if settings.sinks is None else flexible.AuxRequest(lse=True)
    found = attend(
        query,
        key,
        value,
        score_mod=None if cap is None else capped,
        block_mask=mask,
        scale=settings.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=wanted,
    )
    if settings.sinks is None:
        output: Tensor = found.transpose(1, 2)
        return output
    # A sink takes its share of the softmax and gives nothing: exp(lse) / (exp(lse) + exp(sink)) is left.
    output, aux = found
    left = torch.sigmoid(aux.lse - settings.sinks.float()[:, None])
    return (output * left[..., None].to(output.dtype)).transpose(1, 2)


@cache
def _compiled_flex() -> Any:
    return torch.compile(flexible.flex_attention, dynamic=True)


def _block_mask(branches: Branches, tokens: int, device: torch.device) -> flexible.BlockMask:
    """
    Blocks in which a token may see one: from the branches' bounds, on the host. Within them the family's reach and
    whose the tokens are decide.
    """
    group, branch, place = (
        part[0] for part in (branches.packed.group, branches.packed.branch, branches.packed.position_ids)
    )
    first = len(place) - tokens  # a soft prompt's keys and values come before the row's tokens

    @no_type_check
    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query = query + first
        own = ((group[query] == group[key]) | (group[key] == VIRTUAL)) & (
            (branch[key] == PROMPT) | (branch[key] == branch[query])
        )
        return own & branches.reach(row, head, place[query], place[key])

    blocks = _blocks(branches, tokens, len(place))
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    counts = blocks.sum(1).astype(np.int32)
    return flexible.BlockMask.from_kv_blocks(
        _on(counts, device)[None, None],
        _on(order, device)[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(tokens, len(place)),
    )


def _blocks(branches: Branches, tokens: int, keys: int) -> Bool[np.ndarray, "P Q"]:
    """Which blocks of queries have something to see in which blocks of keys."""
    found = np.zeros((-(-tokens // BLOCK), -(-keys // BLOCK)), dtype=bool)
    starts = np.append(0, np.cumsum(branches.parts))
    for branch in branches.branches:
        rows = slice(starts[branch.own] // BLOCK, (starts[branch.own + 1] - 1) // BLOCK + 1)
        for begin, end in branches.seen(branch):
            if end > begin:
                found[rows, begin // BLOCK : (end - 1) // BLOCK + 1] = True
    # What stands later in the row is seen by nothing before it.
    last = np.minimum((np.arange(len(found)) + 1) * BLOCK, tokens) - 1 + keys - tokens
    found &= np.arange(found.shape[1])[None] * BLOCK <= last[:, None]
    return found


def _on(array: np.ndarray, device: torch.device) -> Tensor:
    """On a device, from pinned memory: the host does not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


ON_GPU: tuple[Kernel, ...] = (varlen,)
"""Asked in this order; what none of them takes is attended to branch by branch."""


def in_one_kernel(query: Tensor, key: Tensor, value: Tensor, branches: Branches, settings: Settings) -> Tensor | None:
    """On a GPU, the attention of the first kernel that takes it."""
    if query.device.type != "cuda":
        return None
    outputs = (kernel(query, key, value, branches, settings) for kernel in ON_GPU)
    return next((output for output in outputs if output is not None), None)
