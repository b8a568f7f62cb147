"""What every objective is: a section of the recipe that says what it asks of a cache and gives a loss per pair."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fpo.objectives.features import FeatureNeed
from fpo.objectives.pairs import Evidence, ObjectiveValue
from fpo.section import Section

LabelSmoothing = Annotated[float, Field(ge=0, lt=0.5)]
"""Probability that a pair is the wrong way round; at a half the pairs would say nothing."""


@dataclass(frozen=True)
class Needs:
    """
    What an objective asks of a cache besides the tokens. The recipe is refused where its cache would not hold that,
    and training gathers nothing else.
    """

    reference: bool
    """Whether what the reference says enters the loss (`ref_logps` or features)."""
    features: FeatureNeed | None = None
    """What a feature term reads; None is no feature term."""
    scores: bool = False
    """Whether the data's scores of the completions enter the loss."""
    typicality: bool = False
    """Whether the policy's whole distributions enter the loss, as `Evidence.typicality` sums them up."""


Pairing = Literal["best_rest", "best_worst", "adjacent", "all"]


class Objective(Section):
    """What all objectives share; see docs/objectives.md for the formulas."""

    pairs: Pairing = "best_rest"
    """Which completions of a group of more than two are compared; all its pairs together count as one pair does."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What these settings ask of a cache."""

    @abstractmethod
    def value(self, evidence: Evidence) -> ObjectiveValue:
        """The objective's formula with these settings."""
