"""Llama Scope, the SAEs of Llama 3.1 8B of 2024: tensors as torch's linear layers name them, one threshold for all."""

from __future__ import annotations

import re
from math import sqrt
from typing import Any, ClassVar

import numpy as np

from fpo.scoring.hook_names import from_llama_scope, from_transformer_lens
from fpo.scoring.sae.arrays import Array, Decoder, SaeArrays, SaeFacts, SaeHeader, row_norms, unit_rows
from fpo.scoring.sae.format import Format, SaeFiles, check_config_sizes, positive_number

_ACTIVATIONS = ("jumprelu", "topk")
_NORMS = ("dataset-wise", "inference")


class LlamaScope(Format):
    """
    JumpReLU of the raw input, as the release's own code folds it: `h = n * (x @ W + b / s)` with the norms `n` of the
    decoder's columns and `s` the root of d_in over the mean norm of the training's inputs. SAELens applies the
    threshold without `n`: its values are `s / n` times these, feature by feature, and where `n` is not 1 others pass.
    """

    name = "llama_scope"
    title = "Llama Scope"
    weights = "checkpoints/final.safetensors"
    config = "hyperparams.json"
    needs_config = True
    refuses: ClassVar = {
        "a transcoder": "export it with SAELens, whose transcoders are read",
        "act_fn": f"supported: {' and '.join(_ACTIVATIONS)}, both with a jump_relu_threshold",
        "norm_activation": f"supported: {', '.join(_NORMS)}",
        "use_glu_encoder": "no SAE of Llama Scope has one",
    }

    def claims(self, files: SaeFiles) -> bool:
        """`encoder.weight` and `decoder.weight`."""
        return {"encoder.weight", "decoder.weight"} <= files.tensors.shapes.keys()

    def facts(self, files: SaeFiles) -> SaeHeader:
        config = files.config
        self._refuse_what_is_not_computed(files, config)
        d_sae, d_in = files.matrix("encoder.weight")
        check_config_sizes(files, d_in, d_sae, names=("d_model", "d_sae"))
        files.check_shapes({"encoder.bias": (d_sae,), "decoder.weight": (d_in, d_sae), "decoder.bias": (d_in,)})
        hook, top_k = config.get("hook_point_in"), config.get("top_k")
        return SaeHeader(
            SaeFacts(
                d_in=d_in,
                d_sae=d_sae,
                architecture="jumprelu",
                format=self.name,
                advertised_l0=float(top_k) if isinstance(top_k, int) else None,
                hook_hint=from_transformer_lens(hook) if isinstance(hook, str) else from_llama_scope(files.place),
            ),
            apply_b_dec_to_input=bool(config.get("apply_decoder_bias_to_pre_encoder")),
            rescale_acts_by_decoder_norm=bool(config.get("sparsity_include_decoder_norm", True)),
            options={
                "jump_relu_threshold": repr(_threshold(files)),
                "scale_in": repr(_input_scale(files, "in", d_in)),
                "scale_out": repr(_input_scale(files, "out", d_in)),
            },
        )

    def read(self, files: SaeFiles) -> SaeArrays:
        header, tensors = self.facts(files), files.tensors
        d_in, d_sae = header.facts.d_in, header.facts.d_sae
        b = tensors.read("encoder.bias") / np.float32(_input_scale(files, "in", d_in))
        threshold = np.full(d_sae, _threshold(files), np.float32)
        arrays = header.arrays(tensors.read("encoder.weight").T, b, threshold=threshold)
        if not (header.apply_b_dec_to_input or header.rescale_acts_by_decoder_norm):
            return arrays
        W_dec, b_dec = _unscaled_decoder(files, d_in)
        if header.apply_b_dec_to_input:
            arrays = arrays.of_input_minus(b_dec)
        return arrays.times(row_norms(W_dec)) if header.rescale_acts_by_decoder_norm else arrays

    def read_decoder(self, files: SaeFiles) -> Decoder:
        header = self.facts(files)
        W_dec, b_dec = _unscaled_decoder(files, header.facts.d_in)
        return Decoder(unit_rows(W_dec) if header.rescale_acts_by_decoder_norm else W_dec, b_dec)

    def _refuse_what_is_not_computed(self, files: SaeFiles, config: dict[str, Any]) -> None:
        hook_in = config.get("hook_point_in")
        if config.get("hook_point_out", hook_in) != hook_in or re.search(r"-L\d+TC-", files.place):
            raise self.refuse(files, "a transcoder")
        if (act_fn := str(config.get("act_fn")).lower()) not in _ACTIVATIONS:
            raise self.refuse(files, "act_fn", act_fn)
        if (norm := config.get("norm_activation")) not in _NORMS:
            raise self.refuse(files, "norm_activation", str(norm))
        if config.get("use_glu_encoder"):
            raise self.refuse(files, "use_glu_encoder")


def _threshold(files: SaeFiles) -> float:
    """In units of h. A topk of these has one where it may be computed as a JumpReLU."""
    return positive_number(files, "jump_relu_threshold", files.config.get("jump_relu_threshold"))


def _input_scale(files: SaeFiles, side: str, d_in: int) -> float:
    """What the training multiplied inputs ("in") or outputs ("out") by: 1 where that is folded into the weights."""
    if files.config.get("norm_activation") == "inference":
        return 1.0
    norms = files.config.get("dataset_average_activation_norm")
    norm = norms.get(side) if isinstance(norms, dict) else None
    return sqrt(d_in) / positive_number(files, f"dataset_average_activation_norm.{side}", norm)


def _unscaled_decoder(files: SaeFiles, d_in: int) -> tuple[Array, Array]:
    """(d_sae, d_in) and (d_in,), of activations of the raw input and in its units."""
    scale_in, scale_out = (np.float32(_input_scale(files, side, d_in)) for side in ("in", "out"))
    W_dec = files.tensors.read("decoder.weight").T * (scale_in / scale_out)
    return W_dec, files.tensors.read("decoder.bias") / scale_out
