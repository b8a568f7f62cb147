"""
What a model says about a pair. One package, because reference and policy must be measured by the same code.

    packing     pairs -> rows, in two layouts       models      files of a model, loading
    masks       the family's own masks, packed      families    what a family does with its config
    logps       hidden -> log-probs                 hookpoints  modules by name, their outputs
    scorer      the one forward pass                sae         activations; sae_formats reads the files
    check       is a model measured rightly         self_check  does the SAE fit the hookpoint
    features    pooled top k, column sets
"""

from scoring.check import choose_layout, extremes
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
from scoring.packing import Layout, Packed, pack
from scoring.sae import Sae, load_sae
from scoring.scorer import Scores, install_scoring

__all__ = [
    "LOGPS_TOLERANCE",
    "ColumnSet",
    "Layout",
    "Packed",
    "PooledFeatures",
    "Sae",
    "Scores",
    "SparseRows",
    "adapter_folder",
    "choose_layout",
    "extremes",
    "install_scoring",
    "load_model",
    "load_sae",
    "load_tokenizer",
    "look_up",
    "model_config",
    "model_folder",
    "pack",
    "policy_top",
    "pool_top_features",
    "reference_top",
    "sparse_rows",
    "sum_logps",
    "template_text",
    "union",
    "weight_files",
]
