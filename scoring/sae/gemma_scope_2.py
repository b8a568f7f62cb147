"""Gemma Scope 2, the SAEs of Gemma 3: the encoder of Gemma Scope, in safetensors, with a configuration."""

from __future__ import annotations

from fpo.scoring.sae.gemma_scope import GemmaScope


class GemmaScope2(GemmaScope):
    """As Gemma Scope; hookpoint, L0 and kind stand in `config.json`, which some folders lack, else in the path."""

    name = "gemma_scope_2"
    title = "Gemma Scope 2"
    weights = "params.safetensors"
