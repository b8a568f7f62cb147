"""
Pairs to look at: their text with the activations of one feature, token by token. A cache keeps means over completions
alone, so the reference scores just these pairs again.

Dimension key:  N scored tokens   D d_in   K features
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fpo.errors import CacheConflict
from fpo.evaluation.pairs import PAIRING, Pairs
from fpo.evaluation.top_pairs import TopPair
from fpo.progress import say
from fpo.recipe import Recipe
from fpo.scoring import extremes, mixed_precision
from fpo.scoring.models import load_tokenizer
from fpo.stage1_cache.build import reference_scorer
from fpo.stage1_cache.identity import tokenizer_source
from fpo.stage1_cache.recompute import identity_of_scorer
from fpo.stage1_cache.score import ReferenceScorer, TokenGroups, micro_batches, take
from fpo.stage2_align.units import units_of
from fpo.store import Cache, Groups, Spec

WINDOW = 40
"""Tokens of a completion that are shown, around the one on which the feature is strongest."""
PROMPT_CHARACTERS = 240
"""Of a prompt its end is shown."""


class Passage(NamedTuple):
    """A stretch of a completion, as the feature reads it: what is encoded where the next token is predicted."""

    tokens: tuple[str, ...]
    """Begins with the prompt's last token, where the stretch begins with the completion."""
    heat: tuple[float, ...]
    """Activation on each; of the completion's last one there is none, since nothing is predicted from it."""
    start: int
    """How many tokens stand before the first that is shown."""
    of: int
    """How many there are in all."""
    act: float
    """Mean activation over the tokens that count, whether the cache's top k kept it or not."""


class Example(NamedTuple):
    """A pair as one feature sees it."""

    group_id: int
    prompt: str
    chosen: Passage
    rejected: Passage
    chosen_cached: float
    rejected_cached: float
    """Mean activations as the cache has them: 0 where its top k left them out."""


def at_hand(recipe: Recipe) -> bool:
    """Whether the reference's weights are on this machine, so that nothing has to be fetched."""
    name, revision = recipe.reference.model, recipe.reference.revision
    if Path(name).is_dir():
        return True
    weights = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in weights)


class ExampleReader:
    """The reference, the SAE and the tokenizer, loaded to look at pairs of one cache."""

    def __init__(self, recipe: Recipe, cache: Cache, spec: Spec, batch_tokens: int = 8192) -> None:
        """
        spec: the features that are looked at.

        Raises CacheConflict where the recipe's reference is not the cache's or it has no such features, and as loading
        does where files are missing.
        """
        identity = identity_of_scorer(recipe, cache)
        recipe = identity.recipe
        own = next((one for one in identity.specs if {**one, "top_k": 0} == {**spec, "top_k": 0}), None)
        if own is None:
            raise CacheConflict(
                f"the recipe has no features at {spec['hookpoint']} of the SAE that cache {cache.key[:12]} was made "
                "with; give the recipe that it was made from"
            )
        name, revision = tokenizer_source(recipe)
        self.cache = cache
        self.tokenizer: Any = load_tokenizer(name, revision)
        say(f"loading the reference {recipe.reference.model} ...")
        self.scorer: ReferenceScorer = reference_scorer(recipe, batch_tokens, identity, [own])
        self.sae = self.scorer.saes[own["hookpoint"]]

    def examples(self, pairs: Pairs, tops: Mapping[int, Sequence[TopPair]]) -> dict[int, list[Example]]:
        """The pairs of each feature, in their order."""
        wanted: dict[int, list[int]] = {}
        for feature, own in tops.items():
            for top in own:
                wanted.setdefault(top.pair, []).append(feature)
        sides = dict(self._sides(pairs, wanted))
        return {feature: [_example(top, *sides[top.pair], feature) for top in own] for feature, own in tops.items()}

    def _sides(
        self, pairs: Pairs, wanted: Mapping[int, Sequence[int]]
    ) -> Iterator[tuple[int, tuple[int, str, dict[int, list[Passage]]]]]:
        """Of each pair its group, prompt and, by feature, both passages; read and scored shard by shard."""
        self.cache.read_columns(())
        numbers = np.array(sorted(wanted), dtype=np.int64)
        shards = np.searchsorted(pairs.splits, numbers, side="right") - 1
        for sid in np.unique(shards).tolist():
            groups = self.cache.shard(sid)
            own = numbers[shards == sid]
            units = units_of(groups, PAIRING)
            rows = units.group[own - pairs.splits[sid]]
            completions = units.completions[own - pairs.splits[sid]]
            residuals = self._residuals(groups, np.unique(rows))
            for pair, row, both in zip(own.tolist(), rows.tolist(), completions.tolist(), strict=True):
                acts = [self._acts(residuals[completion], wanted[pair]) for completion in both]
                passages = {
                    feature: [
                        self._passage(groups, row, completion, side[:, place])
                        for completion, side in zip(both, acts, strict=True)
                    ]
                    for place, feature in enumerate(wanted[pair])
                }
                yield pair, (int(groups.group_id[row]), self._prompt(groups, row), passages)

    @torch.inference_mode()
    def _residuals(self, groups: Groups, rows: NDArray[np.int64]) -> dict[int, Float[Tensor, "N D"]]:
        """What the hookpoint gives where each scored token of these groups is predicted, by completion."""
        picked = take(TokenGroups(groups.input_ids, groups.splits, groups.n_completions, groups.score_mask), rows)
        self.scorer.check(take(picked, extremes(picked.splits, picked.n_completions)))
        found: dict[int, Tensor] = {}
        for batch in micro_batches(picked, self.scorer.batch_tokens):
            packed = self.scorer.packed(take(picked, batch))
            with mixed_precision(self.scorer.device, self.scorer.arithmetic.autocast):
                (given,) = self.scorer.model(**packed._asdict()).residuals
            completions = [
                completion
                for row in rows[batch].tolist()
                for completion in range(int(groups.completion_starts[row]), int(groups.completion_starts[row + 1]))
            ]
            found |= dict(zip(completions, given.split(packed.lengths.tolist()), strict=True))
        return found

    @torch.inference_mode()
    def _acts(self, residual: Float[Tensor, "N D"], features: Sequence[int]) -> Float[np.ndarray, "N K"]:
        columns = torch.tensor(features, device=residual.device).expand(len(residual), -1)
        acts = self.sae.pooled_columns(residual, [1] * len(residual), columns)
        return np.asarray(acts.float().cpu().numpy())

    def _passage(self, groups: Groups, row: int, completion: int, acts: Float[np.ndarray, " N"]) -> Passage:
        """The stretch around the strongest token."""
        prompt = int(groups.completion_starts[row]) + row
        asked = groups.input_ids[slice(*groups.splits[prompt : prompt + 2].astype(np.int64))]
        own = groups.input_ids[slice(*groups.splits[completion + row + 1 : completion + row + 3].astype(np.int64))]
        ids = np.concatenate([asked[-1:], own]).astype(np.int64)
        first, last = groups.scored_splits[completion : completion + 2]
        counts = np.ones(len(acts)) if groups.score_mask is None else groups.score_mask[first:last]
        heat = np.append(acts * counts, 0.0)[: len(ids)]
        at = min(max(int(heat.argmax()) - WINDOW // 2, 0), max(len(ids) - WINDOW, 0))
        shown = heat[at : at + WINDOW]
        tokens = self._pieces(ids, at, at + len(shown))
        act = float(heat.sum() / max(counts.sum(), 1))
        return Passage(tokens, tuple(shown.tolist()), at, len(ids), act)

    def _pieces(self, ids: NDArray[np.int64], start: int, end: int) -> tuple[str, ...]:
        """The text of each token, told by what it adds: a token alone may lose its space, or half a character."""
        before = max(start - 4, 0)
        texts = [self.tokenizer.decode(ids[before:place].tolist()) for place in range(start, end + 1)]
        pieces, said = [], len(texts[0])
        for text in texts[1:]:
            whole = text.removesuffix("\ufffd")
            pieces.append(whole[said:])
            said = max(said, len(whole))
        return tuple(pieces)

    def _prompt(self, groups: Groups, row: int) -> str:
        segment = int(groups.completion_starts[row]) + row
        start, end = (int(bound) for bound in groups.splits[segment : segment + 2])
        text: str = self.tokenizer.decode(groups.input_ids[start:end].tolist())
        return text if len(text) <= PROMPT_CHARACTERS else f"…{text[-PROMPT_CHARACTERS:]}"


def _example(top: TopPair, group_id: int, prompt: str, passages: dict[int, list[Passage]], feature: int) -> Example:
    chosen, rejected = passages[feature]
    return Example(group_id, prompt, chosen, rejected, top.chosen, top.rejected)
