"""The attention SAEs of GPT-2 by Connor Kissane and Robert Krzyzanowski, and what else their trainer wrote."""

from __future__ import annotations

from fpo.scoring.hook_names import from_transformer_lens
from fpo.scoring.sae.arrays import Decoder, SaeArrays, SaeFacts, SaeHeader
from fpo.scoring.sae.format import Format, SaeFiles, check_config_sizes, decoder_of


class ConnorRob(Format):
    """ReLU of the input minus `b_dec`. `hook_z` is the attention heads' outputs side by side."""

    name = "connor_rob"
    title = "Connor & Rob, GPT-2 `hook_z`"
    weights = "*.pt"
    config = "*_cfg.json"
    needs_config = True

    def claims(self, files: SaeFiles) -> bool:
        """`W_enc` with a column for each feature, `W_dec`, `b_enc` and `b_dec`, and nothing else."""
        shapes = files.tensors.shapes
        return shapes.keys() == {"W_enc", "W_dec", "b_enc", "b_dec"} and shapes["W_enc"][1:] == shapes["b_enc"]

    def facts(self, files: SaeFiles) -> SaeHeader:
        config = files.config
        d_in, d_sae = files.matrix("W_enc")
        check_config_sizes(files, d_in, d_sae, names=("act_size", "dict_size"))
        files.check_shapes({"b_enc": (d_sae,), "b_dec": (d_in,)})
        hook = config.get("act_name")
        return SaeHeader(
            SaeFacts(
                d_in=d_in,
                d_sae=d_sae,
                architecture="relu",
                format=self.name,
                advertised_l0=None,
                hook_hint=from_transformer_lens(str(hook), str(config.get("model_name", "gpt2"))) if hook else None,
            ),
            apply_b_dec_to_input=True,
        )

    def read(self, files: SaeFiles) -> SaeArrays:
        header, tensors = self.facts(files), files.tensors
        arrays = header.arrays(tensors.read("W_enc"), tensors.read("b_enc"))
        return arrays.of_input_minus(tensors.read("b_dec"))

    def read_decoder(self, files: SaeFiles) -> Decoder:
        return decoder_of(files, self.facts(files).facts, "W_dec", "b_dec")
