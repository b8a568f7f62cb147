"""
Scoring groups with the reference: token ids in, the rows of a base and of its columns out.

The order of the work inside a shard is a pure function of the shard, so a shard has the same bytes whoever
computes it on the same machine, and in whatever order the shards are computed.

Dimension key:  G groups   K completions   N scored completion tokens   D hidden
"""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fpo.errors import ModelError
from fpo.recipe import Arithmetic
from fpo.scoring import (
    Kept,
    Layout,
    Packed,
    Sae,
    Scores,
    choose_layout,
    install_scoring,
    is_quantised,
    keep_top_features,
    load_model,
    mixed_precision,
    pack,
)
from fpo.stage1_cache.ahead import one_ahead
from fpo.store import Column, Features, HiddenGram, PromptFeatures, Spec, TokenLogps, TopLogits, Want
from fpo.store.format.groups import group_sizes, scored_splits, segment_lengths, segments_of
from fpo.store.format.ragged import gather, starts_of

Fetch = Callable[[], Column]
"""Fetches from the device what was launched there, and waits for it."""


@dataclass(frozen=True)
class TokenGroups:
    """Groups as token ids, see `pack`."""

    input_ids: np.ndarray
    splits: np.ndarray
    """(G+K+1,)"""
    n_completions: np.ndarray
    score_mask: np.ndarray | None
    """(N,)"""

    def __len__(self) -> int:
        return len(self.n_completions)


class Scorer(Protocol):
    """Says what the reference says of groups."""

    def score(
        self,
        groups: TokenGroups,
        wants: Sequence[Want],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Column]:
        """The rows of each want in the order of the groups; `progress` hears of (completions, tokens)."""

    def provenance(self) -> dict[str, Any]:
        """How they came to be, in JSON types."""


class ReferenceScorer:
    """The reference model, its SAEs, and the one forward that everything is read from."""

    def __init__(
        self,
        folder: Path,
        arithmetic: Arithmetic,
        adapters: list[Path],
        saes: dict[str, Sae],
        specs: Sequence[Spec],
        batch_tokens: int,
    ) -> None:
        """
        folder        the model's files; adapters are merged into it
        arithmetic    dtype of the weights, and the dtype of the autocast that they are computed under
        saes          by hookpoint
        specs         the columns to be scored besides log-probs
        batch_tokens  packed tokens per forward; changes speed and memory only
        Raises ModelError where the model cannot be loaded. `check` it on the data before it scores.
        """
        # Under torchrun each rank has its own GPU, under srun each task, which may see its own alone.
        local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
        gpus = torch.cuda.device_count()
        self.device = torch.device(f"cuda:{local % gpus}" if gpus else "cpu")
        model = load_model(folder, arithmetic.dtype, adapters).requires_grad_(False)
        # Quantised weights are put where they belong as they load, and some formats refuse to move.
        self.model = model if is_quantised(model) else model.to(self.device)
        self.arithmetic = arithmetic
        self.batch_tokens = batch_tokens
        self.saes = {hookpoint: sae.to(self.device) for hookpoint, sae in saes.items()}
        install_scoring(
            self.model,
            tuple(self.saes),
            max((spec["m"] for spec in specs if spec["kind"] == "top_logits"), default=0),
            hidden_sums=any(spec["kind"] == "hidden_gram" for spec in specs),
        )
        self.layout = Layout.PACKED

    def check(self, few: TokenGroups) -> None:
        """
        Choose the layout that is right for these groups, the data's longest and shortest (`scoring.extremes`), and look
        at what the hookpoints give. Raises ModelError where the model cannot be scored.
        """
        few, _ = cut_long(few, self.batch_tokens)
        self.layout = choose_layout(self.model, few.input_ids, few.splits, few.n_completions)
        self._check_widths()

    def score(
        self,
        groups: TokenGroups,
        wants: Sequence[Want],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Column]:
        """
        The rows of each want - log-probs, or a column of `specs` - in the order of the groups, of which there is one.

        progress  called with (completions, tokens) after each batch
        """
        pieces, owners = cut_long(groups, self.batch_tokens)
        parts: list[list[Column]] = []
        batches = list(micro_batches(pieces, self.batch_tokens))
        launched = ((batch := take(pieces, rows), self._score_batch(batch, wants)) for rows in batches)
        for (batch, _), columns in one_ahead(launched, lambda item: [fetch() for fetch in item[1]]):
            parts.append(columns)
            if progress is not None:
                progress(int(batch.n_completions.sum()), len(batch.input_ids))
        return [_of_groups(column, groups, owners) for column in _in_order(pieces, batches, parts)]

    def provenance(self) -> dict[str, Any]:
        """How its rows came to be."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
            "attention": self.model.config._attn_implementation,
            "batch_tokens": self.batch_tokens,
            "layout": str(self.layout),
        }

    @torch.inference_mode()
    def _check_widths(self) -> None:
        """ModelError where a hookpoint does not give what its SAE reads."""
        packed = self.packed(TokenGroups(np.array([0, 0]), np.array([0, 1, 2]), np.array([1]), None))
        residuals = self.model(**packed._asdict()).residuals
        for (hookpoint, sae), residual in zip(self.saes.items(), residuals, strict=True):
            if residual.shape[-1] != sae.facts.d_in:
                raise ModelError(
                    f"hookpoint {hookpoint} gives {residual.shape[-1]} numbers per token, "
                    f"its SAE reads {sae.facts.d_in}"
                )

    @torch.inference_mode()
    def _score_batch(self, groups: TokenGroups, wants: Sequence[Want]) -> list[Fetch]:
        """Forward and encode. Another thread fetches what is launched here: the next batch need not wait for it."""
        prompts = any(want is not None and want["kind"] == "prompt_features" for want in wants)
        host = self._pack(groups, prompts)
        packed = host.to(self.device)
        with mixed_precision(self.device, self.arithmetic.autocast):
            scores: Scores = self.model(**packed._asdict())
        return [self._column(want, scores, packed, host) for want in wants]

    def _column(self, want: Want, scores: Scores, packed: Packed, host: Packed) -> Fetch:
        """How the rows of a want get from the device to the host."""
        splits = _splits(host.lengths)
        if want is None:
            token_logps = scores.token_logps
            return lambda: TokenLogps(splits, _numpy(token_logps, np.float32))
        match want["kind"]:
            case "features":
                residual = packed.counting(scores.residuals[self._place(want)])
                kept = self._kept(want, residual, host.counts)
                return lambda: _features(Features, kept)
            case "prompt_features":
                kept = self._kept(want, scores.prompt_residuals[self._place(want)], host.prompt_lengths)
                return lambda: _features(PromptFeatures, kept)
            case "top_logits":
                indices, logps = scores.top_indices[:, : want["m"]], scores.top_logps[:, : want["m"]]
                return lambda: TopLogits(splits, _numpy(indices, np.uint32), _numpy(logps, np.float32))
            case "hidden_gram":
                assert scores.hidden_sums is not None
                sums = scores.hidden_sums
                return lambda: HiddenSums(np.arange(len(sums) + 1, dtype=np.uint64), _numpy(sums, np.float32))
        raise AssertionError(want)

    def _place(self, spec: Spec) -> int:
        return list(self.saes).index(spec["hookpoint"])

    def _kept(self, spec: Spec, residual: Tensor, lengths: Tensor) -> Kept:
        return keep_top_features(self.saes[spec["hookpoint"]], residual, lengths.tolist(), spec["top_k"])

    def packed(self, groups: TokenGroups) -> Packed:
        """The groups as the model reads them, on its device."""
        return self._pack(groups, prompts=False).to(self.device)

    def _pack(self, groups: TokenGroups, prompts: bool) -> Packed:
        return pack(
            groups.input_ids,
            groups.splits,
            groups.n_completions,
            self.layout,
            score_mask=groups.score_mask,
            prompts=prompts,
        )


def take(groups: TokenGroups, rows: np.ndarray) -> TokenGroups:
    """These groups, in this order."""
    tokens, splits = gather(groups.splits, segments_of(groups.n_completions, rows))
    mask = groups.score_mask
    if mask is not None:
        starts = starts_of(groups.n_completions)
        mask = mask[gather(scored_splits(groups.splits, groups.n_completions), gather(starts, rows)[0])[0]]
    return TokenGroups(groups.input_ids[tokens], splits, groups.n_completions[rows], mask)


def micro_batches(groups: TokenGroups, batch_tokens: int) -> Iterator[np.ndarray]:
    """
    Rows of a shard in batches of at most `batch_tokens` tokens (at least one group), longest groups first, so that
    groups of a batch are about as long as each other and the largest batch comes first.
    """
    sizes = group_sizes(groups.splits, groups.n_completions)
    batch: list[int] = []
    filled = 0
    for row in np.argsort(-sizes, kind="stable"):
        if batch and filled + sizes[row] > batch_tokens:
            yield np.array(batch)
            batch, filled = [], 0
        batch.append(int(row))
        filled += int(sizes[row])
    if batch:
        yield np.array(batch)


def cut_long(groups: TokenGroups, batch_tokens: int) -> tuple[TokenGroups, np.ndarray]:
    """
    Groups of more tokens than a forward takes are cut into several behind the same prompt, of at least one completion
    each, so that memory does not go with the number of completions. The groups, and which one each was cut from.
    """
    n_completions = np.asarray(groups.n_completions, dtype=np.int64)
    if (group_sizes(groups.splits, n_completions) <= batch_tokens).all():
        return groups, np.arange(len(groups))
    prompts, completions = segment_lengths(groups.splits, n_completions)
    starts = starts_of(n_completions)
    counts, owners, segments = [], [], []
    for row, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
        for first, last in _runs(completions[start:end].tolist(), batch_tokens - int(prompts[row])):
            counts.append(last - first)
            owners.append(row)
            prompt = start + row  # among the segments, of which each group before this one has a prompt's, too
            segments += [prompt, *range(prompt + 1 + first, prompt + 1 + last)]
    tokens, splits = gather(groups.splits, np.array(segments, dtype=np.int64))
    # The completions stand in the same order as before, and so does the mask.
    cut = TokenGroups(groups.input_ids[tokens], splits, np.array(counts, dtype=np.uint32), groups.score_mask)
    return cut, np.array(owners)


def _runs(sizes: list[int], room: int) -> Iterator[tuple[int, int]]:
    """Completions in runs that fit, at least one each: first and end of every run."""
    first = filled = 0
    for at, size in enumerate(sizes):
        if at > first and filled + size > room:
            yield first, at
            first, filled = at, 0
        filled += size
    yield first, len(sizes)


@dataclass(frozen=True, eq=False)
class HiddenSums(Column):
    """What a hidden gram is made of: of each completion the sum of its last hidden states."""

    PER = "completion"
    ENTRIES = ("sums",)

    sums: np.ndarray
    """(K, D)"""


def _of_groups(column: Column, groups: TokenGroups, owners: np.ndarray) -> Column:
    """What was scored of cut groups, as the rows of the groups themselves."""
    if isinstance(column, HiddenSums):
        return hidden_gram(column.sums, groups.n_completions)
    if column.PER == "completion":
        return column
    return column.take(np.searchsorted(owners, np.arange(len(groups))))


def hidden_gram(sums: np.ndarray, n_completions: np.ndarray) -> HiddenGram:
    """Inner products of the completions of each group: (K, D), (G,) -> a row of n * n per group."""
    products = []
    for own in np.split(sums.astype(np.float64), starts_of(n_completions)[1:-1]):
        gram = own @ own.T
        # Exactly symmetric, whatever the kernel's order of summation.
        products.append(((gram + gram.T) / 2).astype(np.float32).reshape(-1))
    return HiddenGram(starts_of([len(part) for part in products]).astype(np.uint64), np.concatenate(products))


def _features(kind: type[Features], kept: Kept) -> Features:
    pooled = kept.cpu().ragged()
    return kind(
        splits=_splits(pooled.counts),
        indices=_numpy(pooled.indices, np.uint32),
        acts=_numpy(pooled.acts, np.float32),
        active=_numpy(pooled.active, np.uint32),
        tail_sq=_numpy(pooled.tail_sq, np.float32),
    )


def _numpy(tensor: Tensor, dtype: Any) -> np.ndarray:
    return tensor.cpu().numpy().astype(dtype)


def _splits(lengths: Tensor) -> np.ndarray:
    return starts_of(lengths.cpu().numpy()).astype(np.uint64)


def _in_order(groups: TokenGroups, batches: list[np.ndarray], parts: list[list[Column]]) -> list[Column]:
    """The rows of all batches, put back into the order of the groups."""
    starts = starts_of(groups.n_completions)
    rows = np.concatenate(batches)
    of_groups, of_completions = np.argsort(rows), np.argsort(gather(starts, rows)[0])
    columns = []
    for same in zip(*parts, strict=True):
        column = type(same[0]).concat(same)
        columns.append(column.take(of_groups if column.PER == "group" else of_completions))
    return columns
