"""The log-likelihood of the chosen completions: an objective of its own, and a term of others."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue
from fpo.objectives.objective import Needs, Paired


class Sft(Paired):
    """Supervised fine-tuning on the chosen completions; uses no reference."""

    name: Literal["sft"]
    """The objective."""

    @property
    def formula_needs(self) -> Needs:
        return Needs(reference=False)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        return sft(evidence.policy, evidence.lengths)


def sft(policy: Logps, lengths: Float[Tensor, "P 2"]) -> ObjectiveValue:
    """
    Mean negative log-likelihood of the chosen completions' tokens over the pairs of a forward:

        loss = -logps_chosen * pairs / (sum over the pairs of length_chosen)

    so that the mean over pairs is the mean over tokens, as in TRL. It is taken forward by forward: under accumulation
    and with several processes, a token counts the more the fewer its forward has. The mean log-probs are the rewards.
    """
    pairs = len(lengths)
    losses = -policy.logps[:, 0] * pairs / lengths[:, 0].sum()
    return ObjectiveValue(losses, policy.mean_logps.detach())
