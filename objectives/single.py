"""The objectives over pairs that are one loss: what a mixture is made of."""

from __future__ import annotations

from typing import Annotated

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
from fpo.objectives.exo_pair import ExoPair
from fpo.objectives.fpo import Fpo
from fpo.objectives.hinge import Hinge
from fpo.objectives.ipo import Ipo
from fpo.objectives.ld_dpo import LdDpo
from fpo.objectives.nca_pair import NcaPair
from fpo.objectives.odpo import Odpo
from fpo.objectives.orpo import Orpo
from fpo.objectives.robust import Robust
from fpo.objectives.sail_dp import SailDp
from fpo.objectives.sampo import Sampo
from fpo.objectives.sft import Sft
from fpo.objectives.simpo import Simpo
from fpo.objectives.simpo_kl import SimpoKl
from fpo.objectives.sppo_hard import SppoHard
from fpo.objectives.tdpo1 import Tdpo1
from fpo.objectives.tdpo2 import Tdpo2
from fpo.objectives.wpo import Wpo

Single = (
    Dpo
    | Simpo
    | Fpo
    | Tdpo1
    | Tdpo2
    | SimpoKl
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
    | Asft
    | CalDpo
    | Odpo
    | Wpo
    | LdDpo
    | Sampo
    | Adpo
    | AdaDpo
    | SailDp
)
AnySingle = Annotated[Single, Field(discriminator="name")]
