"""
The drift of every feature: what it is in the policy less what it is in the reference.

    on the pairs    both read the same held-out completions, and each is pooled as the cache pools
    in its speech   both complete the same prompts with the same random numbers, and the reference reads what either
                    wrote: what of a feature the policy has come to write

A cache with a top k knows nothing of the features that it left out, so both models are run. The mean over groups has an
error that is clustered by prompt, as a gap's is (see `gaps`).

Dimension key:  G groups   C prompts   K completions   F d_sae
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fpo.evaluation.correlation import pearson, spearman
from fpo.evaluation.estimates import FEWEST, Mean
from fpo.evaluation.gaps import Estimate
from fpo.evaluation.held_out import finite
from fpo.evaluation.pairs import prompt_digests
from fpo.evaluation.sampling import Sampling, Written, check_room, uniforms
from fpo.evaluation.speakers import engine_of
from fpo.recipe import Recipe
from fpo.scoring import (
    Layout,
    Packed,
    Sae,
    Scores,
    adapter_folder,
    install_scoring,
    load_model,
    load_sae,
    mixed_precision,
    model_folder,
    ordinary_forward,
    pack,
    positions,
    unwrapped,
)
from fpo.scoring.sae import read_decoder
from fpo.stage2_align.measure import Hookpoint, ObjectiveMeter
from fpo.stage2_align.policy import policy_layout, policy_model
from fpo.store import Cache, Groups
from fpo.store.format.ragged import starts_of

F64 = NDArray[np.float64]
Seen = Callable[[int], object]
"""Is told how many more groups are done."""

BATCH = 16
"""Groups at a time."""
AGREEMENT = ("slope", "r2", "rank_correlation")
FIT_TOKENS = 8192
"""Tokens that FVU and L0 are measured on: the first ones, the same for both models."""


class Fit(NamedTuple):
    """How an SAE fits what a model gives, on the same tokens."""

    fvu: float
    l0: float


class Drift(NamedTuple):
    """Of one hookpoint's features."""

    hookpoint: str
    n_groups: int
    n_prompts: int
    chosen: Estimate
    """(F,) of chosen completions."""
    rejected: Estimate
    """Of rejected ones, of a group their mean."""
    reference: Float[np.ndarray, "2 F"]
    """Mean activation of chosen and rejected in the reference."""
    fires: Float[np.ndarray, " F"]
    """Share of the completions on which either model has it."""
    policy_fit: Fit
    reference_fit: Fit


class Encoder(NamedTuple):
    """A model with scoring in it, and how it is measured rightly."""

    model: Any
    layout: Layout
    autocast: str | None
    saes: Sequence[Sae]
    targets: Sequence[int | None]
    """Which of `residuals` the decoder of each SAE is held against: of a transcoder another one than it reads."""

    @torch.inference_mode()
    def residuals(self, packed: Packed) -> list[Tensor]:
        """What each hookpoint gives where tokens that count are predicted; then what transcoders predict."""
        with mixed_precision(self.model.device, self.autocast):
            scores: Scores = self.model(**packed._asdict())
        return [packed.counting(residual) for residual in scores.residuals]

    def complete(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], numbers: F64, sampling: Sampling
    ) -> list[Written]:
        """What the model writes, while it answers ordinary calls."""
        with ordinary_forward(unwrapped(self.model)):
            return engine_of(self.model, tokenizer)(prompts, numbers, sampling)


def encoders(recipe: Recipe, cache: Cache, run: Path) -> tuple[Encoder, Encoder]:
    """
    Policy and reference of a run (or one of its checkpoints) with all hookpoints of its recipe.
    Raises ModelError where the reference is not at hand.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    saes = [load_sae(entry.sae, entry.hookpoint) for entry in recipe.features]
    predicted = [(sae.facts.predicts, sae) for sae in saes if sae.facts.predicts is not None]
    names = [*(entry.hookpoint for entry in recipe.features), *(name for name, _ in predicted)]
    of_names = [*saes, *(sae for _, sae in predicted)]
    hookpoints = tuple(Hookpoint(name, sae, None) for name, sae in zip(names, of_names, strict=True))
    targets = [None if sae.facts.predicts is None else names.index(sae.facts.predicts, len(saes)) for sae in saes]
    policy: Any = policy_model(recipe, ObjectiveMeter(recipe.objective, hookpoints, incomplete=False), run)
    ours = recipe.reference
    adapters = [adapter_folder(ours.adapter)] if ours.adapter else []
    reference = load_model(model_folder(ours.model, ours.revision), ours.dtype, adapters)
    install_scoring(reference, tuple(names))
    placed = [sae.to(device) for sae in saes]
    found = []
    for model, autocast in ((policy, recipe.policy_arithmetic().autocast), (reference, ours.arithmetic.autocast)):
        model.to(device)
        found.append(Encoder(model, policy_layout(model, cache), autocast, placed, targets))
    return found[0], found[1]


def drift_on_pairs(
    recipe: Recipe, cache: Cache, policy: Encoder, reference: Encoder, seen: Seen = lambda groups: None
) -> list[Drift]:
    """Of every hookpoint over all groups of a held-out cache, prompt by prompt."""
    groups = _by_prompt(cache)
    prompts = prompt_digests(groups)
    sums = [_DriftSums(sae.facts.d_sae) for sae in policy.saes]
    fits = [(_FitSums(entry.sae, entry.hookpoint), _FitSums(entry.sae, entry.hookpoint)) for entry in recipe.features]
    for start in range(0, len(groups), BATCH):
        rows = np.arange(start, min(start + BATCH, len(groups)))
        batch = groups.take(rows)
        residuals = [_read(encoder, batch) for encoder in (policy, reference)]
        counts = batch.counted.tolist()
        for place, (sae, target, own, fit) in enumerate(zip(policy.saes, policy.targets, sums, fits, strict=True)):
            acts = [sae.pooled_mean(read[place], counts).double().cpu().numpy() for read in residuals]
            own.add(acts[0], acts[1], batch, prompts[rows])
            for known, read in zip(fit, residuals, strict=True):
                known.add(sae, read[place], None if target is None else read[target])
        seen(len(batch))
    return [
        own.drift(entry.hookpoint, ours.fit(), theirs.fit())
        for entry, own, (ours, theirs) in zip(recipe.features, sums, fits, strict=True)
    ]


def drift_in_speech(
    policy: Encoder,
    reference: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seen: Seen = lambda groups: None,
) -> list[Estimate]:
    """
    (F,) of every hookpoint: what the reference reads of a feature in the policy's completions of these prompts (token
    ids, not empty, each once) less what it reads in its own.
    """
    check_room(prompts, sampling, positions(reference.model.config))
    sums = [_ClusterSums(sae.facts.d_sae) for sae in reference.saes]
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        numbers = [uniforms(sampling.seed, start + row, 0, 0, sampling.max_new_tokens) for row in range(len(batch))]
        written = [
            [one.tokens for one in encoder.complete(tokenizer, batch, np.stack(numbers), sampling)]
            for encoder in (policy, reference)
        ]
        read = [_read_texts(reference, batch, completions) for completions in written]
        clusters = np.arange(start, start + len(batch), dtype=np.uint64)
        for place, (sae, own) in enumerate(zip(reference.saes, sums, strict=True)):
            acts = [
                sae.pooled_mean(residuals[place], [len(tokens) for tokens in completions]).double().cpu().numpy()
                for residuals, completions in zip(read, written, strict=True)
            ]
            own.add(acts[0] - acts[1], clusters)
        seen(len(batch))
    return [own.estimate() for own in sums]


def agreement(gap: F64, drift: F64, seed: int = 0) -> dict[str, Any]:
    """
    How well gaps told drifts, over features: slope of the least squares drift = a + slope gap, its R^2 and the rank
    correlation, each with the interval between the 2.5th and 97.5th percentile of 1000 draws of as many features.
    Features of one model are not independent of each other, so the interval is of these features alone.

    gap, drift  of the same features, those of which something can be said
    """
    if len(gap) < FEWEST:
        return {"features": len(gap), **{name: {"value": None, "low": None, "high": None} for name in AGREEMENT}}
    rng = np.random.default_rng(seed)
    draws = np.array([_agreement(*np.stack([gap, drift])[:, rng.integers(0, len(gap), len(gap))]) for _ in range(1000)])
    # Of drifts that are all the same nothing is known, in no draw.
    known = np.isfinite(draws).any(0)
    low, high = np.full((2, len(AGREEMENT)), np.nan)
    low[known], high[known] = np.nanquantile(draws[:, known], [0.025, 0.975], axis=0)
    found = zip(AGREEMENT, _agreement(gap, drift), low, high, strict=True)
    means = {name: Mean(value, float(a), float(b))._asdict() for name, value, a, b in found}
    said: dict[str, Any] = finite({"features": len(gap), **means})
    return said


def _agreement(gap: F64, drift: F64) -> tuple[float, float, float]:
    around = gap - gap.mean()
    spread = float(around @ around)
    slope = float(around @ drift) / spread if spread > 0 else np.nan
    return slope, pearson(gap, drift).value ** 2, spearman(gap, drift).value


def _read_texts(
    encoder: Encoder, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Of prompts with a completion each."""
    segments = [part for pair in zip(prompts, completions, strict=True) for part in pair]
    ids = np.concatenate([np.asarray(part, dtype=np.int64) for part in segments])
    packed = pack(ids, starts_of([len(part) for part in segments]), np.ones(len(prompts), np.int64), encoder.layout)
    return encoder.residuals(packed.to(encoder.model.device))


def _by_prompt(cache: Cache) -> Groups:
    """All groups; those of one prompt behind each other."""
    reads = cache.columns
    cache.read_columns(())
    groups = Groups.concat([cache.shard(sid) for sid in range(len(cache.shard_groups))])
    cache.columns = reads
    return groups.take(np.argsort(prompt_digests(groups), kind="stable"))


def _read(encoder: Encoder, groups: Groups) -> list[Tensor]:
    packed = pack(groups.input_ids, groups.splits, groups.n_completions, encoder.layout, score_mask=groups.score_mask)
    return encoder.residuals(packed.to(encoder.model.device))


class _DriftSums:
    """What is summed over groups whose prompts come one after the other."""

    def __init__(self, d_sae: int) -> None:
        self.sides = [_ClusterSums(d_sae), _ClusterSums(d_sae)]
        self.reference = np.zeros((2, d_sae))
        self.fires = np.zeros(d_sae)
        self.n_completions = 0

    def add(self, policy: F64, reference: F64, groups: Groups, prompts: NDArray[np.uint64]) -> None:
        """(K, F) activations of these groups' completions."""
        starts = groups.completion_starts[:-1]
        others = np.repeat(1.0, len(policy))
        others[starts] = 0.0
        shares = others / np.repeat(np.maximum(groups.n_completions.astype(np.int64) - 1, 1), groups.n_completions)
        ours, theirs = ((acts[starts], np.add.reduceat(acts * shares[:, None], starts)) for acts in (policy, reference))
        for side, sums in enumerate(self.sides):
            sums.add(ours[side] - theirs[side], prompts)
            self.reference[side] += theirs[side].sum(0)
        self.fires += ((policy != 0) | (reference != 0)).sum(0)
        self.n_completions += len(policy)

    def drift(self, hookpoint: str, policy: Fit, reference: Fit) -> Drift:
        chosen, rejected = (side.estimate() for side in self.sides)
        n = self.sides[0].n
        return Drift(
            hookpoint,
            n,
            self.sides[0].n_clusters,
            chosen,
            rejected,
            self.reference / n,
            self.fires / self.n_completions,
            policy,
            reference,
        )


class _ClusterSums:
    """A mean over groups, and what its clustered error is made of."""

    def __init__(self, size: int) -> None:
        self.n, self.n_clusters, self.sizes_sq = 0, 0, 0.0
        self.total, self.sq, self.weighted = np.zeros(size), np.zeros(size), np.zeros(size)
        self._prompt: np.uint64 | None = None
        self._open, self._size = np.zeros(size), 0

    def add(self, values: F64, clusters: NDArray[np.uint64]) -> None:
        """(G, F) values of groups, those of one prompt together."""
        bounds = np.flatnonzero(np.append(True, clusters[1:] != clusters[:-1]))
        for start, stop in zip(bounds, [*bounds[1:], len(clusters)], strict=True):
            if clusters[start] != self._prompt:
                self._close()
                self._prompt = clusters[start]
            self._open += values[start:stop].sum(0)
            self._size += int(stop - start)

    def _close(self) -> None:
        if self._size:
            self.n += self._size
            self.n_clusters += 1
            self.sizes_sq += self._size**2
            self.total += self._open
            self.sq += self._open**2
            self.weighted += self._size * self._open
        self._open, self._size = np.zeros_like(self.total), 0

    def estimate(self) -> Estimate:
        """With no more to come."""
        self._close()
        mean = self.total / self.n
        around = self.sq - 2 * mean * self.weighted + mean**2 * self.sizes_sq
        df = max(self.n_clusters - 1, 1)
        error = np.sqrt(np.maximum(around, 0.0) * self.n_clusters / df) / self.n
        return Estimate(mean, error, df)


class _FitSums:
    """The tokens that an SAE's fit is measured on."""

    def __init__(self, sae: str, hookpoint: str) -> None:
        self.decoder = read_decoder(sae, hookpoint)
        self.kept: list[Tensor] = []
        self.wanted: list[Tensor] = []
        self.n = 0

    def add(self, sae: Sae, residual: Tensor, target: Tensor | None) -> None:
        """Up to FIT_TOKENS of what the model gives, and of what a transcoder's decoder is held against."""
        room = FIT_TOKENS - self.n
        if room > 0:
            self.sae = sae
            self.kept.append(residual[:room].float())
            self.n += len(self.kept[-1])
            if target is not None:
                self.wanted.append(target[:room].float())

    def fit(self) -> Fit:
        target = torch.cat(self.wanted) if self.wanted else None
        return Fit(*self.sae.fvu_and_l0(torch.cat(self.kept), self.decoder, target))
