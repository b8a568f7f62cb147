"""dictionary_learning: the state dict of one of its classes in `ae.pt`, which class and where in `config.json`."""

from __future__ import annotations

import re
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fpo.errors import SaeError
from fpo.scoring.hook_names import from_transformer_lens
from fpo.scoring.sae.arrays import Activation, Array, Decoder, SaeArrays, SaeFacts, SaeHeader
from fpo.scoring.sae.format import (
    UNSET_THRESHOLD,
    Format,
    SaeFiles,
    check_config_sizes,
    check_k,
    decoder_of,
    read_threshold,
    stated_l0,
)


class _Class(NamedTuple):
    activation: Activation
    decoder_bias: str
    subtracts: bool
    """The decoder's bias, from the input."""
    as_linear: bool = True
    """Matrices are nn.Linear's, transposed and named so; otherwise W_enc and W_dec."""
    shared_threshold: bool = False
    """One for all features."""


_CLASSES = {
    "AutoEncoder": _Class("relu", "bias", True),
    "AutoEncoderNew": _Class("relu", "decoder.bias", False),
    "GatedAutoEncoder": _Class("gated", "decoder_bias", True),
    "JumpReluAutoEncoder": _Class("jumprelu", "b_dec", False, as_linear=False),
    "AutoEncoderTopK": _Class("topk", "b_dec", True),
    "BatchTopKSAE": _Class("jumprelu", "b_dec", True, shared_threshold=True),
    "MatryoshkaBatchTopKSAE": _Class("jumprelu", "b_dec", True, as_linear=False, shared_threshold=True),
}

# What its users call a trainer's submodule, before `_layer_12`.
_SITES = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out"}


class DictionaryLearning(Format):
    """
    As the class in `trainer.dict_class` encodes, decoder rows as they are: ReLU, JumpReLU, gated or TopK of the input,
    for most classes minus the decoder's bias. BatchTopK is a JumpReLU of its saved threshold.
    """

    name = "dictionary_learning"
    title = "dictionary_learning"
    weights = "ae.pt"
    config = "config.json"
    needs_config = True
    refuses: ClassVar = {
        "a transcoder": "its configuration does not say what it predicts",
        "dict_class": f"supported: {', '.join(_CLASSES)}",
        **UNSET_THRESHOLD,
    }

    def claims(self, files: SaeFiles) -> bool:
        """`encoder.weight` or `W_enc`."""
        return not files.tensors.shapes.keys().isdisjoint({"encoder.weight", "W_enc"})

    def facts(self, files: SaeFiles) -> SaeHeader:
        trainer, kind = self._trainer(files), self._class(files)
        d_in, d_sae = files.matrix("encoder.weight" if kind.as_linear else "W_enc")
        if kind.as_linear:
            d_in, d_sae = d_sae, d_in
        check_config_sizes(files, d_in, d_sae, names=("activation_dim", "dict_size"), section=trainer)
        files.check_shapes(_vectors(kind, d_in, d_sae))
        k, is_topk = trainer.get("k"), kind.activation == "topk"
        if is_topk:
            if not isinstance(k, int):
                raise SaeError(f"SAE {files.source}: an AutoEncoderTopK whose config.json has no trainer.k")
            check_k(files, k, d_sae)
        return SaeHeader(
            SaeFacts(
                d_in=d_in,
                d_sae=d_sae,
                architecture=kind.activation,
                format=self.name,
                advertised_l0=stated_l0(k if k is not None else trainer.get("target_l0")),
                hook_hint=_hook_hint(trainer, (files.config.get("buffer") or {}).get("io")),
            ),
            k=k if is_topk else None,
            apply_b_dec_to_input=kind.subtracts,
        )

    def read(self, files: SaeFiles) -> SaeArrays:
        header, kind, tensors = self.facts(files), self._class(files), files.tensors
        W = tensors.read("encoder.weight").T if kind.as_linear else tensors.read("W_enc")
        if kind.activation == "gated":
            gain, magnitude_bias = np.exp(tensors.read("r_mag")), tensors.read("mag_bias")
            arrays = header.arrays(W, tensors.read("gate_bias"), gain=gain, magnitude_bias=magnitude_bias)
        else:
            b = tensors.read("encoder.bias" if kind.as_linear else "b_enc")
            threshold = self._threshold(files, b) if kind.activation == "jumprelu" else None
            arrays = header.arrays(W, b, threshold=threshold)
        return arrays.of_input_minus(tensors.read(kind.decoder_bias)) if kind.subtracts else arrays

    def read_decoder(self, files: SaeFiles) -> Decoder:
        facts, kind = self.facts(files).facts, self._class(files)
        matrix = "decoder.weight" if kind.as_linear else "W_dec"
        return decoder_of(files, facts, matrix, kind.decoder_bias, transposed=kind.as_linear)

    def _trainer(self, files: SaeFiles) -> dict[str, Any]:
        trainer = files.config.get("trainer")
        if not isinstance(trainer, dict):
            raise SaeError(f"SAE {files.source}: config.json has no trainer, as dictionary_learning writes it")
        return trainer

    def _class(self, files: SaeFiles) -> _Class:
        name = str(self._trainer(files).get("dict_class"))
        if name not in _CLASSES:
            raise self.refuse(files, "dict_class", name)
        if (files.config.get("buffer") or {}).get("io") == "in_and_out":
            raise self.refuse(files, "a transcoder")
        return _CLASSES[name]

    def _threshold(self, files: SaeFiles, b: Array) -> Array:
        """One for each feature."""
        return np.broadcast_to(read_threshold(self, files, "threshold"), b.shape).copy()


def _vectors(kind: _Class, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    """The tensors that the encoder needs beside its matrix."""
    names = ["gate_bias", "mag_bias", "r_mag"] if kind.activation == "gated" else []
    names = names or ["encoder.bias" if kind.as_linear else "b_enc"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (d_sae,))
    if kind.activation == "jumprelu":
        shapes["threshold"] = () if kind.shared_threshold else (d_sae,)
    return {**shapes, kind.decoder_bias: (d_in,)} if kind.subtracts else shapes


def _hook_hint(trainer: dict[str, Any], io: object) -> str | None:
    """
    The place that the trainer's submodule_name means, as users of the library write it, or without one the layer's
    output, which the library's own scripts train on. None where the words are others, or the buffer took inputs.
    """
    submodule = trainer.get("submodule_name") or f"resid_post_layer_{trainer.get('layer')}"
    named = re.fullmatch(r"(\w+)_layer_(\d+)", str(submodule))
    if io == "in" or named is None or named[1] not in _SITES:
        return None
    return from_transformer_lens(f"blocks.{named[2]}.{_SITES[named[1]]}", str(trainer.get("lm_name") or ""))
