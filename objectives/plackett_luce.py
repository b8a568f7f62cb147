"""DPO over ranked lists."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import PositiveFloat
from torch import Tensor

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import ListObjective, Needs


class PlackettLuce(ListObjective):
    """DPO under the Plackett-Luce model, Eq. 20 of https://arxiv.org/abs/2305.18290, of groups as ranked lists."""

    name: Literal["plackett_luce"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of each logratio."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        assert evidence.present is not None
        return plackett_luce(evidence.policy, evidence.reference, evidence.scores, evidence.present, beta=self.beta)


def plackett_luce(
    policy: Logps,
    reference: Logps,
    scores: Float[Tensor, "G n"],
    present: Bool[Tensor, "G n"],
    *,
    beta: float,
) -> ObjectiveValue:
    """
    DPO under the Plackett-Luce model, Eq. 20 of https://arxiv.org/abs/2305.18290, of completions from best to worst,
    r = beta * logratio:

        loss = - sum over k of log( exp(r_k) / sum over j >= k of exp(r_j) )

    Of completions with equal scores neither is better: none of them is in another's sum, so that only the order between
    different scores is learnt. A group of two is a pair, whatever its scores, and this is DPO.
    """
    rewards = (beta * (policy.logps - reference.logps)).masked_fill(~present, 0.0)
    place = torch.arange(rewards.shape[1], device=rewards.device)
    # (G, k, j): j is k, or stands behind it and is not as good; scores that say nothing (nan) leave it to the order.
    worse = ~(scores[:, None, :] >= scores[:, :, None]) & (place[:, None] < place) & present[:, None, :]
    sums = torch.where(worse | (place[:, None] == place), 0.0, -torch.inf)
    losses = (rewards[:, None, :] + sums).logsumexp(-1) - rewards
    return ObjectiveValue(losses.sum(1), rewards.detach())
