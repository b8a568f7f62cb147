"""Noise contrastive alignment."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch.nn import functional

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs, PairObjective


class NcaPair(PairObjective):
    """Noise contrastive alignment of pairs, https://arxiv.org/abs/2402.05369."""

    name: Literal["nca_pair"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of each logratio."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return nca_pair(evidence.policy, evidence.reference, beta=self.beta)


def nca_pair(policy: Logps, reference: Logps, *, beta: float) -> ObjectiveValue:
    """
    Noise contrastive alignment of a pair, https://arxiv.org/abs/2402.05369, r = beta * logratio:

        loss = -log sigmoid(r_chosen) - 1/2 log sigmoid(-r_chosen) - 1/2 log sigmoid(-r_rejected)
    """
    rewards = beta * (policy.logps - reference.logps)
    noise = functional.logsigmoid(-rewards).mean(1)
    return ObjectiveValue(-functional.logsigmoid(rewards[:, 0]) - noise, rewards.detach())
