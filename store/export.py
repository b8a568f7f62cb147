"""
A cache of pairs, groups of two, for other trainers: their tokens and the reference's log-probs as a folder of Hugging
Face `datasets`. What a cache holds as rows of a file is in `rows`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fpo.errors import CacheConflict, CacheError
from fpo.store.cache import Cache
from fpo.store.files import explained
from fpo.store.format.groups import Groups
from fpo.store.format.ragged import I64, gather
from fpo.store.upkeep.describe import counted

TRL_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
BLOCK_TOKENS = 2**24
"""Tokens that are put into the dataset's order at a time: about 200 MB of memory."""


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    path: Path
    n_groups: int
    n_bytes: int
    key: str
    digest: str
    """Output address of the cache; it stands in the dataset's description too."""


def export_trl(
    cache: Cache,
    folder: Path,
    on_shard: Callable[[int, int], None] | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> ExportReport:
    """
    Write the columns of which TRL's DPOTrainer makes its batches, one row per group in the order of the dataset:
    prompt_ids, chosen_ids, rejected_ids (int32 lists) and ref_chosen_logps, ref_rejected_logps (float32, nats).

    folder    must not exist, or be empty; `datasets.load_from_disk` opens it. It is complete or not there.
    on_shard  called with (done, total) after each shard that was read and verified
    Raises CacheConflict where the folder is taken, CacheDamaged, CacheError where it cannot be written or where TRL's
    DPOTrainer cannot say what the cache holds: a group that is no pair, a mask of tokens that count.
    """
    import datasets

    _refuse_mask(cache)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CacheConflict(f"{folder} is there already; choose another folder, or delete it")
    with explained("write", folder):
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.absolute().parent) as scratch:
            stream = Path(scratch) / "pairs.arrow"
            _write_stream(stream, blocks(cache, block_tokens, on_shard, partial(_check_pairs, cache)))
            about = datasets.DatasetInfo(
                description=f"Pairs and reference log-probs of fpo cache {cache.key}, manifest {cache.digest}."
            )
            datasets.Dataset.from_file(str(stream), info=about).save_to_disk(Path(scratch) / "dataset")
            os.rename(Path(scratch) / "dataset", folder)
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return ExportReport(folder, cache.n_groups, n_bytes, cache.key, cache.digest)


def blocks(
    cache: Cache,
    block_tokens: int = BLOCK_TOKENS,
    on_shard: Callable[[int, int], None] | None = None,
    check: Callable[[Groups], None] = lambda groups: None,
) -> Iterator[Groups]:
    """
    All groups by ascending group_id, with the columns that are open, in blocks of about `block_tokens`; each block
    reads every shard once.

    check  called with every shard that was read
    """
    n_blocks = -(-cache.manifest.n_tokens // block_tokens) or 1
    n_shards = len(cache.shard_groups)
    bounds = [0]  # the lowest id of every block
    if n_blocks > 1:
        ids = np.sort(np.concatenate([cache.shard(sid).group_id for sid in range(n_shards)]))
        bounds += [int(ids[len(ids) * n // n_blocks]) for n in range(1, n_blocks)]
    for n in range(n_blocks):
        parts = []
        for sid in range(n_shards):
            groups = cache.shard(sid)
            check(groups)
            block = np.searchsorted(np.array(bounds, np.uint64), groups.group_id, side="right") - 1
            parts.append(groups.take(np.flatnonzero(block == n)))
            if on_shard is not None:
                on_shard(n * n_shards + sid + 1, n_blocks * n_shards)
        if parts:
            joined = Groups.concat(parts)
            yield joined.take(np.argsort(joined.group_id))


def _check_pairs(cache: Cache, groups: Groups) -> None:
    others = np.flatnonzero(groups.n_completions != 2)
    if len(others):
        first = others[0]
        raise CacheError(
            f"cache {cache.key[:12]} holds more than pairs: group {groups.group_id[first]} has "
            f"{counted(int(groups.n_completions[first]), 'completion')}, TRL's DPOTrainer takes 2; train from "
            "the cache with fpo align, or build one of pairs"
        )


def _refuse_mask(cache: Cache) -> None:
    if cache.facts.groups.score_mask:
        raise CacheError(
            f"cache {cache.key[:12]} says by a mask which tokens count, TRL's DPOTrainer counts all of them; train "
            "from the cache with fpo align, or build one without data.score"
        )


def _write_stream(path: Path, pairs: Iterator[Groups]) -> None:
    """An Arrow stream, one batch per block."""
    import pyarrow as pa  # type: ignore[import-untyped]

    types = [pa.list_(pa.int32())] * 3 + [pa.float32()] * 2
    schema = pa.schema(list(zip(TRL_COLUMNS, types, strict=True)))
    with pa.ipc.new_stream(str(path), schema) as writer:
        for block in pairs:
            columns = [_token_lists(block, part) for part in range(3)]
            columns += [pa.array(np.ascontiguousarray(block.ref_logps[side::2])) for side in (0, 1)]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _token_lists(block: Groups, part: int) -> Any:
    """The ids of every pair's prompt (0), chosen (1) or rejected (2) completion."""
    import pyarrow as pa

    segments: I64 = 3 * np.arange(len(block.group_id)) + part
    tokens, splits = gather(block.splits, segments)
    return pa.ListArray.from_arrays(
        pa.array(splits.astype(np.int32)), pa.array(block.input_ids[tokens].astype(np.int32))
    )
