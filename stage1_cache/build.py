"""
`fpo cache`: find the caches that a recipe asks for, with the columns beside them; build or finish what is not there.

A hit costs seconds. What other caches of the same scorer hold is copied, the rest is scored: see `fill`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fpo.errors import CacheConflict, CacheError, CacheIncomplete, CacheMissing, ModelError, RecipeError
from fpo.memo import remember
from fpo.progress import is_first_rank, say
from fpo.recipe import Feature, Recipe
from fpo.scoring import adapter_folder, extremes, load_sae, model_folder
from fpo.scoring.hookpoints import canonical_hookpoint
from fpo.scoring.sae import read_decoder
from fpo.scoring.self_check import check_sae
from fpo.stage1_cache.drops import DropReport
from fpo.stage1_cache.facts import SelfCheckFacts, parse_self_check, self_check_of
from fpo.stage1_cache.fill import Filled, Filling, Part, completed, inputs, rows_of, token_groups
from fpo.stage1_cache.identity import CacheIdentity, cache_identities, checked, shared_groups, spelled
from fpo.stage1_cache.imported import ImportedScores
from fpo.stage1_cache.score import ReferenceScorer, TokenGroups
from fpo.store import (
    Cache,
    CacheWriter,
    Claims,
    Nearest,
    Rebuild,
    Reusable,
    Spec,
    Store,
    Want,
    cache_key,
    check_changed,
    column_name,
    covers,
    differences,
    held_columns,
    is_url,
    lacks,
    nearest,
    open_cache,
    recipe_facts,
    serving,
)
from fpo.store.format.ragged import starts_of

# Scored completion tokens that the self-check is measured on.
SELF_CHECK_TOKENS = 512


@dataclass(frozen=True)
class ColumnReport:
    """A column beside a cache, as the recipe asks for it."""

    name: str
    """features at model.layers.12, top 64"""
    key: str
    built: bool
    """Whether it was not there before."""
    n_bytes: int
    held: str
    """The name of the column that serves it: what it holds may be more."""


@dataclass(frozen=True)
class CacheReport:
    """What `fpo cache` says about one cache when it is done."""

    split: str
    cache: Cache
    """With the recipe's columns beside it."""
    drops: DropReport
    columns: tuple[ColumnReport, ...]
    """In the order of the recipe."""
    self_checks: tuple[SelfCheckFacts, ...]
    """One per hookpoint."""
    base_built: bool = False
    """Whether the base was not there before."""
    built_shards: int = 0
    """Shards that this process wrote, of the base, or of the columns where the base was there."""
    seconds: float = 0.0
    scored: int = 0
    """Completions that this process scored."""
    tokens_scored: int = 0
    layout: str | None = None
    """How the groups were laid out for the reference; None where this process scored none."""
    reused: int = 0
    """Completions that this process copied from other caches of the same scorer instead of scoring them."""
    reuse_problems: tuple[str, ...] = ()
    """Caches and shards that could not be copied from, one line each; their rows were scored."""
    foreign_shards: int = 0
    """
    Shards of a cache that was finished here that were not computed in this store: left by a stopped pull, an
    unpacked cache, or a killed writer. Nothing is copied from them into other caches.
    """
    rebuilt_shards: int = 0
    """Shards of a complete cache or column that were damaged and are put back."""
    nearest: Nearest | None = None
    """On a miss, the cache that came closest and the fields that differ."""
    trained_on: int = 0
    """Of the held-out groups: how many share a completion with the training split."""
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
    recipe = checked(recipe)
    if rebuild and recipe.reference.scored_by is not None:
        raise RecipeError(
            f"reference.scored_by: {recipe.reference.scored_by} computed this cache, so fpo cannot compute it again; "
            "remove it (fpo store rm) and import it once more"
        )
    identities = cache_identities(recipe, None if is_url(store) else Store(store))
    lazy = _LazyScorer(recipe, batch_tokens, identities[0])
    siblings = {cache_key(identity.key_recipe) for identity in identities}
    rebuilt = [_rebuild(identity, store, lazy) if rebuild else 0 for identity in identities]
    reports = [_build(identity, store, lazy, siblings, on_miss) for identity in identities]
    trained_on = [0, *(shared_groups(identity, identities[0]) for identity in identities[1:])]
    return [
        replace(report, rebuilt_shards=shards, trained_on=groups)
        for report, shards, groups in zip(reports, rebuilt, trained_on, strict=True)
    ]


@dataclass(frozen=True)
class SplitReport:
    """What a split of a recipe's data holds."""

    split: str
    drops: DropReport
    trained_on: int = 0
    """Of the held-out split: groups with a completion that the training split holds too."""

    def facts(self) -> dict[str, Any]:
        """In JSON types."""
        return {"split": self.split, "drops": self.drops.as_dict(), "trained_on": self.trained_on}


def look_at_data(recipe: Recipe) -> list[SplitReport]:
    """
    What the recipe's splits hold, token for token as `build_caches` would score them; no model is loaded. Raises
    FpoError for what a user can cause.
    """
    identities = cache_identities(checked(recipe))
    return [
        SplitReport(
            identity.split,
            DropReport.from_dict(identity.remembered["drops"]),
            shared_groups(identity, identities[0]) if number else 0,
        )
        for number, identity in enumerate(identities)
    ]


def import_caches(recipe: Recipe, files: Sequence[Path], store: Path | str) -> list[CacheReport]:
    """
    The caches of a recipe whose log-probs another engine computed (`reference.scored_by`), from files of rows with
    token ids, which must hold every completion that the recipe asks for. Columns beside them are not filled.

    Raises FpoError for what a user can cause, before anything is written.
    """
    recipe = checked(recipe)
    engine = recipe.reference.scored_by
    if engine is None:
        raise RecipeError(
            "reference.scored_by: say which engine computed the log-probs, with its version: --set "
            "'reference.scored_by=vllm 0.11.2'; its caches never stand for fpo's own"
        )
    if is_url(store):
        raise CacheError(f"{store} is a URL: import into a folder, then fpo store push")
    scores = ImportedScores(files, engine)
    identities = cache_identities(recipe, Store(store))
    for identity in identities:
        scores.check(identity)
    return [_imported(identity, store, scores) for identity in identities]


def _imported(identity: CacheIdentity, store: Path | str, scores: ImportedScores) -> CacheReport:
    started = time.monotonic()
    filled, reusable, foreign = _filled(identity, Store(store), [None], scores)
    cache = open_cache(store, cache_key(identity.key_recipe))
    report = CacheReport(identity.split, cache, DropReport.from_dict(identity.remembered["drops"]), (), ())
    return _with_work(report, [None], started, filled, reusable, foreign)


def find_cache(recipe: Recipe, store: Path | str, *, held_out: bool = False) -> Cache:
    """
    The complete cache of a recipe's training groups, or of its held-out ones, with the columns that its objective reads
    beside it and no others.

    Raises CacheMissing (also for a column) or CacheIncomplete; RecipeError where held-out groups are asked for and the
    recipe has none.
    """
    recipe = checked(recipe)
    if held_out and recipe.data.held_out_split is None:
        raise RecipeError(
            "data.eval_split is not set, so there are no held-out pairs; name a split: "
            "--set data.eval_split=test, or hold some prompts out: --set data.held_out=0.1"
        )
    # A store that is not there yet is not made by looking for a cache in it.
    sharing = Store(store) if not is_url(store) and Store(store).root.is_dir() else None
    identity = cache_identities(recipe, sharing)[1 if held_out else 0]
    try:
        cache = open_cache(store, cache_key(identity.key_recipe))
    except CacheMissing:
        raise CacheMissing(_missing(store, identity)) from None
    read_beside(cache, recipe)
    return cache


def read_beside(cache: Cache, recipe: Recipe) -> None:
    """
    Read beside the recipe's cache the columns that its objective reads, and no others. Raises CacheMissing for one that
    is not there.
    """
    cache.read_columns(objective_specs(CacheIdentity(recipe)))


def objective_specs(identity: CacheIdentity) -> list[Spec]:
    """The columns that the recipe's objective reads, its features first and in its order."""
    recipe = identity.recipe
    needs = recipe.objective.needs
    features = [identity.specs[recipe.features.index(feature)] for feature in recipe.constrained_features()]
    kinds = {"top_logits": needs.divergence, "mismatched": needs.mismatched}
    return features + [spec for spec in identity.specs if kinds.get(spec["kind"], False)]


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


def reference_scorer(recipe: Recipe, batch_tokens: int, named: CacheIdentity, specs: Sequence[Spec]) -> ReferenceScorer:
    """
    The recipe's reference, loaded, with the SAEs that these columns need. Raises ModelError where the files are not
    (any more) what the keys of `named` stand for.
    """
    reference = recipe.reference
    hookpoints = {spec["hookpoint"] for spec in specs if "hookpoint" in spec}
    saes = {
        canonical_hookpoint(feature.hookpoint): load_sae(feature.sae, feature.hookpoint)
        for feature in recipe.features
        if canonical_hookpoint(feature.hookpoint) in hookpoints
    }
    scorer = ReferenceScorer(
        model_folder(reference.model, reference.revision),
        reference.arithmetic,
        [] if reference.adapter is None else [adapter_folder(reference.adapter)],
        saes,
        specs,
        batch_tokens,
    )
    now = cache_identities(recipe)[0]
    changed = differences(named.scorer, now.scorer) + differences(_numbered(named.specs), _numbered(now.specs))
    if changed:
        raise ModelError(
            "the reference or an SAE changed on disk after the cache's key was taken; run the same command again\n"
            f"  {changed[0]}"
        )
    return scorer


def _numbered(specs: Sequence[Spec]) -> dict[str, Any]:
    return {"columns": list(specs)}


@dataclass(frozen=True)
class _LazyScorer:
    """The reference and its SAEs, loaded when the first shard needs them, and what loading them found."""

    recipe: Recipe
    batch_tokens: int
    named: CacheIdentity
    """Whose scorer and columns the keys name."""

    @cached_property
    def _loaded(self) -> ReferenceScorer:
        if is_first_rank():
            say(f"loading the reference {self.recipe.reference.model} ...")
        return reference_scorer(self.recipe, self.batch_tokens, self.named, self.named.specs)

    @cached_property
    def _checked(self) -> list[str]:
        """The splits on whose groups the scorer was checked; the last one's layout is the scorer's."""
        return []

    def scorer(self, identity: CacheIdentity) -> ReferenceScorer:
        """The scorer, checked on this cache's longest and shortest groups. Raises ModelError."""
        if self._checked[-1:] != [identity.split]:
            tokens = identity.tokens
            self._loaded.check(token_groups(identity, extremes(tokens.splits, tokens.n_completions)))
            self._checked.append(identity.split)
        return self._loaded

    def self_check(self, identity: CacheIdentity, feature: Feature) -> dict[str, Any]:
        """Hold an SAE against the first groups. Raises SelfCheckError."""
        scorer = self.scorer(identity)
        hookpoint = canonical_hookpoint(feature.hookpoint)
        decoder = read_decoder(feature.sae, feature.hookpoint)
        sample = scorer.packed(_sample(identity))
        check = check_sae(scorer.model, scorer.saes[hookpoint], decoder, hookpoint, sample)
        check.raise_if_unfit()
        return {
            "hookpoint": feature.hookpoint,
            "checked": True,
            "tokens": check.tokens,
            "l0": round(check.l0, 2),
            "advertised_l0": check.advertised_l0,
            "fvu": round(check.fvu, 4),
            "elsewhere": {name: round(value, 4) for name, value in check.elsewhere.items()},
            **({"note": check.note} if check.note else {}),
        }


def _sample(identity: CacheIdentity) -> TokenGroups:
    """The first groups, in the shuffled order of the shards, that hold enough scored tokens."""
    order = identity.order
    needed = int(np.searchsorted(np.cumsum(identity.scored_tokens[order]), SELF_CHECK_TOKENS)) + 1
    return token_groups(identity, order[:needed])


def _build(
    identity: CacheIdentity,
    store: Path | str,
    lazy: _LazyScorer,
    siblings: set[str],
    on_miss: Callable[[str, Nearest | None], None] | None,
) -> CacheReport:
    started = time.monotonic()
    key = cache_key(identity.key_recipe)
    wants: list[Want] = [None, *identity.specs]
    near = None
    try:
        cache = open_cache(store, key)
        held = cache.held_columns(identity.specs)
        absent = [spec for spec in identity.specs if serving(held, spec) is None]
        wants = [*absent]
        cache.read_columns([spec for spec in identity.specs if spec not in absent])
        check_changed(cache)
        if is_url(store) and absent:
            raise lacks(str(store), absent[0])
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
    filled, reusable, foreign = Filled(), None, 0
    engine = identity.recipe.reference.scored_by
    if None in wants and engine is not None:
        raise CacheMissing(
            f"{_missing(store, identity)}\n  its log-probs are {engine}'s; bring them with: fpo store import FILE "
            "--recipe RECIPE"
        )
    if wants:
        if None not in wants and is_first_rank():
            say(f"{identity.split}: the base is there; adding {', '.join(column_name(want) for want in wants if want)}")
        filled, reusable, foreign = _filled(identity, Store(store), wants, lazy)
    report = replace(_report(identity, store, wants), nearest=near)
    return _with_work(report, wants, started, filled, reusable, foreign)


def _with_work(
    report: CacheReport, wants: Sequence[Want], started: float, filled: Filled, reusable: Reusable | None, foreign: int
) -> CacheReport:
    """With what this process did; nothing could be copied where `reusable` is None."""
    return replace(
        report,
        base_built=None in wants,
        built_shards=filled.shards,
        seconds=time.monotonic() - started,
        scored=filled.scored,
        tokens_scored=filled.tokens,
        layout=filled.layout,
        reused=filled.reused,
        reuse_problems=() if reusable is None else (*reusable.problems, *_not_ours(reusable)),
        foreign_shards=foreign,
        shards_by_others=filled.by_others,
    )


def _filled(
    identity: CacheIdentity, store: Store, wants: Sequence[Want], lazy: _LazyScorer | ImportedScores
) -> tuple[Filled, Reusable, int]:
    """Fill and seal the base or columns: what was done and copied from, and how many shards were not computed here."""
    identity.check_tokens()
    key, plan = cache_key(identity.key_recipe), identity.plan
    parts = [_part(identity, store, want) for want in wants]
    store.note_names(key, inputs(identity))
    reusable = Reusable(store, identity.scorer, wants, apart_from=key)
    facts = [_facts(identity, part, want, lazy, reusable) for want, part in enumerate(parts)]
    claims = Claims(store.folder(key))
    filled = Filling(identity, parts, plan, reusable, claims, lambda: lazy.scorer(identity)).run()
    # The base last: where it is complete, so are the columns that were begun with it.
    for part, said in reversed(list(zip(parts, facts, strict=True))):
        part.writer.seal(said)
    return filled, reusable, sum(part.writer.not_computed_here() for part in parts)


def _part(identity: CacheIdentity, store: Store, want: Want) -> Part:
    recipe = identity.key_recipe if want is None else identity.column_recipe(want)
    order = identity.tokens.group_id[identity.order]
    shards = recipe_facts(recipe).shard_groups
    writer = CacheWriter(store, recipe, np.split(order, np.cumsum(shards)[:-1]) if shards else [])
    return Part.of(want, writer, identity.plan)


def _report(identity: CacheIdentity, store: Path | str, built: Sequence[Want]) -> CacheReport:
    """What is there now."""
    cache = open_cache(store, cache_key(identity.key_recipe), columns=identity.specs)
    columns = [
        ColumnReport(
            column_name(column.wanted),
            column.sealed.key,
            column.wanted in built,
            column.sealed.manifest.n_bytes,
            column_name(column.held),
        )
        for column in cache.columns
    ]
    drops = DropReport.from_dict(identity.remembered["drops"])
    checks = tuple(self_check_of(column) for column in cache.columns[: len(identity.recipe.features)])
    return CacheReport(identity.split, cache, drops, tuple(columns), checks)


def _rebuild(identity: CacheIdentity, store: Path | str, lazy: _LazyScorer) -> int:
    """Put back what is damaged of the recipe's cache and its columns, if they are complete; how many shards."""
    if is_url(store):
        raise CacheError(f"{store} is a URL: nothing is rebuilt there; pull the cache, and rebuild it in a folder")
    key = cache_key(identity.key_recipe)
    place = Store(store)
    try:
        rebuilt = _rebuild_part(identity, place, key, None, None, lazy)
    except CacheMissing:
        return 0
    for held in held_columns(place.folder(key), key, (), ()):
        spec = next((spec for spec in identity.specs if covers(held.spec, spec)), None)
        if spec is not None:
            rebuilt += _rebuild_part(identity, place, key, held.key, held.spec, lazy)
    return rebuilt


def _rebuild_part(
    identity: CacheIdentity, store: Store, key: str, column: str | None, want: Want, lazy: _LazyScorer
) -> int:
    rebuild = Rebuild(store, key, column=column)
    order = identity.order
    bounds = starts_of([entry.n_groups for entry in rebuild.manifest.shards])
    for sid in rebuild.damaged:
        _put_back(identity, rebuild, sid, order[bounds[sid] : bounds[sid + 1]], want, lazy)
    return len(rebuild.damaged)


def _put_back(
    identity: CacheIdentity, rebuild: Rebuild, sid: int, rows: np.ndarray, want: Want, lazy: _LazyScorer
) -> None:
    """
    A shard as it was made: rows that were copied then are copied now, the rest is scored in the same batches. Raises
    CacheConflict where neither way that it may have been made gives its bytes.
    """
    conflict: CacheConflict | None = None
    for keys in rebuild.sources(sid):
        reusable = Reusable(rebuild.store, identity.scorer, [want], apart_from=rebuild.cache_key, keys=keys)
        (copied,) = reusable.gather([identity.wanting(rows)])
        (found,) = completed(identity, rows, [want], copied, lambda: lazy.scorer(identity), lambda *_: None)
        try:
            return rebuild.put(sid, rows_of(identity, rows, found))
        except CacheConflict as error:
            conflict = error
    assert conflict is not None
    raise conflict


def _not_ours(reusable: Reusable) -> list[str]:
    if not reusable.foreign:
        return []
    names = ", ".join(key[:12] for key in reusable.foreign[:5]) + (", ..." if len(reusable.foreign) > 5 else "")
    return [f"shards that were not computed in this store, of {names}: what was pulled is used by its name alone"]


def _facts(
    identity: CacheIdentity, part: Part, want: int, lazy: _LazyScorer | ImportedScores, reusable: Reusable
) -> dict[str, Any]:
    """
    What the manifest says: of the base, the drops; of features, the self-check: where every row can be copied, what a
    column says that holds them (model and SAE are the same), else the check. It never depends on how much a killed run
    left, or the bytes would; remembered, so that a run which has only the manifest to write loads no model.
    """
    if part.want is None:
        return {"drops": identity.remembered["drops"]}
    if part.want["kind"] != "features":
        return {}
    assert isinstance(lazy, _LazyScorer), "what is imported has no features"
    feature = identity.recipe.features[identity.specs.index(part.want)]
    if not feature.self_check:
        return {"self_check": {"hookpoint": feature.hookpoint, "checked": False}}

    def check() -> dict[str, Any]:
        inherited = _inherited_check(reusable, want)
        whole = identity.wanting(np.arange(len(identity.tokens)))
        if inherited is not None and reusable.held(want, whole) == len(whole.digests):
            return inherited
        return {"self_check": spelled(lazy.self_check(identity, feature))}

    return remember({"what": "self-check", "key": part.writer.key}, check)


def _inherited_check(reusable: Reusable, want: int) -> dict[str, Any] | None:
    """The check that some source's column holds, where it was made, here."""
    for source in reusable.sources:
        if all(source.usable[want]):
            with contextlib.suppress(ValueError):
                found = parse_self_check(source.facts[want])
                if found.checked:
                    return {"self_check": found.model_dump(exclude_unset=True)}
    return None
