"""
`fpo cache`: find the caches that a recipe asks for, and build or finish those that are not there.

Every process takes the shards that have no record yet, whatever the others do: ranks of torchrun, an array of
jobs, or the command started twice need no communication, and any number of them may resume.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from errors import CacheIncomplete, CacheMissing, RecipeError
from recipe import Recipe
from scoring import Packed, load_sae, model_folder, pack
from scoring.sae_formats import read_decoder
from scoring.self_check import check_sae
from stage1_cache.drops import DropReport
from stage1_cache.identity import CacheIdentity, adapter_folder, cache_identities, check_inputs, spelled
from stage1_cache.score import ReferenceScorer
from store import Cache, CacheWriter, Store, cache_key, open_cache

# Scored completion tokens that the self-check is measured on.
SELF_CHECK_TOKENS = 512


@dataclass(frozen=True)
class CacheReport:
    """What `fpo cache` says about one cache when it is done."""

    split: str
    cache: Cache
    drops: DropReport
    built_shards: int
    """Shards that this process scored; 0 is a hit."""
    seconds: float
    pairs_scored: int
    tokens_scored: int


def build_caches(recipe: Recipe, store: Path, batch_tokens: int = 8192) -> list[CacheReport]:
    """
    Build, finish or find the caches of a recipe: the training split's and the held-out split's.

    store         folder that holds caches
    batch_tokens  packed tokens per forward; changes speed and memory, not the key
    Raises FpoError for what a user can cause, before the model is loaded wherever that can be told.
    """
    check_inputs(recipe)
    identities = cache_identities(recipe)
    lazy = _LazyScorer(recipe, batch_tokens)
    return [_build(identity, store, lazy) for identity in identities]


def find_cache(recipe: Recipe, store: Path, *, held_out: bool = False) -> Cache:
    """
    The complete cache of a recipe's training pairs, or of its held-out ones.

    Raises CacheMissing or CacheIncomplete; RecipeError where held-out pairs are asked for and the recipe has none.
    """
    check_inputs(recipe)
    if held_out and recipe.data.eval_split is None:
        raise RecipeError("data.eval_split is not set, so there are no held-out pairs")
    identity = cache_identities(recipe)[1 if held_out else 0]
    return open_cache(store, cache_key(identity.key_recipe))


@dataclass(frozen=True)
class _LazyScorer:
    """The reference and its SAEs, loaded when the first shard needs them, and what loading them found."""

    recipe: Recipe
    batch_tokens: int

    @cached_property
    def scorer(self) -> ReferenceScorer:
        reference, options = self.recipe.reference, self.recipe.cache
        saes = [(f.hookpoint, load_sae(f.sae, f.hookpoint), f.top_k) for f in self.recipe.features]
        folder = model_folder(reference.model, reference.revision)
        return ReferenceScorer(
            folder, reference.dtype, adapter_folder(reference), saes, options.top_logits, self.batch_tokens
        )

    def self_checks(self, identity: CacheIdentity) -> list[dict[str, Any]]:
        """Hold every SAE against the first pairs. Raises SelfCheckError."""
        facts = []
        for feature, (_, sae, _) in zip(self.recipe.features, self.scorer.saes, strict=True):
            if not feature.self_check:
                facts.append({"hookpoint": feature.hookpoint, "checked": False})
                continue
            decoder = read_decoder(feature.sae, feature.hookpoint)
            sample = Packed(*(tensor.to(self.scorer.device) for tensor in _sample(identity)))
            check = check_sae(self.scorer.model, sae, decoder, feature.hookpoint, sample)
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
                }
            )
        return facts


def _sample(identity: CacheIdentity) -> Packed:
    """The first pairs, in the shuffled order of the shards, that hold enough scored tokens."""
    tokens = identity.tokens
    order = np.concatenate(identity.plan())
    needed = int(np.searchsorted(np.cumsum(tokens.lengths[order, 1:].sum(1)), SELF_CHECK_TOKENS)) + 1
    ids, splits = _rows(tokens.input_ids, tokens.splits, order[:needed])
    return pack(ids, splits)


def _build(identity: CacheIdentity, store: Path, lazy: _LazyScorer) -> CacheReport:
    started = time.monotonic()
    key = cache_key(identity.key_recipe)
    drops = DropReport.from_dict(identity.remembered["drops"])
    try:
        cache = open_cache(store, key)
        return CacheReport(identity.split, cache, drops, 0, time.monotonic() - started, 0, 0)
    except (CacheMissing, CacheIncomplete):
        pass

    identity.check_lengths()
    plan = identity.plan()
    writer = CacheWriter(Store(store), identity.key_recipe, [identity.tokens.pair_id[rows] for rows in plan])
    missing = writer.missing()
    # Also where a killed run left only the manifest to be written: its bytes must not depend on that.
    checks = lazy.self_checks(identity)
    built, pairs, tokens = _write_missing(identity, writer, plan, missing, lazy)
    writer.seal({"self_check": spelled(checks), "drops": identity.remembered["drops"]})
    cache = open_cache(store, key)
    return CacheReport(identity.split, cache, drops, built, time.monotonic() - started, pairs, tokens)


def _write_missing(
    identity: CacheIdentity,
    writer: CacheWriter,
    plan: list[np.ndarray],
    missing: list[int],
    lazy: _LazyScorer,
) -> tuple[int, int, int]:
    """Score the missing shards; returns shards, pairs and tokens that this process scored."""
    data = identity.tokens
    done = sum(len(rows) for sid, rows in enumerate(plan) if sid not in set(missing))
    built = pairs = tokens = 0
    label = f"cache {identity.split}"
    with tqdm(total=len(data), initial=done, desc=label, unit=" pairs", disable=None, smoothing=0.05) as progress:

        def advance(n_pairs: int, n_tokens: int) -> None:
            nonlocal pairs, tokens
            pairs, tokens = pairs + n_pairs, tokens + n_tokens
            progress.update(n_pairs)
            progress.set_postfix_str(f"{tokens / max(progress.format_dict['elapsed'], 1e-9):,.0f} tokens/s")

        for sid in _own_first(missing):
            if sid not in writer.missing():
                continue  # another process finished it meanwhile
            rows = plan[sid]
            ids, splits = _rows(data.input_ids, data.splits, rows)
            shard = lazy.scorer.score(data.pair_id[rows], identity.digests[rows], ids, splits, advance)
            writer.write(sid, shard, provenance(lazy.scorer))
            built += 1
    return built, pairs, tokens


def _own_first(missing: list[int]) -> list[int]:
    """Under torchrun, a rank's own share first and then the others', so that ranks rarely meet."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    start = len(missing) * rank // world
    return missing[start:] + missing[:start]


def _rows(input_ids: np.ndarray, splits: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and splits of some pairs, in this order."""
    bounds = splits.astype(np.int64)
    parts = [input_ids[bounds[3 * row] : bounds[3 * row + 3]] for row in rows]
    sizes = np.diff(bounds).reshape(-1, 3)[rows]
    new = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)
    return (np.concatenate(parts) if parts else np.empty(0, np.uint32)), new


def provenance(scorer: ReferenceScorer) -> dict[str, Any]:
    """How a shard came to be: for people, never part of the key."""
    device = torch.cuda.get_device_name() if scorer.device.type == "cuda" else platform.processor() or "cpu"
    return {
        "versions": {name: version(name) for name in ("fpo", "torch", "transformers", "numpy", "zarr")},
        "device": device,
        "attention": scorer.model.config._attn_implementation,
        "batch_tokens": scorer.batch_tokens,
        "host": platform.node(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
