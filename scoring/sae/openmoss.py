"""OpenMOSS' own format (Language-Model-SAEs, llamascopium): a configuration, and the scale of the input a tensor."""

from __future__ import annotations

from math import sqrt
from typing import Any, ClassVar

import numpy as np

from fpo.errors import SaeError
from fpo.scoring.hook_names import from_transformer_lens
from fpo.scoring.sae.arrays import Activation, Array, Decoder, SaeArrays, SaeFacts, SaeHeader, row_norms, unit_rows
from fpo.scoring.sae.format import Format, SaeFiles, check_config_sizes, check_k, positive_number

_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk"}
_INPUT_NORMS = {"inference": "none", "dataset-wise": "none", "token-wise": "constant_norm_rescale"}
_SMALLEST_NORM = np.float32(1e-30)
"""Of a decoder's row: where that is zero no threshold is passed, and this leaves one out of reach."""


class OpenMoss(Format):
    """
    ReLU, JumpReLU or TopK of the input times the root of d_in over its mean norm in training (`dataset-wise`), over its
    own (`token-wise`) or as it is (`inference`); `use_glu_encoder` multiplies by the sigmoid of a second product. With
    `sparsity_include_decoder_norm` a threshold is held against h times the norm of the feature's row of the decoder,
    and a TopK chooses and returns that product.
    """

    name = "openmoss"
    title = "OpenMOSS"
    weights = "sae_weights.safetensors"
    config = "config.json"
    needs_config = True
    refuses: ClassVar = {
        "a transcoder": "export it with SAELens, whose transcoders are read",
        "sae_type": "only `sae` encodes one place into features of single tokens",
        "act_fn batchtopk": (
            "what passes depends on the other tokens of a batch; "
            "save it as jumprelu, with the smallest activation that passes of a large batch as threshold"
        ),
        "act_fn": f"supported: {', '.join(_ACTIVATIONS)}",
        "norm_activation": f"supported: {', '.join(_INPUT_NORMS)}",
    }

    names: ClassVar[dict[str, str]] = {name: name for name in ("W_E", "b_E", "W_E_glu", "b_E_glu", "W_D", "b_D")} | {
        "log_threshold": "activation_function.log_jumprelu_threshold"
    }
    """Of the tensors."""
    transposed: ClassVar = False
    """The matrices stand as torch's linear layers keep them."""

    def claims(self, files: SaeFiles) -> bool:
        """`W_E` or `W_D`."""
        return not files.tensors.shapes.keys().isdisjoint({"W_E", "W_D"})

    def facts(self, files: SaeFiles) -> SaeHeader:
        config = files.config
        self._refuse_what_is_not_computed(files, config)
        architecture = _ACTIVATIONS[_act_fn(config)]
        k = config.get("top_k") if architecture == "topk" else None
        d_in, d_sae = files.matrix(self.names["W_E"])[:: -1 if self.transposed else 1]
        check_config_sizes(files, d_in, d_sae, names=("d_model", "d_sae"))
        self._check_shapes(files, d_in, d_sae)
        if _norm(config) == "dataset-wise":
            self._check_dataset_scale(files)
        if architecture == "topk":
            if not isinstance(k, int):
                raise SaeError(f"SAE {files.source}: a topk SAE whose config.json has no top_k")
            check_k(files, k, d_sae)
        hook = config.get("hook_point_in")
        return SaeHeader(
            SaeFacts(
                d_in=d_in,
                d_sae=d_sae,
                architecture=architecture,
                format=self.name,
                advertised_l0=None if k is None else float(k),
                hook_hint=from_transformer_lens(hook) if isinstance(hook, str) else None,
            ),
            k=k,
            normalize_activations=_INPUT_NORMS[_norm(config)],
            apply_b_dec_to_input=_has_decoder_bias(config) and bool(config.get("apply_decoder_bias_to_pre_encoder")),
            rescale_acts_by_decoder_norm=architecture == "topk" and _includes_norm(config),
            options={
                "norm_activation": _norm(config),
                "sparsity_include_decoder_norm": _includes_norm(config),
                "use_glu_encoder": bool(config.get("use_glu_encoder")),
            },
        )

    def read(self, files: SaeFiles) -> SaeArrays:
        header, threshold, glu, norms = self.facts(files), None, None, None
        architecture = header.facts.architecture
        if header.options["sparsity_include_decoder_norm"] and architecture != "relu":
            norms = row_norms(self._tensor(files, "W_D"))
        if architecture == "jumprelu":
            threshold = np.exp(self._tensor(files, "log_threshold"))
            if norms is not None:
                threshold = threshold / np.maximum(norms, _SMALLEST_NORM)
        if header.options["use_glu_encoder"]:
            glu = self._tensor(files, "W_E_glu"), self._tensor(files, "b_E_glu")
        W, b = self._tensor(files, "W_E"), self._tensor(files, "b_E")
        arrays = header.arrays(W, b, threshold=threshold, glu=glu)
        if header.apply_b_dec_to_input:
            arrays = arrays.of_input_minus(self._tensor(files, "b_D"))
        arrays = arrays.of_input_times(self._input_scale(files))
        return arrays.times(norms) if norms is not None and header.rescale_acts_by_decoder_norm else arrays

    def read_decoder(self, files: SaeFiles) -> Decoder:
        header, scale = self.facts(files), np.float32(self._input_scale(files))
        W_dec = self._tensor(files, "W_D")
        b_dec = self._tensor(files, "b_D") if _has_decoder_bias(files.config) else np.zeros(W_dec.shape[1], np.float32)
        return Decoder((unit_rows(W_dec) if header.rescale_acts_by_decoder_norm else W_dec) / scale, b_dec / scale)

    def _tensor(self, files: SaeFiles, name: str) -> Array:
        values = files.tensors.read(self.names[name])
        return values.T if self.transposed else values

    def _check_shapes(self, files: SaeFiles, d_in: int, d_sae: int) -> None:
        config = files.config
        factor = positive_number(files, "expansion_factor", config.get("expansion_factor", d_sae / d_in))
        if int(d_in * factor) != d_sae:
            raise SaeError(f"SAE {files.source}: config says expansion_factor {factor:g}, the weights {d_sae / d_in:g}")
        shapes = {"W_E": (d_in, d_sae), "b_E": (d_sae,), "W_D": (d_sae, d_in)}
        if _has_decoder_bias(config):
            shapes["b_D"] = (d_in,)
        if config.get("use_glu_encoder"):
            shapes |= {"W_E_glu": (d_in, d_sae), "b_E_glu": (d_sae,)}
        if _act_fn(config) == "jumprelu":
            shapes["log_threshold"] = (d_sae,)
        step = -1 if self.transposed else 1
        files.check_shapes({self.names[name]: shape[::step] for name, shape in shapes.items()})

    def _input_scale(self, files: SaeFiles) -> float:
        return self._dataset_scale(files) if _norm(files.config) == "dataset-wise" else 1.0

    def _check_dataset_scale(self, files: SaeFiles) -> None:
        """SaeError where nothing says what a dataset-wise norm multiplies the input by; reads no tensor."""
        files.check_shapes({_norm_name(files): ()})

    def _dataset_scale(self, files: SaeFiles) -> float:
        name = _norm_name(files)
        d_in = files.matrix(self.names["W_E"])[1 if self.transposed else 0]
        return sqrt(d_in) / positive_number(files, name, files.tensors.read(name).item())

    def _refuse_what_is_not_computed(self, files: SaeFiles, config: dict[str, Any]) -> None:
        if (sae_type := config.get("sae_type", "sae")) != "sae":
            raise self.refuse(files, "sae_type", str(sae_type))
        hook_in = config.get("hook_point_in")
        if config.get("hook_point_out", hook_in) != hook_in:
            raise self.refuse(files, "a transcoder")
        if (act_fn := _act_fn(config)) not in _ACTIVATIONS:
            what = f"act_fn {act_fn}"
            raise self.refuse(files, what) if what in self.refuses else self.refuse(files, "act_fn", act_fn)
        if (norm := _norm(config)) not in _INPUT_NORMS:
            raise self.refuse(files, "norm_activation", norm)


# The defaults are the library's.


def _act_fn(config: dict[str, Any]) -> str:
    return str(config.get("act_fn", "relu")).lower()


def _norm(config: dict[str, Any]) -> str:
    return str(config.get("norm_activation", "dataset-wise"))


def _includes_norm(config: dict[str, Any]) -> bool:
    return bool(config.get("sparsity_include_decoder_norm", True))


def _has_decoder_bias(config: dict[str, Any]) -> bool:
    return bool(config.get("use_decoder_bias", True))


def _norm_name(files: SaeFiles) -> str:
    return f"dataset_average_activation_norm.{files.config.get('hook_point_in')}"
