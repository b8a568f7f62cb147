"""Calibrated DPO."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch.nn import functional

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs, PairObjective


class CalDpo(PairObjective):
    """Calibrated DPO, https://arxiv.org/abs/2412.14516, as the authors' code has it."""

    name: Literal["cal_dpo"]
    """The objective."""

    beta: PositiveFloat = 0.002
    """The logratios are pulled to plus and minus 1 / (2 beta); the authors' configuration for Zephyr has 0.002."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return cal_dpo(evidence.policy, evidence.reference, beta=self.beta)


def cal_dpo(policy: Logps, reference: Logps, *, beta: float) -> ObjectiveValue:
    """
    Calibrated DPO, https://arxiv.org/abs/2412.14516, as in scripts/dpo_trainer.py of github.com/tengxiao1/Cal-DPO:

        loss = -log sigmoid(logratio_chosen - logratio_rejected)
               + 1/2 * [ (logratio_chosen - 1 / (2 beta))^2 + (logratio_rejected + 1 / (2 beta))^2 ]
    """
    logratios = policy.logps - reference.logps
    target = 1 / (2 * beta)
    calibration = (logratios[:, 0] - target).square() + (logratios[:, 1] + target).square()
    losses = calibration / 2 - functional.logsigmoid(logratios[:, 0] - logratios[:, 1])
    return ObjectiveValue(losses, (beta * logratios).detach())
