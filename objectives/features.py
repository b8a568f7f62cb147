"""
The feature term: its settings, which say what it asks of a cache, and its distance.

Dimension key:  C completions   K features
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor
from torch.nn import functional

from fpo.section import Section

FeatureSet = Literal["reference", "union", "policy"]
Distance = Literal["l2", "l1", "cosine"]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
Indices = Annotated[tuple[NonNegativeInt, ...], Field(strict=False)]


class FeatureTerm(Section):
    """A term that holds the rejected completion's features where the reference has them, see docs/objectives.md."""

    alpha: NonNegativeFloat = 0.5
    """Weight of the feature term; 0 never loads the SAE."""

    k: PositiveInt = 50
    """How many features a completion's distance is over; the sum is divided by k."""

    feature_set: FeatureSet = "reference"
    """Whose top k: the reference's (exact from any cache), both models' as in the paper, or the policy's."""

    hookpoints: Names | None = None
    """Which of the recipe's `features` are constrained, their distances added; null is the only one there is."""

    distance: Distance = "l2"
    """Mean square (the paper's), mean absolute difference, or one minus the cosine."""

    include: Indices | None = None
    """Features that count, of one hookpoint's SAE; null counts all. Others of the set weigh nothing."""

    exclude: Indices = ()
    """Features that do not count, of one hookpoint's SAE."""

    weights: dict[Annotated[int, Field(ge=0, strict=False)], NonNegativeFloat] = {}
    """What a feature of one hookpoint's SAE weighs, by its index; 1 where it is not named."""

    @model_validator(mode="after")
    def _check_indices(self) -> FeatureTerm:
        if self.picks and self.hookpoints is not None and len(set(self.hookpoints)) > 1:
            raise ValueError(
                "objective.features: include, exclude and weights name features of one SAE, and hookpoints are "
                f"{', '.join(self.hookpoints)}; name one hookpoint, or leave them out"
            )
        if self.include is not None:
            apart = sorted(set(self.weights) - set(self.include))
            if apart:
                raise ValueError(f"objective.features: weights name feature {apart[0]}, which include leaves out")
            if not any(self.weights.get(index, 1.0) for index in set(self.include) - set(self.exclude)):
                raise ValueError(
                    "objective.features: include, exclude and weights leave no feature that counts; alpha: 0 takes the "
                    "term away"
                )
        return self

    @property
    def picks(self) -> bool:
        """Whether features differ in what they weigh."""
        return self.include is not None or bool(self.exclude) or bool(self.weights)

    def exact_from(self, top_k: int | Literal["all"]) -> bool:
        """Whether `top_k` kept features per completion hold every reference activation that is asked for."""
        return top_k == "all" or (self.feature_set == "reference" and top_k >= self.k)

    def feature_weights(self, d_sae: int) -> Float[Tensor, " F"] | None:
        """What each of an SAE's features weighs; None where all weigh 1. Raises ValueError for one it does not have."""
        named = [*(self.include or ()), *self.exclude, *self.weights]
        if named and max(named) >= d_sae:
            raise ValueError(f"feature {max(named)} is named, the SAE has {d_sae}")
        if not self.picks:
            return None
        weights = torch.ones(d_sae) if self.include is None else torch.zeros(d_sae)
        weights[list(self.include or ())] = 1.0
        weights[list(self.weights)] *= torch.tensor(list(self.weights.values()), dtype=torch.float32)
        weights[list(self.exclude)] = 0.0
        return weights


def feature_distance(
    policy_acts: Float[Tensor, "C K"],
    reference_acts: Float[Tensor, "C K"],
    weights: Float[Tensor, "C K"],
    *,
    k: int,
    distance: Distance = "l2",
) -> Float[Tensor, " C"]:
    """
    Distance of pooled activations p of the policy and r of the reference over a set I of features:

        l2      D = (1/k) * sum over I of w (p - r)^2, Eq. 10 of https://arxiv.org/abs/2411.07618
        l1      D = (1/k) * sum over I of w |p - r|
        cosine  D = 1 - sum of w p r / sqrt( sum of w p^2 * sum of w r^2 ); 0 where either is nothing

    weights  w of each of the K columns, 0 where it does not belong to I
    k        the prefactor, also where I is smaller or (as a union) larger than k
    """
    if distance == "cosine":
        scale = weights.sqrt()
        ours, theirs = scale * policy_acts, scale * reference_acts
        nothing = ~(ours.any(-1) & theirs.any(-1))
        return (1 - functional.cosine_similarity(ours, theirs, dim=-1)).masked_fill(nothing, 0.0)
    apart = policy_acts - reference_acts
    sizes = apart.square() if distance == "l2" else apart.abs()
    return torch.where(weights > 0, weights * sizes, 0.0).sum(-1) / k
