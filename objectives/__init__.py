"""
Objectives, one file each: its settings, what it asks of a cache, its formula. Pure: no model, no store, no device.

    objective   what each of them is                pairs       what they see and give
    features    the feature term                    divergence  what takes the logratio's place in a margin
    trl_names   what TRL's users look for           the rest    an objective each

`AnyObjective` is the registry: an objective that is listed there is a choice of `objective.name`, in the reference
page and in the errors. Nothing outside this folder knows an objective by name.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from fpo.objectives.aot import Aot
from fpo.objectives.aot_unpaired import AotUnpaired
from fpo.objectives.apo_down import ApoDown
from fpo.objectives.apo_zero import ApoZero
from fpo.objectives.bco_pair import BcoPair
from fpo.objectives.cal_dpo import CalDpo
from fpo.objectives.cpo import Cpo
from fpo.objectives.discopop import Discopop
from fpo.objectives.dpo import Dpo
from fpo.objectives.exo_pair import ExoPair
from fpo.objectives.features import FeatureNeed, feature_distance
from fpo.objectives.fpo import Fpo
from fpo.objectives.hinge import Hinge
from fpo.objectives.ipo import Ipo
from fpo.objectives.nca_pair import NcaPair
from fpo.objectives.objective import Needs, Objective, Pairing
from fpo.objectives.odpo import Odpo
from fpo.objectives.orpo import Orpo
from fpo.objectives.pairs import Evidence, ObjectiveValue, PairLogps
from fpo.objectives.robust import Robust
from fpo.objectives.sft import Sft
from fpo.objectives.simpo import Simpo
from fpo.objectives.sppo_hard import SppoHard
from fpo.objectives.wpo import Wpo

AnyObjective = Annotated[
    Dpo
    | Simpo
    | Fpo
    | Hinge
    | Ipo
    | ExoPair
    | NcaPair
    | Robust
    | BcoPair
    | SppoHard
    | Aot
    | AotUnpaired
    | ApoZero
    | ApoDown
    | Discopop
    | Sft
    | Cpo
    | Orpo
    | CalDpo
    | Odpo
    | Wpo,
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
    "Aot",
    "AotUnpaired",
    "ApoDown",
    "ApoZero",
    "BcoPair",
    "CalDpo",
    "Cpo",
    "Discopop",
    "Dpo",
    "Evidence",
    "ExoPair",
    "FeatureNeed",
    "Fpo",
    "Hinge",
    "Ipo",
    "NcaPair",
    "Needs",
    "Objective",
    "ObjectiveValue",
    "Odpo",
    "Orpo",
    "PairLogps",
    "Pairing",
    "Robust",
    "Sft",
    "Simpo",
    "SppoHard",
    "Wpo",
    "feature_distance",
]
