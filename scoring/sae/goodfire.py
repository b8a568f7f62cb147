"""Goodfire's SAEs of Llama 3: one file without a configuration, its layer in the file's name."""

from __future__ import annotations

import re
from typing import ClassVar

from fpo.scoring.hook_names import from_transformer_lens
from fpo.scoring.sae.arrays import Decoder, SaeArrays, SaeFacts, SaeHeader
from fpo.scoring.sae.format import Format, SaeFiles, decoder_of


class Goodfire(Format):
    """ReLU of the raw input: no bias is subtracted. The layer stands behind an `l` that ends the file's name."""

    name = "goodfire"
    title = "Goodfire"
    weights = "*.pt*"
    encoder: ClassVar[str] = "encoder_linear"
    decoder: ClassVar[str] = "decoder_linear"

    def claims(self, files: SaeFiles) -> bool:
        """Weight and bias of `encoder_linear` and `decoder_linear` (qresearch: `encoder`, `decoder`), nothing else."""
        return files.tensors.shapes.keys() == {
            f"{linear}.{part}" for linear in (self.encoder, self.decoder) for part in ("weight", "bias")
        }

    def facts(self, files: SaeFiles) -> SaeHeader:
        d_sae, d_in = files.matrix(f"{self.encoder}.weight")
        files.check_shapes({f"{self.encoder}.bias": (d_sae,)})
        layer = re.search(r"\bl(\d+)$", files.weights.stem)
        return SaeHeader(
            SaeFacts(
                d_in=d_in,
                d_sae=d_sae,
                architecture="relu",
                format=self.name,
                advertised_l0=None,
                hook_hint=from_transformer_lens(f"blocks.{layer[1]}.hook_resid_post", "llama") if layer else None,
            )
        )

    def read(self, files: SaeFiles) -> SaeArrays:
        header, tensors = self.facts(files), files.tensors
        return header.arrays(tensors.read(f"{self.encoder}.weight").T, tensors.read(f"{self.encoder}.bias"))

    def read_decoder(self, files: SaeFiles) -> Decoder:
        facts = self.facts(files).facts
        return decoder_of(files, facts, f"{self.decoder}.weight", f"{self.decoder}.bias", transposed=True)
