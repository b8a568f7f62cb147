"""
SAE files -> one canonical encoder, as numpy arrays. Four formats are read: Gemma Scope, Gemma Scope 2,
SAELens and sparsify. What each does before, inside and after its matrix product is folded here into

    x' = norm(x)    u = x' @ W    h = u + b
    relu      f = max(h, 0)
    jumprelu  f = max(h, 0) where h > threshold
    gated     f = max(u * gain + magnitude_bias, 0) where h > 0
    topk      f = max(h, 0) on the k largest h
    groupmax  the features in k equal groups; f = max(h, 0) on the largest h of each

Dimension key:  D d_in   F d_sae
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpo.errors import SaeError
from fpo.scoring.sae.files import find_files
from fpo.scoring.sae.layouts import Activation, InputNorm, Layout, read_layout, refuse

Array = NDArray[np.float32]
# Columns folded at a time: the fold is computed in float64, and W may be 10 GB.
_FOLD_COLUMNS = 4096


@dataclass(frozen=True)
class SaeFacts:
    """What an SAE says about itself, known without reading its weights."""

    d_in: int
    d_sae: int
    architecture: Activation
    elementwise: bool
    """Feature j depends on column j of the encoder alone; topk and groupmax couple them."""
    format: str
    advertised_l0: float | None
    """Active features per token that the files promise; None where they say nothing."""
    hook_hint: str | None
    """Where the files say that the SAE hooks: a hookpoint, or their own word for another place."""
    center_input: bool
    """The SAE was trained on a residual stream whose mean over d_in is subtracted from every token."""


@dataclass(frozen=True)
class SaeArrays:
    """The canonical encoder; the formulas stand at the top of this module."""

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


def sae_facts(source: str, hookpoint: str | None = None) -> SaeFacts:
    """
    Facts from headers and configuration alone. A hub source is downloaded first, where it is not cached.

    `source` is a local folder or params.npz, or `owner/repo[@revision][/folder]` on the hub; `hookpoint`
    chooses in a folder that holds one SAE per hookpoint. Raises SaeError for what is missing or unsupported.
    """
    return _facts(_layout(source, hookpoint))


def read_sae(source: str, hookpoint: str | None = None) -> SaeArrays:
    """The canonical encoder of `source` (as for sae_facts), float32. The decoder stays on disk."""
    layout = _layout(source, hookpoint)
    weights = layout.weights
    _check_unit_scaling(layout)
    W = weights.read(layout.encoder)
    W = W.T if layout.transposed else W
    b = weights.read(layout.encoder_bias)
    gain = np.exp(weights.read(layout.gain)) if layout.gain else None
    magnitude_bias = weights.read(layout.magnitude_bias) if layout.magnitude_bias else None
    if layout.subtract_decoder_bias:
        shift = _product(weights.read(layout.decoder_bias), W)
        b = (b - shift).astype(np.float32)
        if gain is not None and magnitude_bias is not None:
            magnitude_bias = (magnitude_bias - shift * gain).astype(np.float32)
    if layout.scale_by_decoder_norm:
        norms = _row_norms(weights.read(layout.decoder))
        W, b = W * norms, (b * norms).astype(np.float32)
    return SaeArrays(
        facts=_facts(layout),
        W=W,
        b=b,
        activation=layout.activation,
        input_norm=layout.input_norm,
        k=layout.k,
        threshold=_threshold(layout),
        gain=gain,
        magnitude_bias=magnitude_bias,
    )


def read_decoder(source: str, hookpoint: str | None = None) -> tuple[Array, Array]:
    """W_dec (d_sae, d_in) and b_dec (d_in,), float32, so that the normalised input is `f @ W_dec + b_dec`."""
    layout = _layout(source, hookpoint)
    for name, shape in (
        (layout.decoder, (layout.d_sae, layout.d_in)),
        (layout.decoder_bias, (layout.d_in,)),
    ):
        if layout.weights.shapes.get(name) != shape:
            found = layout.weights.shapes.get(name, "no such tensor")
            raise SaeError(f"SAE {source}: the decoder's {name} must have shape {shape}, found {found}")
    W_dec = layout.weights.read(layout.decoder)
    if layout.scale_by_decoder_norm:
        norms = np.maximum(_row_norms(W_dec), np.finfo(np.float32).tiny)
        W_dec = (W_dec / norms[:, None]).astype(np.float32)
    return W_dec, layout.weights.read(layout.decoder_bias)


def sae_config(source: str, hookpoint: str | None = None) -> dict[str, Any]:
    """What, beside the weights, decides the activations: strings, integers and booleans, ready for JSON."""
    layout = _layout(source, hookpoint)
    return {
        "format": layout.files.format,
        "activation": layout.activation,
        "d_in": layout.d_in,
        "d_sae": layout.d_sae,
        "k": layout.k,
        "normalize_activations": layout.normalisation,
        "apply_b_dec_to_input": layout.subtract_decoder_bias,
        "rescale_acts_by_decoder_norm": layout.scale_by_decoder_norm,
        "center_input": layout.center_input,
    }


def sae_weight_files(source: str, hookpoint: str | None = None) -> list[Path]:
    """The files whose bytes are the weights, for digests."""
    return [find_files(source, hookpoint).weights]


def _layout(source: str, hookpoint: str | None) -> Layout:
    return read_layout(find_files(source, hookpoint))


def _facts(layout: Layout) -> SaeFacts:
    return SaeFacts(
        d_in=layout.d_in,
        d_sae=layout.d_sae,
        architecture=layout.activation,
        elementwise=layout.activation not in ("topk", "groupmax"),
        format=layout.files.format,
        advertised_l0=layout.advertised_l0,
        hook_hint=layout.hook_hint,
        center_input=layout.center_input,
    )


def _threshold(layout: Layout) -> Array | None:
    if layout.threshold is None:
        return None
    threshold = layout.weights.read(layout.threshold)
    if layout.threshold == "log_threshold":
        return np.exp(threshold)
    if (threshold == -1).all():
        raise refuse(layout.files, "threshold -1", "it was never set in training, every feature would pass")
    return threshold


def _check_unit_scaling(layout: Layout) -> None:
    """Fine-tuned SAEs of old SAELens scale their activations; nothing since does, and neither do we."""
    if "scaling_factor" in layout.weights.shapes and (layout.weights.read("scaling_factor") != 1).any():
        raise refuse(layout.files, "a scaling_factor other than 1", "fold it into the decoder and export again")


def _product(vector: Array, W: Array) -> NDArray[np.float64]:
    """vector @ W in float64: the fold subtracts two large numbers where the residual mean is large."""
    wide = vector.astype(np.float64)
    blocks = range(0, W.shape[1], _FOLD_COLUMNS)
    return np.concatenate([wide @ W[:, start : start + _FOLD_COLUMNS].astype(np.float64) for start in blocks])


def _row_norms(W_dec: Array) -> Array:
    squares: NDArray[np.float64] = np.einsum("fd,fd->f", W_dec, W_dec, dtype=np.float64)
    return np.sqrt(squares).astype(np.float32)
