"""
What a model says about a pair. One package, because reference and policy must be measured by the same code.

    packing     pairs -> rows, positions, mask      models      files of a model, loading
    logps       hidden -> log-probs                 hookpoints  modules by name, their outputs
    scorer      the one forward pass                sae         activations; sae_formats reads the files
    routers     load-balancing loss of experts
    features    pooled top k, column sets           self_check  does the SAE fit the hookpoint
"""

from scoring.features import (
    ColumnSet,
    PooledFeatures,
    SparseRows,
    look_up,
    policy_top,
    pool_top_features,
    reference_top,
    sparse_rows,
    union,
)
from scoring.logps import LOGPS_TOLERANCE, sum_logps
from scoring.models import (
    adapter_folder,
    load_model,
    load_tokenizer,
    model_config,
    model_folder,
    template_text,
    weight_files,
)
from scoring.packing import Packed, pack
from scoring.routers import router_coefficient
from scoring.sae import Sae, load_sae
from scoring.scorer import Scores, check_packing, install_scoring, mixed_precision

__all__ = [
    "LOGPS_TOLERANCE",
    "ColumnSet",
    "Packed",
    "PooledFeatures",
    "Sae",
    "Scores",
    "SparseRows",
    "adapter_folder",
    "check_packing",
    "install_scoring",
    "load_model",
    "load_sae",
    "load_tokenizer",
    "look_up",
    "mixed_precision",
    "model_config",
    "model_folder",
    "pack",
    "policy_top",
    "pool_top_features",
    "reference_top",
    "router_coefficient",
    "sparse_rows",
    "sum_logps",
    "template_text",
    "union",
    "weight_files",
]
