"""
The one canonical encoder that every format is read into, as numpy arrays. What a format does before, inside and
after its matrix product is folded here into

    x' = norm(x)    u = x' @ W    h = u + b, or (u + b) * sigmoid(x' @ W_glu + b_glu) of a GLU encoder
    relu      f = max(h, 0)
    jumprelu  f = max(h, 0) where h > threshold
    gated     f = max(u * gain + magnitude_bias, 0) where h > 0
    topk      f = max(h, 0) on the k largest h
    groupmax  the features in k equal groups; f = max(h, 0) on the largest h of each

Dimension key:  D d_in   F d_sae
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Decoder(NamedTuple):
    """
    So that the normalised input is `f @ W + b`, or what a transcoder predicts, which may have another width d_out. With
    `skip` it is `f @ W + b + x @ skip`.
    """

    W: Array
    """(d_sae, d_out)"""
    b: Array
    """(d_out,)"""
    skip: Array | None = None
    """(d_in, d_out)"""


Glu = tuple[Array, Array]
"""W_glu and b_glu."""

Activation = Literal["relu", "jumprelu", "gated", "topk", "groupmax"]
InputNorm = Literal["none", "layer_norm", "constant_norm_rescale"]

# Columns folded at a time: the fold is computed in float64, and W may be 10 GB.
_FOLD_COLUMNS = 4096


@dataclass(frozen=True)
class SaeFacts:
    """What an SAE says about itself, known without reading its weights."""

    d_in: int
    d_sae: int
    architecture: Activation
    format: str
    advertised_l0: float | None
    """Active features per token that the files promise; None where they say nothing."""
    hook_hint: str | None
    """Where the files say that the SAE hooks: a hookpoint, or their own word for another place."""
    center_input: bool = False
    """The SAE was trained on a residual stream whose mean over d_in is subtracted from every token."""
    predicts: str | None = None
    """The hookpoint that the decoder of a transcoder predicts; None of an SAE, which reconstructs what it reads."""

    @property
    def elementwise(self) -> bool:
        """Feature j depends on column j of the encoder alone; topk and groupmax couple them."""
        return self.architecture not in ("topk", "groupmax")


@dataclass(frozen=True)
class SaeHeader:
    """What headers and configuration say, beside the weights: the facts, and what decides the activations."""

    facts: SaeFacts
    k: int | None = None
    """For topk and groupmax."""
    normalize_activations: str = "none"
    """As the file says it; expected_average_only_in does nothing to an encoder at run time."""
    apply_b_dec_to_input: bool = False
    """The decoder's bias is subtracted from the input."""
    rescale_acts_by_decoder_norm: bool = False
    """Feature j's pre-activation is multiplied by the norm of its decoder row."""
    options: Mapping[str, str | int | bool] = field(default_factory=dict)
    """What else of the configuration decides the activations, in the format's own words; a float as its repr."""

    @property
    def config(self) -> dict[str, Any]:
        """What goes into a cache's key: strings, integers and booleans."""
        return {
            "format": self.facts.format,
            "activation": self.facts.architecture,
            "d_in": self.facts.d_in,
            "d_sae": self.facts.d_sae,
            "k": self.k,
            "normalize_activations": self.normalize_activations,
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm,
            "center_input": self.facts.center_input,
            **self.options,
        }

    def arrays(
        self,
        W: Array,
        b: Array,
        *,
        threshold: Array | None = None,
        gain: Array | None = None,
        magnitude_bias: Array | None = None,
        glu: Glu | None = None,
    ) -> SaeArrays:
        """The encoder of these arrays, nothing folded yet."""
        norm = self.normalize_activations
        return SaeArrays(
            facts=self.facts,
            W=W,
            b=b,
            activation=self.facts.architecture,
            input_norm="none" if norm == "expected_average_only_in" else cast(InputNorm, norm),
            k=self.k,
            threshold=threshold,
            gain=gain,
            magnitude_bias=magnitude_bias,
            glu=glu,
        )


@dataclass(frozen=True)
class SaeArrays:
    """The canonical encoder, float32; the formulas stand at the top of this module."""

    facts: SaeFacts
    W: Array
    """(d_in, d_sae)"""
    b: Array
    """(d_sae,), the pre-encoder bias already folded in."""
    activation: Activation
    input_norm: InputNorm
    k: int | None = None
    threshold: Array | None = None
    """(d_sae,), for jumprelu."""
    gain: Array | None = None
    """(d_sae,), for gated: exp(r_mag)."""
    magnitude_bias: Array | None = None
    """(d_sae,), for gated, the pre-encoder bias already folded in."""
    glu: Glu | None = None
    """W_glu (d_in, d_sae) and b_glu (d_sae,); not of a gated one."""

    def of_input_minus(self, pre_bias: Array) -> SaeArrays:
        """
        The encoder of `x' - pre_bias`: b - pre_bias @ W, and the same for the magnitudes of a gated one and for a GLU.
        """
        shift = _product(pre_bias, self.W)
        magnitude_bias = self.magnitude_bias
        if magnitude_bias is not None and self.gain is not None:
            magnitude_bias = (magnitude_bias - shift * self.gain).astype(np.float32)
        glu = self.glu
        if glu is not None:
            glu = (glu[0], (glu[1] - _product(pre_bias, glu[0])).astype(np.float32))
        return replace(self, b=(self.b - shift).astype(np.float32), magnitude_bias=magnitude_bias, glu=glu)

    def of_input_times(self, scale: float) -> SaeArrays:
        """The encoder of `x' * scale`."""
        glu = None if self.glu is None else (self.glu[0] * np.float32(scale), self.glu[1])
        return replace(self, W=self.W * np.float32(scale), glu=glu)

    def times(self, factors: Array) -> SaeArrays:
        """The encoder whose pre-activations h are multiplied, feature by feature, by these factors."""
        return replace(self, W=self.W * factors, b=(self.b * factors).astype(np.float32))


def row_norms(W_dec: Array) -> Array:
    """(d_sae,) Euclidean norm of every feature's decoder row."""
    squares: NDArray[np.float64] = np.einsum("fd,fd->f", W_dec, W_dec, dtype=np.float64)
    return np.sqrt(squares).astype(np.float32)


def unit_rows(W_dec: Array) -> Array:
    """Every decoder row divided by its norm."""
    norms = np.maximum(row_norms(W_dec), np.finfo(np.float32).tiny)
    return (W_dec / norms[:, None]).astype(np.float32)


def _product(vector: Array, W: Array) -> NDArray[np.float64]:
    """vector @ W in float64: the fold subtracts two large numbers where the residual mean is large."""
    wide = vector.astype(np.float64)
    blocks = range(0, W.shape[1], _FOLD_COLUMNS)
    return np.concatenate([wide @ W[:, start : start + _FOLD_COLUMNS].astype(np.float64) for start in blocks])
