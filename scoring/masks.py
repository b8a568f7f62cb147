"""
The attention mask of packed rows, from the family's own mask.

A family says which tokens a layer sees by a function of two positions - causal, a window, a chunk - that it hands to
transformers' mask interface. While `packed_masks` is open, that interface asks the function about position ids instead
of places in the row, and adds which branch a token stands on. So windows and chunks come from what the family does with
its config, layer by layer, and from nothing that we read there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from fpo.scoring.packing import Packed, Reach, attention_mask


@contextmanager
def packed_masks(packed: Packed, width: int) -> Iterator[None]:
    """
    While open, every mask that a family builds is that of these packed rows.

    width  columns that look: the last ones, since a soft prompt's keys and values are only looked at
    """
    virtual = packed.position_ids.shape != packed.input_ids.shape

    def boolean(*, mask_function: Reach, **_: Any) -> Tensor:
        mask = attention_mask(packed.group, packed.branch, packed.position_ids, mask_function, virtual=virtual)
        return mask[:, :, -width:]

    def additive(*, mask_function: Reach, dtype: torch.dtype, **_: Any) -> Tensor:
        allowed = boolean(mask_function=mask_function)
        lowest = torch.finfo(dtype).min
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, lowest)

    # Entries of this one object come before those that are registered, and are ours to take out again.
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = boolean
    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = additive
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        del ALL_MASK_ATTENTION_FUNCTIONS["eager"]
