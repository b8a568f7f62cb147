"""
What a model says about a group. One package, because reference and policy must be measured by the same code.

    packing     groups -> rows, in three layouts    models      files of a model, loading; configs resolves config.json
    masks       what stands for a family's masks    families    what a family does with its config
    logps       hidden -> log-probs                 hookpoints  modules by name, their outputs
    scorer      the one forward pass                sae         activations; files of every format
    check       is a model measured rightly         self_check  does the SAE fit the hookpoint
    features    pooled top k, column sets           routers     load-balancing loss of experts
    virtual     soft prompts before the rows        attention   branches of a row
"""

from fpo.scoring.check import OwnLogits, choose_layout, extremes, logits_at
from fpo.scoring.configs import model_config, positions, significant_config
from fpo.scoring.families import silence_dropout
from fpo.scoring.features import (
    ColumnSet,
    Kept,
    KnownColumns,
    PooledFeatures,
    SparseRows,
    keep_top_features,
    look_up,
    policy_top,
    pool_top_features,
    reference_top,
    sparse_rows,
    union,
)
from fpo.scoring.hookpoints import unwrapped
from fpo.scoring.logps import LOGPS_TOLERANCE, sum_logps
from fpo.scoring.models import (
    adapter_folder,
    adapter_weight_files,
    is_quantised,
    load_model,
    load_tokenizer,
    model_folder,
    template_text,
    tower_modules,
    weight_files,
)
from fpo.scoring.packing import Layout, Packed, pack
from fpo.scoring.routers import router_coefficient
from fpo.scoring.sae import Sae, TokenGrid, load_sae
from fpo.scoring.scorer import Scores, install_scoring, mixed_precision, ordinary_forward

__all__ = [
    "LOGPS_TOLERANCE",
    "ColumnSet",
    "Kept",
    "KnownColumns",
    "Layout",
    "OwnLogits",
    "Packed",
    "PooledFeatures",
    "Sae",
    "Scores",
    "SparseRows",
    "TokenGrid",
    "adapter_folder",
    "adapter_weight_files",
    "choose_layout",
    "extremes",
    "install_scoring",
    "is_quantised",
    "keep_top_features",
    "load_model",
    "load_sae",
    "load_tokenizer",
    "logits_at",
    "look_up",
    "mixed_precision",
    "model_config",
    "model_folder",
    "ordinary_forward",
    "pack",
    "policy_top",
    "pool_top_features",
    "positions",
    "reference_top",
    "router_coefficient",
    "significant_config",
    "silence_dropout",
    "sparse_rows",
    "sum_logps",
    "template_text",
    "tower_modules",
    "union",
    "unwrapped",
    "weight_files",
]
