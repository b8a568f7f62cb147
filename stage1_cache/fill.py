"""
Filling a cache: copy the pairs that another cache of the same scorer holds, score the rest, write shard by shard.

Every process takes the shards that have no record yet, whatever the others do: ranks of torchrun, an array of
jobs, or the command started twice need no communication, and any number of them may resume.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from stage1_cache.identity import CacheIdentity
from stage1_cache.score import ReferenceScorer
from store import CacheWriter, Pairs, ReusableRows, Reused, own_share_first


@dataclass
class Filled:
    """What this process did; others may have done the rest."""

    shards: int = 0
    reused: int = 0
    """Pairs that were copied."""
    scored: int = 0
    """Pairs that were scored."""
    tokens: int = 0
    """Tokens of those."""


def fill(
    identity: CacheIdentity,
    writer: CacheWriter,
    plan: list[np.ndarray],
    reusable: ReusableRows,
    scorer: Callable[[], ReferenceScorer],
) -> Filled:
    """
    Write every shard that is missing.

    plan    the pairs (positions in `identity.tokens`) of every shard
    scorer  gives the reference, and loads it the first time; not called where every missing pair can be copied
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    pending = own_share_first(writer.missing(), rank, world)
    done = sum(len(rows) for rows in plan) - sum(len(plan[sid]) for sid in pending)
    filled = Filled()
    with tqdm(
        total=len(identity.tokens),
        initial=done,
        desc=f"cache {identity.split}",
        unit=" pairs",
        disable=None,
        smoothing=0.05,
    ) as progress:

        def advance(n_pairs: int, n_tokens: int) -> None:
            filled.scored, filled.tokens = filled.scored + n_pairs, filled.tokens + n_tokens
            progress.update(n_pairs)
            progress.set_postfix_str(f"{filled.tokens / max(progress.format_dict['elapsed'], 1e-9):,.0f} tokens/s")

        while pending:
            gathered = reusable.gather([identity.digests[plan[sid]] for sid in pending])
            for sid, copied in zip(pending, gathered, strict=False):
                if sid not in writer.missing():
                    continue  # another process finished it meanwhile
                progress.update(len(copied.positions))
                shard = completed(identity, plan[sid], copied, scorer, advance)
                writer.write(sid, shard, provenance(identity, copied, len(shard), scorer))
                filled.shards, filled.reused = filled.shards + 1, filled.reused + len(copied.positions)
            unwritten = set(writer.missing())
            pending = [sid for sid in pending[len(gathered) :] if sid in unwritten]
    return filled


def completed(
    identity: CacheIdentity,
    rows: np.ndarray,
    copied: Reused,
    scorer: Callable[[], ReferenceScorer],
    advance: Callable[[int, int], None],
) -> Pairs:
    """The shard with these pairs: what was not copied is scored, in batches that depend on nothing but that."""
    data = identity.tokens
    rest = rows[copied.missing(len(rows))]
    computed = None
    if len(rest):
        ids, splits = token_rows(data.input_ids, data.splits, rest)
        computed = scorer().score(data.pair_id[rest], identity.digests[rest], ids, splits, advance)
    return copied.merge(data.pair_id[rows], computed)


def token_rows(input_ids: np.ndarray, splits: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and splits of some pairs, in this order."""
    bounds = splits.astype(np.int64)
    parts = [input_ids[bounds[3 * row] : bounds[3 * row + 3]] for row in rows]
    sizes = np.diff(bounds).reshape(-1, 3)[rows]
    new = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)
    return (np.concatenate(parts) if parts else np.empty(0, np.uint32)), new


def provenance(
    identity: CacheIdentity, copied: Reused, n_pairs: int, scorer: Callable[[], ReferenceScorer]
) -> dict[str, Any]:
    """How a shard came to be: for people, never part of the key."""
    facts: dict[str, Any] = {
        "inputs": inputs(identity),
        "versions": {name: version(name) for name in ("fpo", "torch", "transformers", "numpy", "zarr")},
        "host": platform.node(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "pairs": {"reused": _largest(copied.sources), "scored": n_pairs - len(copied.positions)},
    }
    if n_pairs > len(copied.positions):
        reference = scorer()
        cuda = reference.device.type == "cuda"
        facts["device"] = torch.cuda.get_device_name() if cuda else platform.processor() or "cpu"
        facts["attention"] = reference.model.config._attn_implementation
        facts["batch_tokens"] = reference.batch_tokens
    return facts


def _largest(sources: dict[str, int], most: int = 100) -> dict[str, int]:
    """The sources of most rows, and how many came from all the others: a record has room for a few."""
    ranked = sorted(sources.items(), key=lambda item: -item[1])
    rest = sum(count for _, count in ranked[most:])
    return dict(ranked[:most]) | ({"others": rest} if rest else {})


def inputs(identity: CacheIdentity) -> dict[str, Any]:
    """The names behind the key's digests, as the recipe has them: what `fpo store ls` and `diff` show."""
    recipe = identity.recipe
    return {
        "reference": recipe.reference.model_dump(include={"model", "revision", "adapter"}),
        "features": [feature.model_dump(include={"sae"}) for feature in recipe.features],
        "data": {
            **{name: _short(value) for name, value in recipe.data.model_dump(exclude={"split", "eval_split"}).items()},
            "split": identity.split,
        },
    }


def _short(value: Any, most: int = 4096) -> Any:
    """A chat template may be written out in the recipe: a record has room for its beginning."""
    return f"{value[:most]}..." if isinstance(value, str) and len(value) > most else value
