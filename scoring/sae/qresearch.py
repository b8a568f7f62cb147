"""qresearch's SAE of DeepSeek R1 Distill Llama: Goodfire's encoder under other names."""

from __future__ import annotations

from fpo.scoring.sae.goodfire import Goodfire


class Qresearch(Goodfire):
    """As Goodfire."""

    name = "qresearch"
    title = "qresearch R1 Distill"
    weights = "*.pt"
    encoder = "encoder"
    decoder = "decoder"
