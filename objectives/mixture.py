"""A weighted sum of objectives over pairs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from fpo.objectives.evidence import Evidence, ObjectiveValue
from fpo.objectives.features import FeatureTerm
from fpo.objectives.objective import Composable, Needs, PairObjective
from fpo.objectives.single import AnySingle

_SHARED = ("pairs", "features")


class Mixture(PairObjective):
    """A weighted sum of losses over the same pairs, as TRL's lists of `loss_type` with `loss_weights`."""

    name: Literal["mixture"]
    """The objective."""

    terms: Annotated[tuple[AnySingle, ...], Field(strict=False)]
    """The objectives, each with its own settings; `pairs` and `features` are the mixture's."""

    weights: Annotated[tuple[float, ...], Field(strict=False)] = ()
    """One weight per term, not normalised; none is 1 for each."""

    @model_validator(mode="after")
    def _check_terms(self) -> Mixture:
        if not self.terms:
            raise ValueError("objective.terms: a mixture of nothing; name at least one objective")
        if any(weight < 0 for weight in self.weights) or (self.weights and not any(self.weights)):
            raise ValueError(f"objective.weights: {list(self.weights)}; none is below 0, and one is above it")
        if self.weights and len(self.weights) != len(self.terms):
            raise ValueError(
                f"objective.weights: {len(self.weights)} weights for {len(self.terms)} terms; give one per term"
            )
        for place, term in enumerate(self.terms):
            for field in _SHARED:
                # A default may be spelled out, as the recipe of a run has it.
                if getattr(term, field, None) not in (None, "best_rest"):
                    raise ValueError(
                        f"objective.terms[{place}].{field}: a mixture's terms share one; set objective.{field}"
                    )
            if term.needs.features is not None:
                raise ValueError(
                    f"objective.terms[{place}]: {term.name} brings a feature term of its own; set alpha: 0 there, and "
                    "objective.features for the mixture"
                )
        if self.features is not None and not any(isinstance(term, Composable | FeatureTerm) for term in self.terms):
            raise ValueError("objective.features: no term of the mixture has a margin that a feature term could shift")
        return self

    @property
    def formula_needs(self) -> Needs:
        every = [vars(term.formula_needs) for term in self.terms]
        asked: dict[str, Any] = {
            field: any(needs[field] for needs in every) for field, value in every[0].items() if isinstance(value, bool)
        }
        return Needs(**asked)

    def value(self, evidence: Evidence) -> ObjectiveValue:
        """The weighted sum of the terms' losses; the rewards are the first term's."""
        values = [term.value(evidence) for term in self.terms]
        weights = self.weights or (1.0,) * len(values)
        losses = torch.stack([weight * value.losses for weight, value in zip(weights, values, strict=True)]).sum(0)
        return ObjectiveValue(losses, values[0].rewards)
