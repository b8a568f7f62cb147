"""Llama Scope R1-Distill, of early 2025: OpenMOSS' format before it renamed its tensors, without the input's scale."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from fpo.errors import SaeError
from fpo.scoring.sae.arrays import SaeHeader
from fpo.scoring.sae.format import SaeFiles, positive_number
from fpo.scoring.sae.openmoss import OpenMoss

_FACTOR = "norm_scaling_factor"


class LlamaScopeR1(OpenMoss):
    """
    As OpenMOSS. What a `dataset-wise` norm multiplies the input by is `norm_scaling_factor` of `config.json`, which has
    to be copied there from SAELens' `pretrained_saes.yaml`; without it OpenMOSS' tensor says it, where there is one.
    """

    name = "llama_scope_r1"
    title = "Llama Scope R1-Distill"
    names: ClassVar = {
        "W_E": "encoder.weight",
        "b_E": "encoder.bias",
        "W_E_glu": "encoder_glu.weight",
        "b_E_glu": "encoder_glu.bias",
        "W_D": "decoder.weight",
        "b_D": "decoder.bias",
        "log_threshold": "log_jumprelu_threshold",
    }
    transposed = True

    def claims(self, files: SaeFiles) -> bool:
        """`encoder.weight` and `log_jumprelu_threshold`."""
        return {"encoder.weight", "log_jumprelu_threshold"} <= files.tensors.shapes.keys()

    def facts(self, files: SaeFiles) -> SaeHeader:
        header = super().facts(files)
        return replace(header, options={**header.options, _FACTOR: repr(files.config.get(_FACTOR))})

    def _check_dataset_scale(self, files: SaeFiles) -> None:
        if _FACTOR in files.config:
            self._dataset_scale(files)
        elif not any(name.startswith("dataset_average_activation_norm.") for name in files.tensors.shapes):
            raise SaeError(
                f"SAE {files.source}: nothing says what the input is multiplied by; add {_FACTOR} to config.json, from "
                f"this SAE's lines under llama_scope_r1_distill in SAELens' pretrained_saes.yaml"
            )
        else:
            super()._check_dataset_scale(files)

    def _dataset_scale(self, files: SaeFiles) -> float:
        if _FACTOR in files.config:
            return positive_number(files, _FACTOR, files.config[_FACTOR])
        return super()._dataset_scale(files)
