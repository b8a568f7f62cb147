"""Qwen Scope, the SAEs of Qwen 3: one file for each layer, and k in the repository's name alone."""

from __future__ import annotations

import re

from fpo.errors import SaeError
from fpo.scoring.hook_names import from_transformer_lens
from fpo.scoring.sae.arrays import Decoder, SaeArrays, SaeFacts, SaeHeader
from fpo.scoring.sae.format import Format, SaeFiles, check_k, decoder_of


class QwenScope(Format):
    """
    TopK of the raw input: `b_dec` is not subtracted, and a negative one of the k largest is 0. k stands in the name of
    the repository or folder, behind `L0_`.
    """

    name = "qwen_scope"
    title = "Qwen Scope"
    weights = "layer*.sae.pt"

    def claims(self, files: SaeFiles) -> bool:
        """`W_enc` with a row for each feature, `W_dec`, `b_enc` and `b_dec`, and nothing else."""
        shapes = files.tensors.shapes
        return shapes.keys() == {"W_enc", "W_dec", "b_enc", "b_dec"} and shapes["W_enc"][:1] == shapes["b_enc"]

    def facts(self, files: SaeFiles) -> SaeHeader:
        d_sae, d_in = files.matrix("W_enc")
        files.check_shapes({"b_enc": (d_sae,)})
        k = _stated_k(files)
        check_k(files, k, d_sae)
        layer = re.match(r"layer(\d+)\.", files.weights.name)
        return SaeHeader(
            SaeFacts(
                d_in=d_in,
                d_sae=d_sae,
                architecture="topk",
                format=self.name,
                advertised_l0=float(k),
                hook_hint=from_transformer_lens(f"blocks.{layer[1]}.hook_resid_post", "qwen3") if layer else None,
            ),
            k=k,
        )

    def read(self, files: SaeFiles) -> SaeArrays:
        header, tensors = self.facts(files), files.tensors
        return header.arrays(tensors.read("W_enc").T, tensors.read("b_enc"))

    def read_decoder(self, files: SaeFiles) -> Decoder:
        return decoder_of(files, self.facts(files).facts, "W_dec", "b_dec", transposed=True)


def _stated_k(files: SaeFiles) -> int:
    """Of the innermost folder that says it."""
    stated = re.findall(r"L0_(\d+)", files.place)
    if not stated:
        raise SaeError(
            f"SAE {files.source}: a TopK whose k no file says; Qwen writes it in the repository's name, so put "
            f"{files.weights.name} in a folder of that name, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50"
        )
    return int(stated[-1])
