"""
What a cache holds as rows that any program reads, a group each, or for distillation a completion each; Parquet or JSON
lines. docs/export.md is the specification of the columns.

Dimension key:  G groups   K completions   C scored completion tokens   m top logits
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fpo.errors import CacheConflict, CacheError
from fpo.store.cache import Cache
from fpo.store.export import BLOCK_TOKENS, ExportReport, blocks
from fpo.store.files import explained
from fpo.store.format.columns import Features, PromptFeatures, TopLogits
from fpo.store.format.groups import Groups
from fpo.store.format.ragged import I64, gather, starts_of

RowsFormat = Literal["parquet", "jsonl", "distill"]
ABOUT = "fpo"
"""Key of the Parquet file's metadata: JSON with the cache's key, manifest digest and what the columns are."""


def export_rows(
    cache: Cache,
    path: Path,
    to: RowsFormat,
    on_shard: Callable[[int, int], None] | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> ExportReport:
    """
    Write what the cache holds in the order of the dataset: `parquet` and `jsonl` a row per group, `distill` a row per
    completion, in Parquet, with the reference's likeliest tokens at every position.

    path      must not exist; it is complete or not there
    on_shard  called with (done, total) after each shard that was read and verified
    Raises CacheConflict where the file is there, CacheDamaged, CacheError where it cannot be written, or for `distill`
    where the cache has no top logits.
    """
    specs = [column.spec for column in cache.held_columns(()) if column.spec["kind"] in _KINDS]
    cache.read_columns(sorted(specs, key=lambda spec: (_KINDS.index(spec["kind"]), str(spec.get("hookpoint")))))
    tables = (_distilled if to == "distill" else _grouped)(cache, blocks(cache, block_tokens, on_shard))
    if path.exists():
        raise CacheConflict(f"{path} is there already; choose another name, or delete it")
    with explained("write", path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as scratch:
            whole = Path(scratch) / "rows"
            if to == "jsonl":
                _write_lines(whole, tables)
            else:
                _write_parquet(whole, tables, _about(cache))
            os.link(whole, path)  # unlike a rename never in the place of another file
    return ExportReport(path, cache.n_groups, path.stat().st_size, cache.key, cache.digest)


_KINDS = ("features", "prompt_features", "top_logits")


def _about(cache: Cache) -> dict[str, Any]:
    """Where the rows are from, and the spec of every column of them that is not the base's."""
    columns = dict(zip(_names(cache), (column.wanted for column in cache.columns), strict=True))
    return {"key": cache.key, "manifest": cache.digest, "columns": columns}


def _names(cache: Cache) -> list[str]:
    """Of the columns that are open, by what they are; a second one of its kind and place is numbered."""
    names: list[str] = []
    for column in cache.columns:
        spec = column.wanted
        name = spec["kind"] if spec["kind"] == "top_logits" else f"{spec['kind']}/{spec['hookpoint']}"
        taken = sum(known == name or known.startswith(f"{name}#") for known in names)
        names.append(f"{name}#{taken + 1}" if taken else name)
    return names


def _grouped(cache: Cache, groups: Iterator[Groups]) -> Iterator[Any]:
    """An Arrow table of each block, a row per group."""
    import pyarrow as pa  # type: ignore[import-untyped]

    names = _names(cache)
    for block in groups:
        outer, scored = block.completion_starts, _whole_completions(block)
        prompts, completions = _segments(block)
        columns = {
            "group_id": pa.array(block.group_id),
            "prompt_ids": _lists(block.input_ids[prompts[0]].astype(np.int32), prompts[1]),
            "completion_ids": _lists(block.input_ids[completions[0]].astype(np.int32), completions[1], outer),
            "token_logps": _lists(scored(block.token_logps), completions[1], outer),
            "ref_logps": _lists(block.ref_logps, outer),
            "score": _lists(_or_null(block.score), outer),
            "weight": pa.array(block.weight),
        }
        if block.score_mask is not None:
            columns["counts"] = _lists(scored(block.score_mask.astype(bool)), completions[1], outer)
        for name, column in zip(names, block.columns, strict=True):
            splits = column.splits.astype(np.int64)
            if isinstance(column, TopLogits):
                columns[f"{name}/indices"] = _lists(_fixed(column.indices), splits, outer)
                columns[f"{name}/logps"] = _lists(_fixed(column.logps), splits, outer)
                continue
            assert isinstance(column, Features)
            levels = (splits,) if isinstance(column, PromptFeatures) else (splits, outer)
            columns[f"{name}/indices"] = _lists(column.indices, *levels)
            columns[f"{name}/acts"] = _lists(column.acts, *levels)
        yield pa.table(columns)


def _distilled(cache: Cache, groups: Iterator[Groups]) -> Iterator[Any]:
    """An Arrow table of each block, a row per completion: what axolotl's collator for distillation reads."""
    import pyarrow as pa

    place = next((at for at, column in enumerate(cache.columns) if column.wanted["kind"] == "top_logits"), None)
    if place is None:
        raise CacheError(
            f"cache {cache.key[:12]} has no top logits to distil from; add them with fpo cache RECIPE --set "
            "cache.top_logits=64"
        )
    for block in groups:
        top = block.columns[place]
        assert isinstance(top, TopLogits)
        yield pa.Table.from_pylist(list(_completions(block, top)), schema=_distill_schema())


def _completions(block: Groups, top: TopLogits) -> Iterator[dict[str, Any]]:
    """A row for each; what is not scored or does not count has no label."""
    width, scored, segment, completion = top.indices.shape[1], block.scored_splits, 0, 0
    parts = np.split(block.input_ids, block.splits[1:-1].astype(np.int64))
    for n in block.n_completions.tolist():
        for place in range(1, n + 1):
            own = slice(int(scored[completion]), int(scored[completion + 1]))
            ids = np.concatenate([parts[segment], parts[segment + place]])
            before = len(ids) - (own.stop - own.start)
            counts = np.ones(own.stop - own.start, bool)
            if block.score_mask is not None:
                counts = block.score_mask[own].astype(bool)
            yield {
                "input_ids": ids.tolist(),
                "attention_mask": [1] * len(ids),
                "labels": [-100] * before + np.where(counts, ids[before:].astype(np.int64), -100).tolist(),
                "target_token_ids": [list(range(width))] * before + top.indices[own].tolist(),
                "target_logprobs": [[-float("inf")] * width] * before + top.logps[own].tolist(),
                "target_mask": [[0] * width] * before + [[int(count)] * width for count in counts],
            }
            completion += 1
        segment += n + 1


def _distill_schema() -> Any:
    import pyarrow as pa

    ids, many = pa.list_(pa.int32()), pa.list_(pa.list_(pa.int32()))
    return pa.schema(
        [
            ("input_ids", ids),
            ("attention_mask", pa.list_(pa.int8())),
            ("labels", ids),
            ("target_token_ids", many),
            ("target_logprobs", pa.list_(pa.list_(pa.float32()))),
            ("target_mask", pa.list_(pa.list_(pa.int8()))),
        ]
    )


def _segments(block: Groups) -> tuple[tuple[I64, I64], tuple[I64, I64]]:
    """Positions of the tokens of all prompts, and of all completions, each with its splits."""
    sizes = block.n_completions.astype(np.int64) + 1
    prompts = starts_of(sizes)[:-1]
    others = np.delete(np.arange(int(sizes.sum())), prompts)
    found = [gather(block.splits, segments) for segments in (prompts, others)]
    return (found[0][0], found[0][1].astype(np.int64)), (found[1][0], found[1][1].astype(np.int64))


def _whole_completions(block: Groups) -> Callable[..., Any]:
    """Makes of a value per scored token one per token: null for the first one behind an empty prompt, never scored."""
    import pyarrow as pa

    of_all = starts_of(block.lengths[1])
    missing = np.diff(of_all) - np.diff(block.scored_splits)
    absent = np.zeros(int(of_all[-1]), dtype=bool)
    absent[of_all[:-1][missing > 0]] = True

    def whole(values: NDArray[Any]) -> Any:
        every = np.zeros(len(absent), values.dtype)
        every[~absent] = values
        return pa.array(every, mask=absent)

    return whole


def _or_null(values: NDArray[np.float32]) -> Any:
    import pyarrow as pa

    return pa.array(values, mask=np.isnan(values))


def _fixed(values: NDArray[Any]) -> Any:
    """(C, m) as lists of m."""
    width = values.shape[1]
    return _lists(np.ascontiguousarray(values).reshape(-1), width * np.arange(len(values) + 1))


def _lists(values: Any, *splits: NDArray[np.integer[Any]]) -> Any:
    """Values as lists, of lists where there are several splits, the innermost first."""
    import pyarrow as pa

    array = pa.array(values) if isinstance(values, np.ndarray) else values
    for bounds in splits:
        array = pa.LargeListArray.from_arrays(pa.array(bounds.astype(np.int64)), array)
    return array


def _write_parquet(path: Path, tables: Iterator[Any], about: dict[str, Any]) -> None:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    writer = None
    with ExitStack() as opened:
        for table in tables:
            table = table.replace_schema_metadata({ABOUT: json.dumps(about)})
            writer = writer or opened.enter_context(pq.ParquetWriter(path, table.schema))
            writer.write_table(table)


def _write_lines(path: Path, tables: Iterator[Any]) -> None:
    """JSON: every float32 as the float64 that it is."""
    with path.open("w", encoding="utf-8") as file:
        for table in tables:
            file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
