"""Binary classifier optimisation of pairs."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch.nn import functional

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs, PairObjective


class BcoPair(PairObjective):
    """Binary classifier optimisation of pairs, https://arxiv.org/abs/2404.04656, without its running mean, as TRL."""

    name: Literal["bco_pair"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of each logratio."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return bco_pair(evidence.policy, evidence.reference, beta=self.beta)


def bco_pair(policy: Logps, reference: Logps, *, beta: float) -> ObjectiveValue:
    """
    Binary classifier optimisation, https://arxiv.org/abs/2404.04656, of both completions, r = beta * logratio:

        loss = -log sigmoid(r_chosen) - log sigmoid(-r_rejected)

    The paper subtracts a running mean of rewards from each r, which is a state; like TRL 1.16, this takes it as 0.
    """
    rewards = beta * (policy.logps - reference.logps)
    losses = -functional.logsigmoid(rewards[:, 0]) - functional.logsigmoid(-rewards[:, 1])
    return ObjectiveValue(losses, rewards.detach())
