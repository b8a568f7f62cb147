"""
The feature term: what it asks of a cache, and its distance.

Dimension key:  C completions (chosen before rejected, pair by pair)   K features
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FeatureSet = Literal["reference", "union", "policy"]


@dataclass(frozen=True)
class FeatureNeed:
    """The reference's pooled activations at one hookpoint."""

    hookpoint: str | None
    """Which of the recipe's `features`; None is the only one there is."""
    k: int
    """How many features per completion."""
    feature_set: FeatureSet
    """Whose top k they are."""
    waived_by: str
    """The setting with which the objective asks for no features, as an error names it: `alpha: 0`."""

    def exact_from(self, top_k: int | Literal["all"]) -> bool:
        """Whether `top_k` kept features per completion hold every reference activation that is asked for."""
        return top_k == "all" or (self.feature_set == "reference" and top_k >= self.k)


def feature_distance(
    policy_acts: Float[Tensor, "C K"],
    reference_acts: Float[Tensor, "C K"],
    valid: Bool[Tensor, "C K"],
    *,
    k: int,
) -> Float[Tensor, " C"]:
    """
    Distance of pooled activations, Eq. 10 of https://arxiv.org/abs/2411.07618:

        D = (1/k) * sum over I of (policy_act - reference_act)^2

    valid  which of the K columns belong to the set I
    k      the prefactor, also where I is smaller or (as a union) larger than k
    """
    squares = (policy_acts - reference_acts).square()
    return torch.where(valid, squares, 0.0).sum(-1) / k
