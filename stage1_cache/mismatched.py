"""
Completions behind prompts that they do not answer: KTO takes its reference point from how likely they are. Which one
stands behind which prompt is fixed when the cache is built, so that the reference need not be there in training.

Dimension key:  G groups   N tokens of the mismatched completions   C those of them that are scored
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fpo.stage1_cache.identity import CacheIdentity
from fpo.stage1_cache.score import ReferenceScorer, TokenGroups
from fpo.store import Mismatched, TokenLogps
from fpo.store.format.groups import summed_logps
from fpo.store.format.ragged import starts_of


def score_mismatched(
    identity: CacheIdentity, rows: np.ndarray, scorer: ReferenceScorer, advance: Callable[[int, int], None]
) -> Mismatched:
    """
    The column's rows for these groups. Behind a group's prompt stands the first completion of the nearest group before
    it in the dataset that has another prompt, before the first the last: TRL's KTOTrainer turns a batch by one row,
    whatever the prompts.
    """
    paired = _paired(identity, rows)
    (logps,) = scorer.score(paired.groups, [None], lambda _, n_tokens: advance(0, n_tokens))
    assert isinstance(logps, TokenLogps)
    counts = paired.score_mask[paired.scored]
    return Mismatched(
        splits=starts_of(paired.sizes).astype(np.uint64),
        input_ids=paired.groups.input_ids[paired.of_completions],
        score_mask=paired.score_mask,
        ref_logps=summed_logps(logps.logps, logps.splits.astype(np.int64), counts),
    )


@dataclass(frozen=True)
class _Paired:
    """Prompts with their mismatched completions."""

    groups: TokenGroups
    """One completion each."""
    sizes: np.ndarray
    """(G,) tokens of each completion."""
    of_completions: np.ndarray
    """(T,) which of the groups' tokens are completions'."""
    score_mask: np.ndarray
    """(N,) which of the completions' tokens count."""
    scored: np.ndarray
    """(N,) which of them are scored: all but the first behind an empty prompt."""


def _paired(identity: CacheIdentity, rows: np.ndarray) -> _Paired:
    tokens, bounds = identity.tokens, identity.tokens.splits.astype(np.int64)
    prompts, completions = identity.lengths
    # No longer than a prompt with a completion of its own can be in these data: what fits there fits here.
    longest = int(identity.sizes.max())
    before = identity.answered_before[rows]
    firsts = identity.completion_starts[before]
    sizes = np.minimum(completions[firsts], longest - prompts[rows])
    segments = starts_of(tokens.n_completions.astype(np.int64) + 1)[:-1]
    starts = np.stack([bounds[segments[rows]], bounds[segments[before] + 1]], axis=1).reshape(-1)
    spans = np.stack([prompts[rows], sizes], axis=1).reshape(-1)
    splits = starts_of(spans)
    at = np.repeat(starts - splits[:-1], spans) + np.arange(splits[-1])
    side = np.repeat(np.arange(len(spans)), spans)
    place = np.arange(splits[-1]) - splits[side]
    own = side % 2 == 1
    group, place = side[own] // 2, place[own]
    scored = (prompts[rows][group] > 0) | (place > 0)
    counts = np.ones(len(place), dtype=np.uint8)
    if tokens.score_mask is not None:
        # Behind an empty prompt of its own a completion's first token has no entry in the mask: it counts.
        shifted = place - (prompts[before][group] == 0)
        counts[shifted >= 0] = tokens.score_mask[(identity.scored_splits[firsts][group] + shifted)[shifted >= 0]]
    counts[~scored] = 0
    groups = TokenGroups(tokens.input_ids[at], splits.astype(np.uint64), np.ones(len(rows), np.uint32), None)
    return _Paired(groups, sizes, own, counts, scored)
