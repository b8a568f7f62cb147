"""
Sparse autoencoders: files of every format, read into one canonical encoder.

    encoder    the encoder in torch         formats    which format a source has
    arrays     the canonical encoder        format     what a format answers; one module for each format
    files      found here or on the hub     tensors    shapes and values in a weights file
    grid       which token is whose         page       docs/saes.md
    saelens_registry    SAEs by their names in SAELens' registry
"""

from fpo.scoring.sae.arrays import Decoder, SaeArrays, SaeFacts
from fpo.scoring.sae.encoder import MEMORY_BUDGET, Sae, load_sae
from fpo.scoring.sae.formats import (
    read_decoder,
    read_sae,
    sae_config,
    sae_facts,
    sae_weight_files,
    sae_weights_digest,
)
from fpo.scoring.sae.grid import TokenGrid, owners

__all__ = [
    "MEMORY_BUDGET",
    "Decoder",
    "Sae",
    "SaeArrays",
    "SaeFacts",
    "TokenGrid",
    "load_sae",
    "owners",
    "read_decoder",
    "read_sae",
    "sae_config",
    "sae_facts",
    "sae_weight_files",
    "sae_weights_digest",
]
