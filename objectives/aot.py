"""Alignment by optimal transport, of paired data."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
from pydantic import PositiveFloat
from torch import Tensor

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue, smoothed_loss
from fpo.objectives.objective import LabelSmoothing, Needs, PairObjective


class Aot(PairObjective):
    """Alignment by optimal transport, paired, https://arxiv.org/abs/2406.05882; sorts the pairs of a forward."""

    name: Literal["aot"]
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the margin."""

    label_smoothing: LabelSmoothing = 0.0
    """Probability that chosen and rejected are the wrong way round."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=True)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return aot(evidence.policy, evidence.reference, beta=self.beta, label_smoothing=self.label_smoothing)


def aot(policy: Logps, reference: Logps, *, beta: float, label_smoothing: float) -> ObjectiveValue:
    """
    Alignment by optimal transport, paired, https://arxiv.org/abs/2406.05882: the policy's margins as a distribution
    above the reference's. With the pairs of the batch sorted by either, the k-th of one against the k-th of the other:

        u_k  = beta * (sorted(logps_chosen - logps_rejected)_k - sorted(ref_logps_chosen - ref_logps_rejected)_k)
        loss = -(1 - label_smoothing) * log sigmoid(u_k) - label_smoothing * log sigmoid(-u_k)

    A pair's loss is that of its policy margin. The batch is one forward of one process: how many pairs that are changes
    the loss, accumulation and more processes do not widen it, and a pair repeated to fill up an epoch's last forward
    takes part in the sorting.
    """
    own = policy.logps[:, 0] - policy.logps[:, 1]
    reference_margins = reference.logps[:, 0] - reference.logps[:, 1]
    u = beta * (own - reference_margins.sort().values[ranks(own)])
    rewards = beta * (policy.logps - reference.logps)
    return ObjectiveValue(smoothed_loss(u, label_smoothing), rewards.detach())


def ranks(values: Float[Tensor, " P"]) -> Int[Tensor, " P"]:
    """The place of each among all, sorted."""
    return values.argsort().argsort()
