"""Noise contrastive alignment of scored lists."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import PositiveFloat
from torch import Tensor

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import ListObjective, Needs


class InfoNca(ListObjective):
    """InfoNCA, Eq. 7 of https://arxiv.org/abs/2402.05369: the policy's choice among a group's is that of the scores."""

    name: Literal["info_nca"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of each logratio."""

    alpha: PositiveFloat = 1.0
    """Temperature of the scores: the smaller, the more the best one counts."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True, scores=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        assert evidence.present is not None
        return info_nca(
            evidence.policy,
            evidence.reference,
            evidence.scores,
            evidence.present,
            beta=self.beta,
            alpha=self.alpha,
        )


def info_nca(
    policy: Logps,
    reference: Logps,
    scores: Float[Tensor, "G n"],
    present: Bool[Tensor, "G n"],
    *,
    beta: float,
    alpha: float,
) -> ObjectiveValue:
    """
    InfoNCA, Eq. 7 of https://arxiv.org/abs/2402.05369, over the completions of a group, r = beta * logratio:

        loss = - sum of softmax(score / alpha) * log softmax(r)

    With two completions and an alpha towards 0 it is DPO.
    """
    rewards = (beta * (policy.logps - reference.logps)).masked_fill(~present, 0.0)
    wanted = (scores / alpha).masked_fill(~present, -torch.inf).softmax(-1)
    # Finite where there is no completion: 0 times minus infinity is not a number.
    chosen = rewards.masked_fill(~present, torch.finfo(rewards.dtype).min).log_softmax(-1)
    return ObjectiveValue(-torch.where(present, wanted * chosen, 0.0).sum(1), rewards.detach())
