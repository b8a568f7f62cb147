"""
Which token is of which completion, said without a question to the device: what depends on lengths is made from lengths
on the host, or has a shape that is known there.

Dimension key:  N tokens   R completions, back to back   T tokens of the longest
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


class TokenGrid(NamedTuple):
    """The tokens of completions as rows of equal length, which one product reads."""

    places: Int[Tensor, "R T"]
    """Which token; behind a completion's last one any other."""
    shares: Float[Tensor, "R T"]
    """What part of its completion's mean a token is: one over the length, 0 behind the last one."""
    lengths: Int[Tensor, " R"]
    """Tokens of each completion."""

    @classmethod
    def of(cls, lengths: Int[np.ndarray, " R"]) -> TokenGrid:
        """Of completions of these lengths."""
        column = np.arange(int(lengths.max(initial=0)))
        # What stands behind a row is read on into the next completions, so that backward adds its zeros far apart.
        places = ((np.cumsum(lengths) - lengths)[:, None] + column) % max(int(lengths.sum()), 1)
        shares = np.where(column < lengths[:, None], 1 / np.maximum(lengths, 1)[:, None], 0)
        return cls(*map(torch.from_numpy, (places, shares.astype(np.float32), np.asarray(lengths, dtype=np.int64))))


def owners(lengths: Int[Tensor, " R"], n_tokens: int) -> Int[Tensor, " N"]:
    """Which completion each of `n_tokens`, the sum of the lengths, is of."""
    rows = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(rows, lengths, output_size=n_tokens)
