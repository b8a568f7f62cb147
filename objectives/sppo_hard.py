"""Self-play preference optimisation with certain labels."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs, PairObjective


class SppoHard(PairObjective):
    """Self-play preference optimisation with win probabilities 1 and 0, Eq. 4.7 of https://arxiv.org/abs/2405.00675."""

    name: Literal["sppo_hard"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """The paper's 1 / eta: the logratios are pulled to plus and minus 1 / (2 beta)."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return sppo_hard(evidence.policy, evidence.reference, beta=self.beta)


def sppo_hard(policy: Logps, reference: Logps, *, beta: float) -> ObjectiveValue:
    """
    Self-play preference optimisation, Eq. 4.7 of https://arxiv.org/abs/2405.00675, with probability 1 that the chosen
    completion wins:

        loss = (logratio_chosen - 1 / (2 beta))^2 + (logratio_rejected + 1 / (2 beta))^2
    """
    logratios = policy.logps - reference.logps
    target = 1 / (2 * beta)
    losses = (logratios[:, 0] - target).square() + (logratios[:, 1] + target).square()
    return ObjectiveValue(losses, (beta * logratios).detach())
