"""What a forward computes in: two forwards of the same weights differ where these differ."""

from __future__ import annotations

from typing import Literal, NamedTuple

Dtype = Literal["float32", "bfloat16", "float16"]
HalfDtype = Literal["bfloat16", "float16"]
# Trainer arguments that train in mixed precision, and its dtype.
MIXED_PRECISION: dict[str, HalfDtype] = {"bf16": "bfloat16", "fp16": "float16"}


class Arithmetic(NamedTuple):
    """What a forward computes in. Two forwards of the same weights differ where these differ."""

    dtype: Dtype
    """Of the weights, and with them of the residual stream."""
    autocast: HalfDtype | None
    """What products are rounded to on the way (`torch.autocast`); None rounds nothing."""

    @property
    def precision(self) -> Dtype:
        """The coarser of the two: what tolerances go by."""
        return self.autocast or self.dtype

    def __str__(self) -> str:
        return self.dtype if self.autocast is None else f"{self.dtype} under {self.autocast} autocast"


def training_arithmetic(dtype: Dtype, mixed: HalfDtype | None, sharded: bool) -> Arithmetic:
    """
    What a forward in training computes in.

    dtype    of the policy's weights
    mixed    the mixed precision that Trainer runs with; None is none
    sharded  whether FSDP or DeepSpeed holds the weights: both compute with copies in the mixed precision's dtype
    """
    if mixed is not None and (sharded or mixed == dtype):
        return Arithmetic(mixed, None)
    return Arithmetic(dtype, mixed)
