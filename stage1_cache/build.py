"""
`fpo cache`: find the caches that a recipe asks for, and build or finish those that are not there.

A hit costs seconds. On a miss, what other caches of the same scorer hold is copied, the rest is scored: see `fill`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fpo.errors import CacheError, CacheIncomplete, CacheMissing, ModelError, RecipeError
from fpo.memo import remember
from fpo.progress import is_first_rank, say
from fpo.recipe import Recipe
from fpo.scoring import Layout, Packed, adapter_folder, extremes, load_sae, model_folder, pack
from fpo.scoring.sae.formats import read_decoder
from fpo.scoring.self_check import check_sae
from fpo.stage1_cache.drops import DropReport
from fpo.stage1_cache.facts import SelfCheckFacts, parse_self_checks, self_checks
from fpo.stage1_cache.fill import completed, fill, inputs, token_rows
from fpo.stage1_cache.identity import CacheIdentity, cache_identities, check_inputs, shared_pairs, spelled
from fpo.stage1_cache.score import ReferenceScorer
from fpo.store import (
    Cache,
    CacheWriter,
    Nearest,
    Rebuild,
    ReusableRows,
    Store,
    cache_key,
    check_changed,
    differences,
    is_url,
    nearest,
    open_cache,
)

# Scored completion tokens that the self-check is measured on.
SELF_CHECK_TOKENS = 512


@dataclass(frozen=True)
class CacheReport:
    """What `fpo cache` says about one cache when it is done."""

    split: str
    cache: Cache
    drops: DropReport
    self_checks: tuple[SelfCheckFacts, ...]
    """One per hookpoint."""
    built_shards: int
    """Shards that this process wrote; where it is 0 and so is `shards_by_others`, the cache was there."""
    seconds: float
    pairs_scored: int
    tokens_scored: int
    layout: str | None = None
    """How the pairs were laid out for the reference; None where this process scored none."""
    pairs_reused: int = 0
    """Pairs that this process copied from other caches of the same scorer instead of scoring them."""
    reuse_problems: tuple[str, ...] = ()
    """Caches and shards that could not be copied from, one line each; their pairs were scored."""
    foreign_shards: int = 0
    """
    Shards of a cache that was finished here that were not computed in this store: left by a stopped pull, an
    unpacked cache, or a killed writer. Nothing is copied from them into other caches.
    """
    rebuilt_shards: int = 0
    """Shards of a complete cache that were damaged and are put back."""
    nearest: Nearest | None = None
    """On a miss, the cache that came closest and the fields that differ."""
    trained_on: int = 0
    """Of the held-out pairs: how many stand in the training split too."""
    shards_by_others: int = 0
    """Shards that other processes wrote meanwhile."""


def build_caches(
    recipe: Recipe,
    store: Path | str,
    batch_tokens: int = 8192,
    on_miss: Callable[[str, Nearest | None], None] | None = None,
    rebuild: bool = False,
) -> list[CacheReport]:
    """
    Build, finish or find the caches of a recipe: the training split's and the held-out split's.

    store         folder that holds caches; at a URL complete ones are found, none is built
    batch_tokens  packed tokens per forward; changes speed and memory, not the key
    on_miss       called with the split and the nearest cache, before a cache that is not there is built
    rebuild       read every byte of complete caches, and compute the damaged shards again
    Raises FpoError for what a user can cause, before the model is loaded wherever that can be told.
    """
    check_inputs(recipe)
    identities = cache_identities(recipe)
    lazy = _LazyScorer(recipe, batch_tokens, identities[0].scorer)
    siblings = {cache_key(identity.key_recipe) for identity in identities}
    rebuilt = [_rebuild(identity, store, lazy) if rebuild else 0 for identity in identities]
    reports = [_build(identity, store, lazy, siblings, on_miss) for identity in identities]
    trained_on = [0, *(shared_pairs(identity, identities[0]) for identity in identities[1:])]
    return [
        replace(report, rebuilt_shards=shards, trained_on=pairs)
        for report, shards, pairs in zip(reports, rebuilt, trained_on, strict=True)
    ]


def find_cache(recipe: Recipe, store: Path | str, *, held_out: bool = False) -> Cache:
    """
    The complete cache of a recipe's training pairs, or of its held-out ones.

    Raises CacheMissing or CacheIncomplete; RecipeError where held-out pairs are asked for and the recipe has none.
    """
    check_inputs(recipe)
    if held_out and recipe.data.eval_split is None:
        raise RecipeError(
            "data.eval_split is not set, so there are no held-out pairs; name a split: --set data.eval_split=test"
        )
    identity = cache_identities(recipe)[1 if held_out else 0]
    try:
        return open_cache(store, cache_key(identity.key_recipe))
    except CacheMissing:
        raise CacheMissing(_missing(store, identity)) from None


def _missing(store: Path | str, identity: CacheIdentity) -> str:
    """That a cache is not there, and what keeps the nearest one from being it."""
    wanted = identity.key_recipe
    said = f"{store} does not hold this recipe's cache, {cache_key(wanted)[:12]}"
    try:
        near = nearest(store, wanted, inputs(identity))
    except CacheError:  # a server without a listing
        near = None
    if near is None:
        return said
    return "\n  ".join([f"{said}; nearest is {near.key[:12]}, which differs in", *near.lines()])


def reference_scorer(recipe: Recipe, batch_tokens: int, named: dict[str, Any]) -> ReferenceScorer:
    """
    The recipe's reference with its SAEs, loaded. Raises ModelError where the files are not (any more) what the key
    names: `named` is the scorer's part of it.
    """
    reference = recipe.reference
    scorer = ReferenceScorer(
        model_folder(reference.model, reference.revision),
        reference.arithmetic,
        [] if reference.adapter is None else [adapter_folder(reference.adapter)],
        [(f.hookpoint, load_sae(f.sae, f.hookpoint), f.top_k) for f in recipe.features],
        recipe.cache.top_logits,
        batch_tokens,
    )
    changed = differences(named, cache_identities(recipe)[0].scorer)
    if changed:
        raise ModelError(
            "the reference or an SAE changed on disk after the cache's key was taken; run the same command again\n"
            f"  {changed[0]}"
        )
    return scorer


@dataclass(frozen=True)
class _LazyScorer:
    """The reference and its SAEs, loaded when the first shard needs them, and what loading them found."""

    recipe: Recipe
    batch_tokens: int
    named: dict[str, Any]
    """The scorer's part of the keys."""

    @cached_property
    def _loaded(self) -> ReferenceScorer:
        if is_first_rank():
            say(f"loading the reference {self.recipe.reference.model} ...")
        return reference_scorer(self.recipe, self.batch_tokens, self.named)

    @cached_property
    def _checked(self) -> list[str]:
        """The splits on whose pairs the scorer was checked; the last one's layout is the scorer's."""
        return []

    def scorer(self, identity: CacheIdentity) -> ReferenceScorer:
        """The scorer, checked on this cache's longest and shortest pairs. Raises ModelError."""
        if self._checked[-1:] != [identity.split]:
            tokens = identity.tokens
            few = extremes(tokens.splits, tokens.n_completions)
            self._loaded.check(*token_rows(tokens.input_ids, tokens.splits, few))
            self._checked.append(identity.split)
        return self._loaded

    def self_checks(self, identity: CacheIdentity) -> list[dict[str, Any]]:
        """Hold every SAE against the first pairs. Raises SelfCheckError."""
        facts = []
        scorer = self.scorer(identity)
        for feature, (_, sae, _) in zip(self.recipe.features, scorer.saes, strict=True):
            if not feature.self_check:
                facts.append({"hookpoint": feature.hookpoint, "checked": False})
                continue
            decoder = read_decoder(feature.sae, feature.hookpoint)
            sample = Packed(*(tensor.to(scorer.device) for tensor in _sample(identity, scorer.layout)))
            check = check_sae(scorer.model, sae, decoder, feature.hookpoint, sample)
            check.raise_if_unfit()
            facts.append(
                {
                    "hookpoint": feature.hookpoint,
                    "checked": True,
                    "tokens": check.tokens,
                    "l0": round(check.l0, 2),
                    "advertised_l0": check.advertised_l0,
                    "fvu": round(check.fvu, 4),
                    "elsewhere": {name: round(value, 4) for name, value in check.elsewhere.items()},
                    **({"note": check.note} if check.note else {}),
                }
            )
        return facts


def _sample(identity: CacheIdentity, layout: Layout) -> Packed:
    """The first pairs, in the shuffled order of the shards, that hold enough scored tokens."""
    tokens = identity.tokens
    order = np.concatenate(identity.plan())
    needed = int(np.searchsorted(np.cumsum(tokens.lengths[order, 1:].sum(1)), SELF_CHECK_TOKENS)) + 1
    ids, splits = token_rows(tokens.input_ids, tokens.splits, order[:needed])
    return pack(ids, splits, tokens.n_completions[:needed], layout)


def _build(
    identity: CacheIdentity,
    store: Path | str,
    lazy: _LazyScorer,
    siblings: set[str],
    on_miss: Callable[[str, Nearest | None], None] | None,
) -> CacheReport:
    started = time.monotonic()
    key = cache_key(identity.key_recipe)
    drops = DropReport.from_dict(identity.remembered["drops"])
    near = None
    try:
        cache = open_cache(store, key)
        check_changed(cache)
        return CacheReport(identity.split, cache, drops, self_checks(cache), 0, time.monotonic() - started, 0, 0)
    except CacheMissing as error:
        if is_url(store):
            raise CacheMissing(f"{error}; build it in a folder and move it there with fpo store push") from None
        near = nearest(store, identity.key_recipe, inputs(identity))
        if near is not None and near.key in siblings:
            near = None  # the other split of this recipe explains nothing
        if on_miss is not None:
            on_miss(identity.split, near)
    except CacheIncomplete:
        if is_url(store):
            raise

    identity.check_tokens()
    plan = identity.plan()
    writer = CacheWriter(Store(store), identity.key_recipe, [identity.tokens.pair_id[rows] for rows in plan])
    Store(store).note_names(key, inputs(identity))
    reusable = ReusableRows(store, identity.scorer)
    checks = _self_checks(identity, lazy, reusable)
    filled = fill(identity, writer, plan, reusable, lambda: lazy.scorer(identity))
    writer.seal({"self_check": checks, "drops": identity.remembered["drops"]})
    cache = open_cache(store, key)
    return CacheReport(
        split=identity.split,
        cache=cache,
        drops=drops,
        self_checks=self_checks(cache),
        built_shards=filled.shards,
        seconds=time.monotonic() - started,
        pairs_scored=filled.scored,
        tokens_scored=filled.tokens,
        layout=filled.layout,
        pairs_reused=filled.reused,
        reuse_problems=(*reusable.problems, *_not_ours(reusable)),
        foreign_shards=writer.not_computed_here(),
        nearest=near,
        shards_by_others=filled.by_others,
    )


def _rebuild(identity: CacheIdentity, store: Path | str, lazy: _LazyScorer) -> int:
    """Put back what is damaged of the recipe's cache, if it is complete; how many shards."""
    if is_url(store):
        raise CacheError(f"{store} is a URL: nothing is rebuilt there; pull the cache, and rebuild it in a folder")
    key = cache_key(identity.key_recipe)
    try:
        rebuild = Rebuild(store, key)
    except CacheMissing:
        return 0
    for sid in rebuild.damaged:
        rows = identity.plan()[sid]
        # As it was made: rows that were copied then are copied now, the rest is scored in the same batches.
        reusable = ReusableRows(store, identity.scorer, keys=rebuild.sources(sid))
        (copied,) = reusable.gather([identity.digests[rows]])
        rebuild.put(sid, completed(identity, rows, copied, lambda: lazy.scorer(identity), lambda *_: None))
    return len(rebuild.damaged)


def _not_ours(reusable: ReusableRows) -> list[str]:
    if not reusable.foreign:
        return []
    names = ", ".join(key[:12] for key in reusable.foreign[:5]) + (", ..." if len(reusable.foreign) > 5 else "")
    return [f"shards that were not computed in this store, of {names}: what was pulled is used by its name alone"]


def _self_checks(identity: CacheIdentity, lazy: _LazyScorer, reusable: ReusableRows) -> list[dict[str, Any]]:
    """
    What the manifest says about the self-check: where every pair can be copied, what a cache says that holds them
    (model and SAE are the same), else the check. It never depends on how much of the cache a killed run left,
    or its bytes would; remembered, so that a run which has only the manifest to write loads no model.
    """
    asked = [feature.self_check for feature in identity.recipe.features]

    def check() -> dict[str, Any]:
        inherited = _inherited_checks(reusable, asked)
        if inherited is not None and reusable.held(identity.digests) == len(identity.digests):
            return {"checks": inherited}
        return {"checks": spelled(lazy.self_checks(identity))}

    if not any(asked):
        return [{"hookpoint": feature.hookpoint, "checked": False} for feature in identity.recipe.features]
    facts = {"what": "self-check", "key": cache_key(identity.key_recipe), "asked": asked}
    checks: list[dict[str, Any]] = remember(facts, check)["checks"]
    return checks


def _inherited_checks(reusable: ReusableRows, asked: list[bool]) -> list[dict[str, Any]] | None:
    """The checks that some source's manifest holds, where all that are asked for were made, here."""
    for source in reusable.sources:
        if all(source.computed_here):
            with contextlib.suppress(ValueError):
                found = parse_self_checks(source.facts)
                if [one.checked for one in found] == asked:
                    return [one.model_dump(exclude_unset=True) for one in found]
    return None
