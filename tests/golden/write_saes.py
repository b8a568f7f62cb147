"""
The golden SAEs: files that SAELens and sparsify wrote, with what these libraries say of fixed inputs.

    make .venv-oracles/installed && .venv-oracles/bin/python tests/golden/write_saes.py

Written once, by sae-lens 6.54.12 and eai-sparsify 1.3.3; `make test` reads them without either library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import sparsify
import torch

HERE = Path(__file__).parent / "saes"
D_IN, D_SAE = 8, 32
METADATA = {"hook_name": "blocks.1.hook_resid_post", "model_name": "llama"}
OF_TRANSCODERS = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.mlp.hook_out", "model_name": "llama"}


def inputs() -> torch.Tensor:
    return torch.randn(20, D_IN, generator=torch.Generator().manual_seed(1)) + 0.3


def write(name: str, folder: Path, acts: torch.Tensor, decoded: torch.Tensor) -> None:
    np.savez(folder / "expected.npz", x=inputs().numpy(), acts=acts.numpy(), decoded=decoded.numpy())
    print(name, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()), "bytes")


def write_saelens(architecture: str, **options: Any) -> None:
    kind, config = sae_lens.registry.get_sae_class(architecture)
    torch.manual_seed(2)
    transcodes = "transcoder" in architecture
    metadata = sae_lens.saes.sae.SAEMetadata(**(OF_TRANSCODERS if transcodes else METADATA))
    extra = {"d_out": D_IN, "apply_b_dec_to_input": False} if transcodes else {}
    sae = kind(config(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **extra, **options))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        if hasattr(sae, "threshold"):
            sae.threshold.abs_()
        folder = HERE / f"saelens-{architecture}"
        sae.save_model(str(folder))
        x = inputs()
        write(architecture, folder, sae.encode(x), sae(x))


def write_sparsify(activation: str) -> None:
    torch.manual_seed(3)
    made = sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(activation=activation, k=4, expansion_factor=4))
    with torch.no_grad():
        made.b_dec += torch.randn(D_IN)
        made.encoder.bias += torch.randn(D_SAE)
    folder = HERE / f"sparsify-{activation}"
    made.save_to_disk(folder / "layers.1")
    with torch.no_grad():
        encoded = made.encode(inputs())
        acts = torch.zeros(len(inputs()), D_SAE).scatter_(1, encoded.top_indices, encoded.top_acts)
        write(activation, folder, acts, made.decode(*encoded[:2]))


if __name__ == "__main__":
    for architecture in ("standard", "jumprelu", "gated", "transcoder", "jumprelu_skip_transcoder"):
        write_saelens(architecture)
    write_saelens("topk", k=4, rescale_acts_by_decoder_norm=True, normalize_activations="layer_norm")
    for activation in ("topk", "groupmax"):
        write_sparsify(activation)
