"""Which divergence from the reference an objective's rewards come from: f-DPO, https://arxiv.org/abs/2309.16240."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional

from fpo.objectives.objective import PairObjective

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

# exp(80) is finite in float32; beyond it the scores of both completions would be infinite and their margin nan.
_LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class Divergence:
    """A divergence by its derivative f', which takes the place of the logarithm in the implicit reward."""

    kind: FDivergence = "reverse_kl"
    alpha: float = 0.5
    """Of the alpha-divergence alone."""

    def scores(self, logratios: Float[Tensor, "P 2"]) -> Float[Tensor, "P 2"]:
        """
        f'(u) at u = exp(logratio):

            reverse_kl        log u
            forward_kl        1 - 1/u
            js_divergence     log(2u / (1 + u))
            alpha_divergence  (u^(alpha - 1) - 1) / (alpha - 1), which is log u at alpha = 1
        """
        if self.kind == "reverse_kl" or (self.kind == "alpha_divergence" and self.alpha == 1):
            return logratios
        if self.kind == "js_divergence":
            return math.log(2) + functional.logsigmoid(logratios)
        # The forward KL is the alpha-divergence of alpha = 0.
        power = (self.alpha if self.kind == "alpha_divergence" else 0.0) - 1
        return (power * logratios).clamp(max=_LARGEST_EXPONENT).expm1() / power

    def margin(self, logratios: Float[Tensor, "P 2"]) -> Float[Tensor, " P"]:
        """How much more of it the chosen completion has than the rejected one."""
        scores = self.scores(logratios)
        return scores[:, 0] - scores[:, 1]


REVERSE_KL = Divergence()


class MarginObjective(PairObjective):
    """
    What objectives share that see the margin of the two completions' rewards alone. Another divergence leaves a term in
    each reward that depends on the prompt, and only the margin is free of it.
    """

    name: str
    """The objective."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference: scale of the margin."""

    f_divergence_type: FDivergence = "reverse_kl"
    """Divergence from the reference that the rewards come from; `reverse_kl` takes them as logratios."""

    f_alpha_divergence_coef: float = 0.5
    """Alpha of the `alpha_divergence`; 1 is `reverse_kl`, 0 is `forward_kl`."""

    @property
    def divergence(self) -> Divergence:
        """The two fields as one."""
        return Divergence(self.f_divergence_type, self.f_alpha_divergence_coef)
