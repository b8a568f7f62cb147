"""SAELens' own format, of version 6 and of the flat configurations before it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from fpo.errors import SaeError
from fpo.scoring.hook_names import from_transformer_lens
from fpo.scoring.sae.arrays import Activation, Array, Decoder, SaeArrays, SaeFacts, SaeHeader, row_norms, unit_rows
from fpo.scoring.sae.format import (
    UNSET_THRESHOLD,
    Format,
    SaeFiles,
    check_config_sizes,
    check_k,
    decoder_of,
    positive_number,
    read_threshold,
    stated_l0,
)

_ARCHITECTURES: dict[str, Activation] = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "topk": "topk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
}
_FUNCTIONS = ("relu", "topk")
_NORMS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")
_BATCHTOPK = ("batchtopk", "matryoshka_batchtopk")
"""Of training alone: at inference a JumpReLU, whose one threshold a checkpoint carries as `topk_threshold`."""
_EXPORT = "export it with SAELens' save_inference_model"


class SaeLens(Format):
    """
    ReLU, JumpReLU, gated or TopK of the input, normalised as `normalize_activations` says, minus `b_dec` unless
    `apply_b_dec_to_input` is false, as it is of transcoders. A BatchTopK checkpoint is the JumpReLU of its
    `topk_threshold`.
    """

    name = "saelens"
    title = "SAELens"
    weights = "sae_weights.safetensors"
    config = "cfg.json"
    needs_config = True
    refuses: ClassVar = {
        "architecture temporal": "it attends over positions, so it is no encoder of single tokens",
        "architecture matching_pursuit": "its encoder is iterative, not one matrix product",
        "architecture abstopk": "its activations are signed; features here are never negative",
        "a BatchTopK checkpoint without topk_threshold": _EXPORT,
        "a BatchTopK checkpoint of expected_average_only_in": f"another file has the scale of its input; {_EXPORT}",
        "a transcoder without hook_name_out": "its decoder can be held against no place; add it to metadata",
        "architecture": f"supported: {', '.join(_ARCHITECTURES)}",
        "activation_fn": f"supported: {', '.join(_FUNCTIONS)}",
        "normalize_activations": f"supported: {', '.join(_NORMS)}",
        "reshape_activations": "supported: none, and hook_z, which the input of the attention's projection is already",
        "a scaling_factor other than 1": "fold it into the decoder and export again",
        **UNSET_THRESHOLD,
    }

    def claims(self, files: SaeFiles) -> bool:
        """`W_enc` or `W_dec`."""
        return not files.tensors.shapes.keys().isdisjoint({"W_enc", "W_dec"})

    def facts(self, files: SaeFiles) -> SaeHeader:
        config = _modern(files.config)
        self._refuse_what_is_not_computed(files, config)
        architecture = config.get("architecture", "standard")
        is_topk, is_batchtopk = architecture == "topk", architecture in _BATCHTOPK
        transcodes = "transcoder" in architecture
        metadata = config.get("metadata") or {}
        hook, predicted = (
            from_transformer_lens(name, metadata.get("model_name") or "") if name else None
            for name in (metadata.get("hf_hook_name") or metadata.get("hook_name"), _predicted(metadata))
        )
        if transcodes and predicted is None:
            raise self.refuse(files, "a transcoder without hook_name_out")
        d_in, d_sae = files.matrix("W_enc")
        header = SaeHeader(
            SaeFacts(
                d_in=d_in,
                d_sae=d_sae,
                architecture=_ARCHITECTURES[architecture],
                format=self.name,
                advertised_l0=stated_l0(config.get("k") if is_topk or is_batchtopk else metadata.get("l0")),
                hook_hint=hook,
                center_input=bool((metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights")),
                predicts=predicted if transcodes else None,
            ),
            k=config["k"] if is_topk else None,
            normalize_activations=config.get("normalize_activations") or "none",
            apply_b_dec_to_input=not transcodes and bool(config.get("apply_b_dec_to_input", True)),
            rescale_acts_by_decoder_norm=(is_topk or is_batchtopk)
            and bool(config.get("rescale_acts_by_decoder_norm", is_batchtopk)),
        )
        _check_shapes(files, header)
        return header

    def read(self, files: SaeFiles) -> SaeArrays:
        header, tensors = self.facts(files), files.tensors
        self._refuse_scaling(files)
        W = tensors.read("W_enc")
        if header.facts.architecture == "gated":
            gain, magnitude_bias = np.exp(tensors.read("r_mag")), tensors.read("b_mag")
            arrays = header.arrays(W, tensors.read("b_gate"), gain=gain, magnitude_bias=magnitude_bias)
        else:
            is_jumprelu = header.facts.architecture == "jumprelu"
            threshold = self._threshold(files, header.facts.d_sae) if is_jumprelu else None
            arrays = header.arrays(W, tensors.read("b_enc"), threshold=threshold)
        if header.apply_b_dec_to_input:
            arrays = arrays.of_input_minus(tensors.read("b_dec"))
        return arrays.times(row_norms(tensors.read("W_dec"))) if header.rescale_acts_by_decoder_norm else arrays

    def read_decoder(self, files: SaeFiles) -> Decoder:
        header = self.facts(files)
        decoder = decoder_of(files, header.facts, "W_dec", "b_dec")
        if header.rescale_acts_by_decoder_norm:
            return decoder._replace(W=unit_rows(decoder.W))
        if "W_skip" not in files.tensors.shapes:
            return decoder
        files.check_shapes({"W_skip": (len(decoder.b), header.facts.d_in)})
        return decoder._replace(skip=files.tensors.read("W_skip").T)

    def _threshold(self, files: SaeFiles, d_sae: int) -> Array:
        name = _threshold_name(files)
        if name == "topk_threshold":
            value = positive_number(files, name, files.tensors.read(name).item())
            return np.full(d_sae, value, np.float32)
        return np.exp(files.tensors.read(name)) if name == "log_threshold" else read_threshold(self, files, name)

    def _refuse_what_is_not_computed(self, files: SaeFiles, config: dict[str, Any]) -> None:
        architecture = config.get("architecture", "standard")
        if f"architecture {architecture}" in self.refuses:
            raise self.refuse(files, f"architecture {architecture}")
        if architecture in _BATCHTOPK and "topk_threshold" not in files.tensors.shapes:
            raise self.refuse(files, "a BatchTopK checkpoint without topk_threshold")
        if architecture in _BATCHTOPK and config.get("normalize_activations") == "expected_average_only_in":
            raise self.refuse(files, "a BatchTopK checkpoint of expected_average_only_in")
        if architecture not in _ARCHITECTURES:
            raise self.refuse(files, "architecture", repr(architecture))
        if (function := config.get("activation_fn", "relu")) not in _FUNCTIONS:
            raise self.refuse(files, "activation_fn", str(function))
        if (norm := config.get("normalize_activations") or "none") not in _NORMS:
            raise self.refuse(files, "normalize_activations", str(norm))
        if (reshape := config.get("reshape_activations") or "none") not in ("none", "hook_z"):
            raise self.refuse(files, "reshape_activations", str(reshape))
        if architecture == "topk" and not isinstance(config.get("k"), int):
            raise SaeError(f"SAE {files.source}: a topk SAE whose cfg.json has no k")

    def _refuse_scaling(self, files: SaeFiles) -> None:
        """Fine-tuned SAEs of old SAELens scale their activations; nothing since does, and neither do we."""
        tensors = files.tensors
        if "scaling_factor" in tensors.shapes and (tensors.read("scaling_factor") != 1).any():
            raise self.refuse(files, "a scaling_factor other than 1")


def _check_shapes(files: SaeFiles, header: SaeHeader) -> None:
    facts = header.facts
    check_config_sizes(files, facts.d_in, facts.d_sae)
    per_feature = ["b_gate", "r_mag", "b_mag"] if facts.architecture == "gated" else ["b_enc"]
    files.check_shapes(dict.fromkeys(per_feature, (facts.d_sae,)))
    if facts.architecture == "jumprelu":
        name = _threshold_name(files)
        files.check_shapes({name: () if name == "topk_threshold" else (facts.d_sae,)})
    if header.apply_b_dec_to_input:
        files.check_shapes({"b_dec": (facts.d_in,)})
    if header.rescale_acts_by_decoder_norm:
        files.check_shapes({"W_dec": (facts.d_sae, facts.d_in)})
    if header.k is not None:
        check_k(files, header.k, facts.d_sae)


def _threshold_name(files: SaeFiles) -> str:
    names = ("log_threshold", "topk_threshold", "threshold")
    return next((name for name in names if name in files.tensors.shapes), "threshold")


def _predicted(metadata: dict[str, Any]) -> str | None:
    """What a transcoder's decoder predicts, as the file has it."""
    return metadata.get("hf_hook_name_out") or metadata.get("hook_name_out")


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """A cfg.json from before SAELens 6 was flat and said some things otherwise."""
    if isinstance(config.get("metadata"), dict):
        return config
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    modern = {renamed.get(key, key): value for key, value in config.items()}
    kwargs = modern.get("activation_fn_kwargs") or {}
    if modern.get("activation_fn") == "topk" and "k" in kwargs:
        modern |= {"architecture": "topk", "k": kwargs["k"]}
    if modern.get("normalize_activations") is True:
        modern["normalize_activations"] = "expected_average_only_in"
    if "hook_z" in str(modern.get("hook_name", "")):
        modern.setdefault("reshape_activations", "hook_z")
    return {**modern, "metadata": modern}
