"""
Filling a cache: copy the pairs that another cache of the same scorer holds, score the rest, write shard by shard.

Every process takes the shards that have no record yet and that no other one computes (see `store.claims`): ranks of
torchrun, an array of jobs, or the command started twice share the work without communication, any number of them may
be killed, and any number may resume.
"""

from __future__ import annotations

import os
import platform
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from fpo.progress import progress_bar
from fpo.stage1_cache.identity import CacheIdentity
from fpo.stage1_cache.score import ReferenceScorer
from fpo.store import CacheWriter, Claim, Pairs, ReusableRows, Reused, own_share_first

_PAUSE_SECONDS = 0.2
"""Between two looks at shards that others compute, when nothing else is left."""


@dataclass
class Filled:
    """What this process did; others may have done the rest."""

    shards: int = 0
    by_others: int = 0
    """Shards that were missing when it began and that other processes wrote."""
    reused: int = 0
    """Pairs that were copied."""
    scored: int = 0
    """Pairs that were scored."""
    tokens: int = 0
    """Tokens of those."""
    layout: str | None = None
    """How they were laid out for the reference."""


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
    pending = own_share_first(writer.missing(), *own_place())
    done = sum(len(rows) for rows in plan) - sum(len(plan[sid]) for sid in pending)
    filled = Filled()
    total = len(identity.tokens)
    with progress_bar(total, "pairs", f"cache {identity.split}", initial=done, smoothing=0.05) as progress:

        def advance(claim: Claim, n_pairs: int, n_tokens: int) -> None:
            claim.renew()
            filled.scored, filled.tokens = filled.scored + n_pairs, filled.tokens + n_tokens
            progress.update(n_pairs)
            progress.set_postfix_str(f"{filled.tokens / max(progress.elapsed, 1e-9):,.0f} tokens/s")

        claims, copies = writer.claims(), dict[int, Reused]()
        while pending:
            waiting = []
            for place, sid in enumerate(pending):
                claim = None if writer.stands(sid) else claims.take(sid)
                # Asked again under the claim: its last holder may have written the shard just before.
                if writer.stands(sid):
                    progress.update(len(plan[sid]))
                    filled.by_others += 1
                elif claim is None:
                    waiting.append(sid)
                else:
                    if sid not in copies:
                        copies = _gathered(identity, plan, reusable, [*pending[place:], *waiting])
                    copied = copies.pop(sid)
                    progress.update(len(copied.positions))
                    shard = completed(identity, plan[sid], copied, scorer, partial(advance, claim))
                    facts = provenance(identity, copied, len(shard), scorer)
                    writer.write(sid, shard, facts)
                    filled.layout = facts.get("layout", filled.layout)
                    filled.shards, filled.reused = filled.shards + 1, filled.reused + len(copied.positions)
                if claim is not None:
                    claim.end()
            if waiting == pending:
                time.sleep(_PAUSE_SECONDS)
            pending = waiting
    return filled


def own_place() -> tuple[int, int]:
    """
    Which of how many processes this is, so that each begins with a share of its own: as torchrun says, else SLURM of
    the tasks of a step and the jobs of an array. Where nobody says, host and process id decide where to begin.
    """

    def number(name: str, otherwise: int) -> int:
        text = os.environ.get(name, "")
        return int(text) if text.isdigit() else otherwise

    if "RANK" in os.environ:
        return number("RANK", 0), number("WORLD_SIZE", 1)
    task, tasks = number("SLURM_PROCID", 0), number("SLURM_NTASKS", 1)
    step = max(number("SLURM_ARRAY_TASK_STEP", 1), 1)
    job = (number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)) // step
    jobs = number("SLURM_ARRAY_TASK_COUNT", 1)
    if tasks * jobs > 1 and 0 <= task < tasks and 0 <= job < jobs:
        return job * tasks + task, tasks * jobs
    many = 2**16
    return zlib.crc32(f"{platform.node()} {os.getpid()}".encode()) % many, many


def _gathered(
    identity: CacheIdentity, plan: list[np.ndarray], reusable: ReusableRows, order: list[int]
) -> dict[int, Reused]:
    """What can be copied into the first of these shards and as many more as fit into memory."""
    gathered = reusable.gather([identity.digests[plan[sid]] for sid in order])
    return dict(zip(order, gathered, strict=False))


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
        computed = scorer().score(data.group_id[rest], identity.digests[rest], ids, splits, advance)
    return copied.merge(data.group_id[rows], computed)


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
        facts["layout"] = str(reference.layout)
    return facts


def _largest(sources: dict[str, int], most: int = 100) -> dict[str, int]:
    """The sources of most rows, and how many came from all the others: a record has room for a few."""
    ranked = sorted(sources.items(), key=lambda item: -item[1])
    rest = sum(count for _, count in ranked[most:])
    return dict(ranked[:most]) | ({"others": rest} if rest else {})


def inputs(identity: CacheIdentity) -> dict[str, Any]:
    """The names behind the key's digests, as the recipe has them: what `fpo store ls` and `diff` show."""
    recipe = identity.recipe
    silent = {"split", "eval_split"} | (set() if recipe.data.columns else {"columns"})
    return {
        "reference": recipe.reference.model_dump(include={"model", "revision", "adapter"}),
        "features": [feature.model_dump(include={"sae"}) for feature in recipe.features],
        "data": {
            **{name: _short(value) for name, value in recipe.data.model_dump(exclude=silent).items()},
            "split": identity.split,
        },
    }


def _short(value: Any, most: int = 4096) -> Any:
    """A chat template may be written out in the recipe: a record has room for its beginning."""
    return f"{value[:most]}..." if isinstance(value, str) and len(value) > most else value
