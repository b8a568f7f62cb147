"""
Before the first step, where the policy starts as the reference, its scores must reproduce the cached ones: other
weights, another dtype, dropout or a changed library stop here with both values, not after a day of training.

The model is asked as Trainer prepared it - sharded, under its own autocast - so what is held against the cache is
what the first step computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fpo.errors import ParityError
from fpo.recipe import Arithmetic
from fpo.scoring import LOGPS_TOLERANCE, Packed, Scores, pack
from fpo.stage2_align.adapters import without_prompt
from fpo.stage2_align.measure import Hookpoint, ObjectiveMeter
from fpo.stage2_align.stream import PairStream
from fpo.stage2_align.trainer import PairTrainer
from fpo.store import Features, Groups

PARITY_PAIRS = 32
# They come from this many shards, or from as many as hold them: behind a URL each one is a fetch.
PARITY_SHARDS = 4
# |mean over completions| of a completion's mean signed difference, nats per token. Rounding has no sign, so what is
# left of it over 64 completions is below a third of this; an offset has one, and grows with every token of a logratio.
OFFSET_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-3, "float16": 1e-3}
# Where the recipe lets another arithmetic pass, its rounding is that much larger.
OTHER_ARITHMETIC = 5


class ParityCheck(TrainerCallback):
    """`check_parity` on the model of a trainer when training begins; before all other callbacks."""

    def __init__(self, trainer: PairTrainer, arithmetic: tuple[Arithmetic, Arithmetic]) -> None:
        """
        arithmetic  what the policy computes in, and what the reference was computed in
        """
        self.trainer, self.arithmetic = trainer, arithmetic
        self.difference: float | None = None
        """Mean |difference| of the token log-probs, nats; None until it was measured."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        model, stream, meter = self.trainer.model_wrapped, self.trainer.stream, self.trainer.meter
        with without_prompt(self.trainer.model):
            self.difference = check_parity(model, meter, stream, self.arithmetic, args.device)


@torch.no_grad()
def check_parity(
    model: nn.Module,
    meter: ObjectiveMeter,
    stream: PairStream,
    arithmetic: tuple[Arithmetic, Arithmetic],
    device: torch.device,
) -> float:
    """
    Score random pairs of the stream's cache with the policy, in batches of the size of training's. Every process
    scores the same ones. Returns the mean absolute difference of the token log-probs, in nats. Raises ParityError
    where it, the mean signed difference, or that of the pooled features, is above what the arithmetic explains.

    model       with scoring installed, as training calls it
    arithmetic  the policy's and the reference's
    """
    model.eval()
    pairs = random_pairs(stream, PARITY_PAIRS)
    apart: list[Tensor] = []
    features: list[list[Tensor]] = [[] for _ in meter.hookpoints]
    for batch in _batches(pairs, stream.per_device):
        here = pack(batch.input_ids, batch.splits, batch.n_completions, stream.layout, score_mask=batch.score_mask)
        packed = here.to(device)
        scores: Scores = model(**packed._asdict())
        ours, stored = scores.token_logps.cpu(), torch.from_numpy(batch.token_logps)
        apart.append(here.counting(ours.double() - stored.double()))
        cached = [column for column in batch.columns if isinstance(column, Features)]
        given = zip(meter.hookpoints, scores.residuals, cached, strict=True)
        for found, (hookpoint, residual, column) in zip(features, given, strict=True):
            found.append(_feature_distance(hookpoint, residual, packed, column))
    difference = torch.cat(apart)
    _check_logps(difference, pairs, arithmetic, stream.cache.key)
    for hookpoint, found in zip(meter.hookpoints, features, strict=True):
        _check_features(torch.stack(found).sum(0).tolist(), hookpoint, arithmetic)
    return float(difference.abs().mean())


def random_pairs(stream: PairStream, count: int) -> Groups:
    """So many pairs of a few shards of the stream's cache, all drawn by its seed."""
    rng = np.random.default_rng(stream.seed)
    offsets = np.concatenate([[0], np.cumsum(stream.cache.shard_groups)])
    order = rng.permutation(len(offsets) - 1)
    enough = int(np.searchsorted(np.cumsum(np.diff(offsets)[order]), count)) + 1
    drawn = np.sort(order[: max(enough, PARITY_SHARDS)])
    stream.cache.prefetch(drawn.tolist())
    rows = np.concatenate([np.arange(offsets[sid], offsets[sid + 1]) for sid in drawn])
    return stream.rows(rng.choice(rows, min(count, len(rows)), replace=False))


def _batches(pairs: Groups, size: int) -> Iterator[Groups]:
    for start in range(0, len(pairs), size):
        yield pairs.take(np.arange(start, min(start + size, len(pairs))))


def _check_logps(apart: Tensor, pairs: Groups, arithmetic: tuple[Arithmetic, Arithmetic], key: str) -> None:
    """
    apart  (N,) policy minus cache of every token that counts, completion by completion
    """
    tolerance = _tolerance(LOGPS_TOLERANCE, arithmetic)
    offset_tolerance = _tolerance(OFFSET_TOLERANCE, arithmetic) * (1 if len(set(arithmetic)) == 1 else OTHER_ARITHMETIC)
    completions = apart.split(pairs.counted.tolist())
    signed = torch.stack([part.mean() if len(part) else apart.new_zeros(()) for part in completions])
    size, offset = float(apart.abs().mean()), float(signed.mean())
    if size <= tolerance and abs(offset) <= offset_tolerance:
        return
    what = f"differ by {size:.4g} nats on average (at most {tolerance:g})"
    if size <= tolerance:
        what = f"are off by {offset:+.2g} nats on average, in one direction (at most {offset_tolerance:g})"
    worst = int(signed.abs().argmax())
    row = int(np.searchsorted(pairs.completion_starts, worst, side="right")) - 1
    place = worst - int(pairs.completion_starts[row])
    pair = pairs.n_completions[row] == 2
    which = (
        f"pair {pairs.group_id[row]}, {('chosen', 'rejected')[place]}"
        if pair
        else (f"group {pairs.group_id[row]}, completion {place + 1}")
    )
    cached = float(pairs.ref_logps[worst])
    ours = cached + float(completions[worst].sum())
    raise ParityError(
        f"the policy does not reproduce the cached reference: token log-probs {what}\n"
        f"  {which}: {ours:.4f} by the policy, {cached:.4f} in the "
        f"cache {key[:12]}\n"
        "  the policy starts from reference.model: was it changed, or does it not compute as the reference did?"
    )


def _tolerance(of: dict[str, float], arithmetic: tuple[Arithmetic, Arithmetic]) -> float:
    """That of the coarser of the two."""
    return max(of[side.precision] for side in arithmetic)


def _feature_distance(hookpoint: Hookpoint, residual: Tensor, packed: Packed, cached: Features) -> Tensor:
    """(2,) sum of |policy - cache| over the cached activations, and sum of those."""
    pooled = hookpoint.sae.pooled_mean(packed.counting(residual), packed.counts.tolist())
    counts = torch.from_numpy(np.diff(cached.splits.astype(np.int64)))
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    stored = torch.from_numpy(cached.acts).double()
    ours = pooled.cpu().double()[rows, torch.from_numpy(cached.indices.astype(np.int64))]
    return torch.stack([(ours - stored).abs().sum(), stored.abs().sum()])


def _check_features(sums: list[float], hookpoint: Hookpoint, arithmetic: tuple[Arithmetic, Arithmetic]) -> None:
    tolerance = _tolerance(LOGPS_TOLERANCE, arithmetic)
    apart, size = sums
    difference = apart / size if size else 0.0
    if not difference <= tolerance:
        raise ParityError(
            f"the policy does not reproduce the cached features of {hookpoint.name}: they differ by "
            f"{100 * difference:.2g} % on average (at most {100 * tolerance:g} %)\n"
            "  the SAE and the weights are the cache's; is the policy's dtype or attention another?"
        )
