"""
Objectives, one file each: its settings, what it asks of a cache, its formula. Pure: no model, no store, no device.

    objective  what each of them is     pairs      what they see and give     trl_names  what TRL's users look for
    features   the feature term         dpo, simpo, fpo

`AnyObjective` is the registry: an objective that is listed there is a choice of `objective.name`, in the reference
page and in the errors. Nothing outside this folder knows an objective by name.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from fpo.objectives.dpo import Dpo
from fpo.objectives.features import FeatureNeed, feature_distance
from fpo.objectives.fpo import Fpo
from fpo.objectives.objective import Needs, Objective
from fpo.objectives.pairs import Evidence, ObjectiveValue, PairLogps
from fpo.objectives.simpo import Simpo

AnyObjective = Annotated[
    Dpo | Simpo | Fpo,
    Field(discriminator="name"),
]
OBJECTIVES: dict[str, type[Objective]] = {
    get_args(kind.model_fields["name"].annotation)[0]: kind for kind in get_args(get_args(AnyObjective)[0])
}
"""By name, in the order of the registry."""
DEFAULT_OBJECTIVE = Fpo(name="fpo")

__all__ = [
    "DEFAULT_OBJECTIVE",
    "OBJECTIVES",
    "AnyObjective",
    "Dpo",
    "Evidence",
    "FeatureNeed",
    "Fpo",
    "Needs",
    "Objective",
    "ObjectiveValue",
    "PairLogps",
    "Simpo",
    "feature_distance",
]
