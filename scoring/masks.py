"""
What shared prompts need in the place of a family's masks.

A family says which tokens a layer sees by a function of two positions - causal, a window, a chunk - that it hands to
transformers' mask interface. While `branches_for` is open, that interface hands it on to the attention with where the
branches are; while `masks_for` is open, it makes masks of rows, asking the function about position ids instead of
places in the row. So windows and chunks come from what the family does with its config, layer by layer, and from
nothing that we read there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from fpo.scoring.attention import BRANCHED
from fpo.scoring.branches import Branches
from fpo.scoring.packing import Packed, Reach, attention_mask


@contextmanager
def masks_for(packed: Packed, width: int) -> Iterator[None]:
    """
    While open, every mask that a family builds is that of these rows.

    width  columns that look: the last ones, since a soft prompt's keys and values are only looked at
    """
    virtual = packed.n_virtual > 0

    def boolean(*, mask_function: Reach, **_: Any) -> Tensor:
        mask = attention_mask(packed.group, packed.branch, packed.position_ids, mask_function, virtual=virtual)
        return mask[:, :, -width:]

    def additive(*, mask_function: Reach, dtype: torch.dtype, **_: Any) -> Tensor:
        allowed = boolean(mask_function=mask_function)
        lowest = torch.finfo(dtype).min
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, lowest)

    with _instead({"sdpa": boolean, "eager": additive, BRANCHED["sdpa"]: boolean, BRANCHED["eager"]: additive}):
        yield


@contextmanager
def branches_for(packed: Packed, width: int) -> Iterator[None]:
    """
    While open, a family's attention is given Branches.

    width  as in `masks_for`
    Raises ValueError where the family does not call ours.
    """

    def branches(*, mask_function: Reach, **_: Any) -> Branches:
        return Branches(packed, mask_function, width)

    def refuse(**_: Any) -> None:
        raise ValueError("its attention is its own")

    with _instead({**dict.fromkeys(BRANCHED, refuse), **dict.fromkeys(BRANCHED.values(), branches)}):
        yield


@contextmanager
def _instead(makers: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Makers of masks, by implementation."""
    # Entries of this one object come before those that are registered, and are ours to take out again.
    for name, maker in makers.items():
        ALL_MASK_ATTENTION_FUNCTIONS[name] = maker
    try:
        yield
    finally:
        for name in makers:
            del ALL_MASK_ATTENTION_FUNCTIONS[name]
