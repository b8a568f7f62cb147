"""
Objectives, one file each: its settings, what it asks of a cache, its formula. Pure: no model, no store, no device.

    objective   what each of them is                evidence    what they see and give
    features    the feature term                    divergence  what takes the logratio's place in a margin
    token_kl    the divergence of distributions     trl_names   what TRL's users look for
    single      those that a mixture is made of     the rest    an objective each

`AnyObjective` is the registry: an objective that is listed there is a choice of `objective.name`, in the reference
page and in the errors. Nothing outside this folder knows an objective by name.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from fpo.objectives.ada_dpo import AdaDpo
from fpo.objectives.adpo import Adpo
from fpo.objectives.aot import Aot
from fpo.objectives.aot_unpaired import AotUnpaired
from fpo.objectives.apo_down import ApoDown
from fpo.objectives.apo_zero import ApoZero
from fpo.objectives.asft import Asft
from fpo.objectives.bco_pair import BcoPair
from fpo.objectives.cal_dpo import CalDpo
from fpo.objectives.cpo import Cpo
from fpo.objectives.discopop import Discopop
from fpo.objectives.dpo import Dpo
from fpo.objectives.evidence import Evidence, Logps, ObjectiveValue, Tokens
from fpo.objectives.exo_pair import ExoPair
from fpo.objectives.features import FeatureTerm, feature_distance
from fpo.objectives.fpo import Fpo
from fpo.objectives.hinge import Hinge
from fpo.objectives.info_nca import InfoNca
from fpo.objectives.ipo import Ipo
from fpo.objectives.kto import Kto
from fpo.objectives.ld_dpo import LdDpo
from fpo.objectives.mixture import Mixture
from fpo.objectives.nca_pair import NcaPair
from fpo.objectives.objective import Needs, Objective, Pairing, UnitKind
from fpo.objectives.odpo import Odpo
from fpo.objectives.orpo import Orpo
from fpo.objectives.plackett_luce import PlackettLuce
from fpo.objectives.robust import Robust
from fpo.objectives.sail_dp import SailDp
from fpo.objectives.sampo import Sampo
from fpo.objectives.sft import Sft
from fpo.objectives.simpo import Simpo
from fpo.objectives.simpo_kl import SimpoKl
from fpo.objectives.single import Single
from fpo.objectives.sppo_hard import SppoHard
from fpo.objectives.tdpo1 import Tdpo1
from fpo.objectives.tdpo2 import Tdpo2
from fpo.objectives.token_kl import token_kl
from fpo.objectives.wpo import Wpo

AnyObjective = Annotated[Single | Mixture | Kto | PlackettLuce | InfoNca, Field(discriminator="name")]
OBJECTIVES: dict[str, type[Objective]] = {
    get_args(kind.model_fields["name"].annotation)[0]: kind for kind in get_args(get_args(AnyObjective)[0])
}
"""By name, in the order of the registry."""
DEFAULT_OBJECTIVE = Fpo(name="fpo")

__all__ = [
    "DEFAULT_OBJECTIVE",
    "OBJECTIVES",
    "AdaDpo",
    "Adpo",
    "AnyObjective",
    "Aot",
    "AotUnpaired",
    "ApoDown",
    "ApoZero",
    "Asft",
    "BcoPair",
    "CalDpo",
    "Cpo",
    "Discopop",
    "Dpo",
    "Evidence",
    "ExoPair",
    "FeatureTerm",
    "Fpo",
    "Hinge",
    "InfoNca",
    "Ipo",
    "Kto",
    "LdDpo",
    "Logps",
    "Mixture",
    "NcaPair",
    "Needs",
    "Objective",
    "ObjectiveValue",
    "Odpo",
    "Orpo",
    "Pairing",
    "PlackettLuce",
    "Robust",
    "SailDp",
    "Sampo",
    "Sft",
    "Simpo",
    "SimpoKl",
    "SppoHard",
    "Tdpo1",
    "Tdpo2",
    "Tokens",
    "UnitKind",
    "Wpo",
    "feature_distance",
    "token_kl",
]
