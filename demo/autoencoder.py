"""
The demo's sparse autoencoder: BatchTopK on the output of one layer of the language model, exported as a
JumpReLU in SAELens' format. Trained on inputs scaled to mean norm sqrt(d_in); the scale is folded out of the
export, which therefore reads raw activations.

Dimension key:  N tokens   D hidden (d_in)   F features (d_sae)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fpo.demo.grammar import STORIES, Story
from fpo.demo.language_model import pad_stories

_SAELENS_VERSION = "6.0.0"  # the version of the format: readers take older ones for a flat config


@dataclass(frozen=True)
class AutoencoderSettings:
    layer: int = 3
    """The hookpoint is the output of `model.layers.<layer>`."""

    d_sae: int = 1024
    k: int = 16
    """Features per token that training keeps, on the average over a batch."""

    stories: int = 800
    steps: int = 600
    batch_size: int = 512
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    threshold_decay: float = 0.99
    heldout_stories: int = 100


@dataclass(frozen=True)
class JumpReluSae:
    """f = h * (h > threshold) with h = (x - b_dec) @ W_enc + b_enc; x is about f @ W_dec + b_dec; float32."""

    W_enc: Float[Tensor, "D F"]
    b_enc: Float[Tensor, " F"]
    W_dec: Float[Tensor, "F D"]
    b_dec: Float[Tensor, " D"]
    threshold: Float[Tensor, " F"]

    def encode(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
        h = (x - self.b_dec) @ self.W_enc + self.b_enc
        return h * (h > self.threshold)

    def decode(self, f: Float[Tensor, "N F"]) -> Float[Tensor, "N D"]:
        return f @ self.W_dec + self.b_dec


@dataclass(frozen=True)
class SaeQuality:
    l0: float
    """Mean number of features that are not zero, per token."""
    fvu: float
    """Fraction of the variance that the reconstruction leaves unexplained."""
    dead: int
    """Features that no held-out token activates."""


def train_autoencoder(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: AutoencoderSettings, seed: int
) -> tuple[JumpReluSae, SaeQuality]:
    """Record activations on fresh stories, train, and measure on stories that training has not seen."""
    rng = np.random.default_rng([seed, 2])
    stories = [STORIES.sample(rng) for _ in range(settings.stories + settings.heldout_stories)]
    x = record_activations(model, tokenizer, stories[: settings.stories], settings.layer)
    sae = _train(x, settings, seed)
    heldout = record_activations(model, tokenizer, stories[settings.stories :], settings.layer)
    return sae, measure(sae, heldout)


@torch.no_grad()
def record_activations(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stories: Sequence[Story], layer: int
) -> Float[Tensor, "N D"]:
    """The layer's output at every token of the stories except `<s>`, before any later normalisation."""
    captured: list[Tensor] = []
    # Not hidden_states: its last entry is taken after the final norm.
    hook = model.model.layers[layer].register_forward_hook(
        lambda module, args, output: captured.append(output[0] if isinstance(output, tuple) else output)
    )
    parts = []
    try:
        for start in tqdm(range(0, len(stories), 64), desc="activations", unit="batch", disable=None):
            padded = pad_stories(tokenizer, stories[start : start + 64])
            model.model(input_ids=padded.clamp(min=0), use_cache=False)
            parts.append(captured.pop()[:, 1:][padded[:, 1:] >= 0])
    finally:
        hook.remove()
    return torch.cat(parts)


@torch.no_grad()
def measure(sae: JumpReluSae, x: Float[Tensor, "N D"]) -> SaeQuality:
    f = sae.encode(x)
    unexplained = (x - sae.decode(f)).square().sum() / (x - x.mean(0)).square().sum()
    return SaeQuality(float((f > 0).sum(1).float().mean()), float(unexplained), int((f == 0).all(0).sum()))


def save_saelens(sae: JumpReluSae, folder: Path, quality: SaeQuality, hookpoint: str, model_name: str) -> None:
    """`cfg.json` and `sae_weights.safetensors` as SAELens 6 writes them; `metadata.l0` advertises the L0."""
    d_in, d_sae = sae.W_enc.shape
    layer = int(hookpoint.rsplit(".", 1)[1])
    config = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _SAELENS_VERSION,
            "model_name": model_name,
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "hf_hook_name": hookpoint,
            "prepend_bos": True,
            "training_architecture": "batchtopk",
            "l0": round(quality.l0, 4),
            "fvu": round(quality.fvu, 6),
        },
    }
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: getattr(sae, name).contiguous() for name in sorted(JumpReluSae.__dataclass_fields__)}
    save_file(tensors, folder / "sae_weights.safetensors")


def _train(raw: Float[Tensor, "N D"], settings: AutoencoderSettings, seed: int) -> JumpReluSae:
    scale = raw.shape[1] ** 0.5 / float(raw.norm(dim=1).mean())
    x, total_variance = raw * scale, float((raw * scale).var(0).sum())
    generator = torch.Generator().manual_seed(seed)
    W_dec = _unit_rows(torch.randn(settings.d_sae, x.shape[1], generator=generator))
    W_enc, b_enc, b_dec = W_dec.T.clone(), torch.zeros(settings.d_sae), x[: settings.batch_size * 8].mean(0)
    parameters = [tensor.requires_grad_() for tensor in (W_enc, b_enc, W_dec, b_dec)]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    threshold = 0.0
    for step in tqdm(range(settings.steps), desc="autoencoder", unit="step", disable=None):
        batch = x[torch.randint(len(x), (settings.batch_size,), generator=generator)]
        f, smallest = _batch_topk((batch - b_dec) @ W_enc + b_enc, settings.k)
        loss = (batch - f @ W_dec - b_dec).square().sum(1).mean() / total_variance
        optimizer.zero_grad()
        loss.backward()
        _keep_unit_rows(W_dec, optimizer, parameters)
        schedule.step()
        decay = min(settings.threshold_decay, step / (step + 1))  # a plain mean until the decay takes over
        threshold = decay * threshold + (1 - decay) * smallest
    with torch.no_grad():
        return JumpReluSae(
            W_enc.detach(),
            b_enc.detach() / scale,
            W_dec.detach(),
            b_dec.detach() / scale,
            torch.full((settings.d_sae,), threshold / scale),
        )


def _batch_topk(h_NF: Tensor, k: int) -> tuple[Tensor, float]:
    """Keep the N * k largest positive values of the batch; the second value is the smallest one kept."""
    positive = h_NF.relu()
    kept = positive.detach().flatten().topk(len(h_NF) * k, sorted=False).values
    smallest = float(kept[kept > 0].min())
    return positive * (positive >= smallest), smallest


def _keep_unit_rows(W_dec: Tensor, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    """A step that neither grows nor shrinks decoder rows: their scale belongs to the features."""
    assert W_dec.grad is not None
    with torch.no_grad():
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        W_dec.copy_(_unit_rows(W_dec))


def _unit_rows(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _rate(step: int, settings: AutoencoderSettings) -> float:
    """Linear warm-up, flat, linearly to zero over the last fifth."""
    return min(1.0, (step + 1) / settings.warmup_steps, (settings.steps - step) / (0.2 * settings.steps))
