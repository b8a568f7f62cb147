"""Gemma Scope, the SAEs of Gemma 2: no configuration, everything beside the weights stands in the path."""

from __future__ import annotations

import re
from typing import ClassVar

from fpo.scoring.hook_names import from_gemma_scope, from_module_path
from fpo.scoring.sae.arrays import Decoder, SaeArrays, SaeFacts, SaeHeader
from fpo.scoring.sae.format import (
    UNSET_THRESHOLD,
    Format,
    SaeFiles,
    check_config_sizes,
    decoder_of,
    read_threshold,
)


class GemmaScope(Format):
    """JumpReLU of the raw input: it is not normalised, and `b_dec` is not subtracted."""

    name = "gemma_scope"
    title = "Gemma Scope"
    weights = "params.npz"
    config = "config.json"
    refuses: ClassVar = {
        "a transcoder that does not name its places": "Gemma Scope's read a norm's output without its gain, which no "
        "module gives",
        "a cross-layer transcoder": "it predicts several layers at once",
        "a crosscoder": "it reads several layers at once",
        "an embedding SAE": "it reads token embeddings before Gemma scales them",
        "architecture": "Gemma Scope SAEs are jump_relu",
        **UNSET_THRESHOLD,
    }

    def claims(self, files: SaeFiles) -> bool:
        """`W_enc` or `W_dec`, in either case."""
        return not _names(files).keys().isdisjoint({"w_enc", "w_dec"})

    def facts(self, files: SaeFiles) -> SaeHeader:
        self._refuse_what_is_no_sae(files)
        names = _names(files)
        d_in, d_sae = files.matrix(names.get("w_enc", "W_enc"))
        check_config_sizes(files, d_in, d_sae)
        files.check_shapes({names.get(name, name): (d_sae,) for name in ("b_enc", "threshold")})
        stated = files.config.get("l0")
        in_path = re.search(r"average_l0_(\d+(?:\.\d+)?)", files.place)
        hook, predicted = (files.config.get(f"hf_hook_point_{side}") for side in ("in", "out"))
        return SaeHeader(
            SaeFacts(
                d_in=d_in,
                d_sae=d_sae,
                architecture="jumprelu",
                format=self.name,
                advertised_l0=float(stated) if stated is not None else float(in_path[1]) if in_path else None,
                hook_hint=from_module_path(hook) if isinstance(hook, str) else from_gemma_scope(files.place),
                predicts=from_module_path(predicted) if self._transcodes(files) and predicted else None,
            )
        )

    def read(self, files: SaeFiles) -> SaeArrays:
        header, names, tensors = self.facts(files), _names(files), files.tensors
        W, b = tensors.read(names["w_enc"]), tensors.read(names["b_enc"])
        return header.arrays(W, b, threshold=read_threshold(self, files, names["threshold"]))

    def read_decoder(self, files: SaeFiles) -> Decoder:
        names, facts = _names(files), self.facts(files).facts
        decoder = decoder_of(files, facts, names.get("w_dec", "W_dec"), names.get("b_dec", "b_dec"))
        if (skip := "affine_skip_connection") not in files.tensors.shapes:
            return decoder
        files.check_shapes({skip: (facts.d_in, len(decoder.b))})
        return decoder._replace(skip=files.tensors.read(skip))

    def _refuse_what_is_no_sae(self, files: SaeFiles) -> None:
        place, config = files.place, files.config
        kind = str(config.get("type", ""))
        if re.search(r"(^|/|-)clt[^/]*(/|$)", place) or ("cross" in kind and "transcoder" in kind):
            raise self.refuse(files, "a cross-layer transcoder")
        if self._transcodes(files) and not (config.get("hf_hook_point_in") and config.get("hf_hook_point_out")):
            raise self.refuse(files, "a transcoder that does not name its places")
        if "crosscoder" in kind or re.search(r"(^|/)crosscoder[^/]*(/|$)", place):
            raise self.refuse(files, "a crosscoder")
        if re.search(r"/embedding/width_", place):
            raise self.refuse(files, "an embedding SAE")
        if (architecture := config.get("architecture", "jump_relu")) not in ("jump_relu", "jumprelu"):
            raise self.refuse(files, "architecture", str(architecture))

    def _transcodes(self, files: SaeFiles) -> bool:
        """Whether it reads one place and predicts another."""
        kind, affine = str(files.config.get("type", "")), files.config.get("affine_connection")
        named = re.search(r"(^|/|-)transcoder[^/]*(/|$)", files.place)
        return bool("transcoder" in kind or affine or named or "affine_skip_connection" in files.tensors.shapes)


def _names(files: SaeFiles) -> dict[str, str]:
    """The tensors' names by their lower case: Gemma Scope 2 writes w_enc, Gemma Scope W_enc."""
    return {name.lower(): name for name in files.tensors.shapes}
