"""EleutherAI's sparsify: one folder per hookpoint, named by the path inside the model."""

from __future__ import annotations

from typing import ClassVar, cast

from fpo.errors import SaeError
from fpo.scoring.hook_names import INPUT, from_sparsify
from fpo.scoring.sae.arrays import Activation, Decoder, SaeArrays, SaeFacts, SaeHeader
from fpo.scoring.sae.format import Format, SaeFiles, check_config_sizes, check_k, decoder_of

_ACTIVATIONS = ("topk", "groupmax")


class Sparsify(Format):
    """TopK or GroupMax of the input minus `b_dec`, or of a transcoder's input as it is."""

    name = "sparsify"
    title = "sparsify"
    weights = "sae.safetensors"
    config = "cfg.json"
    needs_config = True
    refuses: ClassVar = {
        "a transcoder in a folder that names no module": "its decoder can be held against no place; rename the folder",
        "signed: true": "its activations are signed; features here are never negative",
        "activation": f"supported: {', '.join(_ACTIVATIONS)}",
    }

    def claims(self, files: SaeFiles) -> bool:
        """`encoder.weight` or `W_dec`, and no `decoder.weight`."""
        shapes = files.tensors.shapes
        return not shapes.keys().isdisjoint({"encoder.weight", "W_dec"}) and "decoder.weight" not in shapes

    def facts(self, files: SaeFiles) -> SaeHeader:
        self._refuse_what_is_not_computed(files)
        config = files.config
        activation, k = config.get("activation", "topk"), int(config.get("k", 32))
        place, transcodes = from_sparsify(files.place), bool(config.get("transcode"))
        d_sae, d_in = files.matrix("encoder.weight")
        announced = int(config.get("num_latents") or d_in * int(config.get("expansion_factor", 32)))
        if (d_in, d_sae) != (config.get("d_in", d_in), announced):
            raise SaeError(
                f"SAE {files.source}: cfg.json announces d_in {config.get('d_in')} and {announced} latents, "
                f"encoder.weight has {d_in} and {d_sae}; these files do not belong together"
            )
        check_config_sizes(files, d_in, d_sae)
        files.check_shapes({"encoder.bias": (d_sae,), "b_dec": (d_in,)})
        check_k(files, k, d_sae)
        if activation == "groupmax" and d_sae % k:
            raise SaeError(f"SAE {files.source}: {d_sae} features do not split into {k} equal groups")
        return SaeHeader(
            SaeFacts(
                d_in=d_in,
                d_sae=d_sae,
                architecture=cast(Activation, activation),
                format=self.name,
                advertised_l0=float(k),
                hook_hint=f"{place}{INPUT}" if transcodes else place,
                predicts=place if transcodes else None,
            ),
            k=k,
            apply_b_dec_to_input=not transcodes,
        )

    def read(self, files: SaeFiles) -> SaeArrays:
        header, tensors = self.facts(files), files.tensors
        arrays = header.arrays(tensors.read("encoder.weight").T, tensors.read("encoder.bias"))
        return arrays.of_input_minus(tensors.read("b_dec")) if header.apply_b_dec_to_input else arrays

    def read_decoder(self, files: SaeFiles) -> Decoder:
        decoder = decoder_of(files, self.facts(files).facts, "W_dec", "b_dec")
        if "W_skip" not in files.tensors.shapes:
            return decoder
        files.check_shapes({"W_skip": (len(decoder.b), files.matrix("encoder.weight")[1])})
        return decoder._replace(skip=files.tensors.read("W_skip").T)

    def _refuse_what_is_not_computed(self, files: SaeFiles) -> None:
        config = files.config
        if config.get("transcode") and from_sparsify(files.place) is None:
            raise self.refuse(files, "a transcoder in a folder that names no module")
        if config.get("signed"):
            raise self.refuse(files, "signed: true")
        if (activation := config.get("activation", "topk")) not in _ACTIVATIONS:
            raise self.refuse(files, "activation", str(activation))
