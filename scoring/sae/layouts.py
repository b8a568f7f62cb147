"""
What each format means: which tensor is the encoder, what its configuration makes of it, and what is refused
because it is no per-token encoder of a hookpoint's output. Nothing here reads a weight, only headers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, cast

from fpo.errors import SaeError
from fpo.scoring.hook_names import from_gemma_scope, from_module_path, from_sparsify, from_transformer_lens
from fpo.scoring.sae.files import SaeFiles, Weights

Activation = Literal["relu", "jumprelu", "gated", "topk", "groupmax"]
InputNorm = Literal["none", "layer_norm", "constant_norm_rescale"]

_NORMS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")
_REFUSED = {
    "temporal": "it attends over positions, so it is no encoder of single tokens",
    "matching_pursuit": "its encoder is iterative, not one matrix product",
    "abstopk": "its activations are signed; features here are never negative",
    "batchtopk": "this is a training checkpoint; export it with SAELens' save_inference_model",
    "matryoshka_batchtopk": "this is a training checkpoint; export it with SAELens' save_inference_model",
}


@dataclass(frozen=True)
class Layout:
    """Where the encoder stands in the file and what happens to it on the way to the canonical form."""

    files: SaeFiles
    weights: Weights
    activation: Activation
    encoder: str
    encoder_bias: str
    decoder: str
    decoder_bias: str
    transposed: bool = False
    """The encoder is stored (d_sae, d_in)."""
    subtract_decoder_bias: bool = False
    scale_by_decoder_norm: bool = False
    """Feature j's pre-activation is multiplied by the norm of its decoder row."""
    normalisation: str = "none"
    """As the file says it; expected_average_only_in does nothing to an encoder at run time."""
    k: int | None = None
    threshold: str | None = None
    gain: str | None = None
    magnitude_bias: str | None = None
    center_input: bool = False
    advertised_l0: float | None = None
    hook_hint: str | None = None

    @property
    def d_in(self) -> int:
        return self.weights.shapes[self.encoder][1 if self.transposed else 0]

    @property
    def d_sae(self) -> int:
        return self.weights.shapes[self.encoder][0 if self.transposed else 1]

    @property
    def input_norm(self) -> InputNorm:
        return "none" if self.normalisation == "expected_average_only_in" else cast(InputNorm, self.normalisation)


def read_layout(files: SaeFiles) -> Layout:
    """The layout of the files' format. Raises SaeError for what is refused, missing or of the wrong shape."""
    weights = Weights(files.source, files.weights)
    layout = {
        "gemma_scope": _gemma_scope,
        "gemma_scope_2": _gemma_scope,
        "saelens": _saelens,
        "sparsify": _sparsify,
    }[files.format](files, weights)
    _check_shapes(layout)
    return layout


def refuse(files: SaeFiles, what: str, why: str) -> SaeError:
    return SaeError(f"SAE {files.source}: {what} is not supported: {why}")


def _gemma_scope(files: SaeFiles, weights: Weights) -> Layout:
    """Gemma Scope 1 and 2. b_dec is not subtracted, the input is not normalised: the raw residual stream."""
    place, config = files.place, files.config
    kind = str(config.get("type", ""))
    is_transcoder = "transcoder" in kind or re.search(r"(^|/|-)(transcoder|clt)[^/]*(/|$)", place)
    if is_transcoder or config.get("affine_connection"):
        raise refuse(files, "a transcoder", "it reads one place and predicts another")
    if "crosscoder" in kind or re.search(r"(^|/)crosscoder[^/]*(/|$)", place):
        raise refuse(files, "a crosscoder", "it reads several layers at once")
    if re.search(r"/embedding/width_", place):
        raise refuse(files, "an embedding SAE", "it reads token embeddings before Gemma scales them")
    if (architecture := config.get("architecture", "jump_relu")) not in ("jump_relu", "jumprelu"):
        raise refuse(files, f"architecture {architecture}", "Gemma Scope SAEs are jump_relu")
    names = {name.lower(): name for name in weights.shapes}
    if "affine_skip_connection" in names:
        raise refuse(files, "a skip connection", "only transcoders have one")
    stated = config.get("l0")
    in_path = re.search(r"average_l0_(\d+(?:\.\d+)?)", place)
    hook = config.get("hf_hook_point_in")
    return Layout(
        files,
        weights,
        activation="jumprelu",
        encoder=names.get("w_enc", "W_enc"),
        encoder_bias=names.get("b_enc", "b_enc"),
        decoder=names.get("w_dec", "W_dec"),
        decoder_bias=names.get("b_dec", "b_dec"),
        threshold=names.get("threshold", "threshold"),
        advertised_l0=float(stated) if stated is not None else float(in_path[1]) if in_path else None,
        hook_hint=from_module_path(hook) if isinstance(hook, str) else from_gemma_scope(place),
    )


def _saelens(files: SaeFiles, weights: Weights) -> Layout:
    config = _modern_saelens_config(files.config)
    metadata = config.get("metadata") or {}
    architecture = config.get("architecture", "standard")
    if architecture in _REFUSED:
        raise refuse(files, f"architecture {architecture}", _REFUSED[architecture])
    if "transcoder" in str(architecture):
        raise refuse(files, "a transcoder", "it reads one place and predicts another")
    if architecture not in ("standard", "jumprelu", "gated", "topk"):
        raise refuse(files, f"architecture {architecture!r}", "supported: standard, jumprelu, gated, topk")
    if (function := config.get("activation_fn", "relu")) not in ("relu", "topk"):
        raise refuse(files, f"activation_fn {function}", "supported: relu, topk")
    if (norm := config.get("normalize_activations") or "none") not in _NORMS:
        raise refuse(files, f"normalize_activations {norm}", f"supported: {', '.join(_NORMS)}")
    if (reshape := config.get("reshape_activations") or "none") != "none":
        raise refuse(files, f"reshape_activations {reshape}", "the SAE reads attention heads, no module's output")
    if architecture == "topk" and not isinstance(config.get("k"), int):
        raise SaeError(f"SAE {files.source}: a topk SAE whose cfg.json has no k")
    hook = metadata.get("hf_hook_name") or metadata.get("hook_name")
    model_kwargs = metadata.get("model_from_pretrained_kwargs") or {}
    return Layout(
        files,
        weights,
        activation=cast(Activation, "relu" if architecture == "standard" else architecture),
        encoder="W_enc",
        encoder_bias="b_gate" if architecture == "gated" else "b_enc",
        decoder="W_dec",
        decoder_bias="b_dec",
        subtract_decoder_bias=bool(config.get("apply_b_dec_to_input", True)),
        scale_by_decoder_norm=architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm")),
        normalisation=norm,
        k=config["k"] if architecture == "topk" else None,
        threshold=_saelens_threshold(weights) if architecture == "jumprelu" else None,
        gain="r_mag" if architecture == "gated" else None,
        magnitude_bias="b_mag" if architecture == "gated" else None,
        center_input=bool(model_kwargs.get("center_writing_weights")),
        advertised_l0=_stated_l0(config["k"] if architecture == "topk" else metadata.get("l0")),
        hook_hint=from_transformer_lens(hook, metadata.get("model_name") or "") if hook else None,
    )


def _stated_l0(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _saelens_threshold(weights: Weights) -> str:
    return "log_threshold" if "log_threshold" in weights.shapes else "threshold"


def _modern_saelens_config(config: dict[str, Any]) -> dict[str, Any]:
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


def _sparsify(files: SaeFiles, weights: Weights) -> Layout:
    config = files.config
    if config.get("transcode"):
        raise refuse(files, "a transcoder", "it reads a module's input and predicts its output")
    if config.get("skip_connection") or "W_skip" in weights.shapes:
        raise refuse(files, "a skip connection", "its features are only part of what it says")
    if config.get("signed"):
        raise refuse(files, "signed: true", "its activations are signed; features here are never negative")
    if (activation := config.get("activation", "topk")) not in ("topk", "groupmax"):
        raise refuse(files, f"activation {activation}", "supported: topk, groupmax")
    k = int(config.get("k", 32))
    layout = Layout(
        files,
        weights,
        activation=cast(Activation, activation),
        encoder="encoder.weight",
        encoder_bias="encoder.bias",
        decoder="W_dec",
        decoder_bias="b_dec",
        transposed=True,
        subtract_decoder_bias=True,
        k=k,
        advertised_l0=float(k),
        hook_hint=from_sparsify(files.place),
    )
    _check_present(layout)
    announced = int(config.get("num_latents") or layout.d_in * int(config.get("expansion_factor", 32)))
    if (layout.d_in, layout.d_sae) != (config.get("d_in", layout.d_in), announced):
        raise SaeError(
            f"SAE {files.source}: cfg.json announces d_in {config.get('d_in')} and {announced} latents, "
            f"encoder.weight has {layout.d_in} and {layout.d_sae}; these files do not belong together"
        )
    return layout


def _check_present(layout: Layout) -> None:
    shapes = layout.weights.shapes
    if layout.encoder not in shapes or len(shapes[layout.encoder]) != 2:
        raise SaeError(
            f"SAE {layout.files.source}: {layout.files.weights.name} has no matrix {layout.encoder}; "
            f"found {', '.join(f'{name} {shape}' for name, shape in sorted(shapes.items()))}"
        )


def _check_shapes(layout: Layout) -> None:
    _check_present(layout)
    d_in, d_sae, shapes = layout.d_in, layout.d_sae, layout.weights.shapes
    config = layout.files.config
    for field, found in (("d_in", d_in), ("d_sae", d_sae)):
        if config.get(field, found) != found:
            raise SaeError(f"SAE {layout.files.source}: config says {field} {config[field]}, the weights have {found}")
    expected: dict[str, tuple[int, ...]] = {layout.encoder_bias: (d_sae,)}
    expected |= {n: (d_sae,) for n in (layout.threshold, layout.gain, layout.magnitude_bias) if n}
    if layout.subtract_decoder_bias:
        expected[layout.decoder_bias] = (d_in,)
    if layout.scale_by_decoder_norm:
        expected[layout.decoder] = (d_sae, d_in)
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            found_shape = shapes.get(name, "no such tensor")
            raise SaeError(
                f"SAE {layout.files.source}: {name} must have shape {shape}, {layout.files.weights.name} has "
                f"{found_shape}"
            )
    if layout.k is not None and not 0 < layout.k <= d_sae:
        raise SaeError(f"SAE {layout.files.source}: k is {layout.k}, of {d_sae} features")
    if layout.activation == "groupmax" and d_sae % cast(int, layout.k):
        raise SaeError(f"SAE {layout.files.source}: {d_sae} features do not split into {layout.k} equal groups")
