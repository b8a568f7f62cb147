"""
Log-probs that another engine computed, as a scorer of the groups that a recipe asks for: rows with token ids, in the
columns of `store.rows`, as Parquet or JSON lines. A completion is found by its tokens, whatever row it stands in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fpo.errors import DataError
from fpo.stage1_cache.identity import CacheIdentity
from fpo.stage1_cache.score import TokenGroups
from fpo.store import Column, TokenLogps, Want
from fpo.store.format.groups import scored_splits
from fpo.store.format.key import completion_digests
from fpo.store.format.ragged import starts_of

_NEEDS = ("prompt_ids", "completion_ids", "token_logps")
_BATCH = 1024
_SUMS = "ref_chosen_logps"
"""A column of TRL's precomputed datasets."""


class ImportedScores:
    """Stands where the reference does: what it says of a completion was read from a file."""

    layout = None

    def __init__(self, files: Sequence[Path], engine: str) -> None:
        """
        Reads all of them: 4 bytes a token and 24 a completion stay in memory.

        engine  what computed them, for the records
        Raises DataError for a file that is not there, and a row that holds what its columns cannot, by its number.
        """
        self.files, self.engine = ", ".join(map(str, files)), engine
        digests, logps, lengths = list[np.ndarray](), [np.zeros(0, np.float32)], list[int]()
        for path in files:
            for number, row in enumerate(_rows(path)):
                found, said = _read(row, f"{path}, row {number}")
                digests.append(found)
                logps += said
                lengths += [len(one) for one in said]
        if not digests:
            raise DataError(f"{self.files}: no rows")
        every = np.ascontiguousarray(np.concatenate(digests)).view("V16").reshape(-1)
        self._splits, self._logps = starts_of(lengths), np.concatenate(logps)
        self._order = np.argsort(every, kind="stable")
        self._digests = every[self._order]

    def scorer(self, identity: CacheIdentity) -> ImportedScores:
        """Of any cache whose completions it holds."""
        return self

    def check(self, identity: CacheIdentity) -> None:
        """DataError where the file lacks a completion that the recipe asks for, by its row."""
        places = self._places(identity.digests)
        absent = np.flatnonzero(places < 0)
        if len(absent):
            groups = np.repeat(identity.tokens.group_id, identity.tokens.n_completions)
            raise DataError(
                f"{self.files}: no log-probs of {len(absent):,} of the {len(places):,} completions that the recipe "
                f"asks for, the first of row {groups[absent[0]]} of split {identity.split}: the row is not there, or "
                "has other tokens (chat template, BOS, end token, max_length)"
            )

    def score(
        self,
        groups: TokenGroups,
        wants: Sequence[Want],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Column]:
        """As `ReferenceScorer.score`, of the base alone."""
        assert list(wants) == [None]
        digests = completion_digests(
            groups.input_ids, groups.splits.astype(np.uint64), groups.n_completions, groups.score_mask
        )
        places = self._places(digests)
        found = [self._logps[self._splits[at] : self._splits[at + 1]] for at in places]
        if progress is not None:
            progress(len(places), len(groups.input_ids))
        splits = scored_splits(groups.splits, groups.n_completions).astype(np.uint64)
        return [TokenLogps(splits, np.concatenate(found) if found else np.zeros(0, np.float32))]

    def provenance(self) -> dict[str, Any]:
        """How its rows came to be."""
        return {"imported": self.files, "engine": self.engine}

    def _places(self, digests: np.ndarray) -> np.ndarray:
        """(K,) which completion of the file each is, -1 for none."""
        wanted = np.ascontiguousarray(digests).view("V16").reshape(-1)
        at = np.searchsorted(self._digests, wanted).clip(max=len(self._digests) - 1)
        return np.where(self._digests[at] == wanted, self._order[at], -1)


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number + 1}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number + 1}: not a JSON object; write one row per line")
                _check_columns(list(row), f"{path}, row {number}")
                yield row
        return
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        file = pq.ParquetFile(path)
        _check_columns(file.schema_arrow.names, str(path))
        wanted = [name for name in (*_NEEDS, "counts") if name in file.schema_arrow.names]
        for batch in file.iter_batches(_BATCH, columns=wanted):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: neither Parquet nor .jsonl ({str(error).splitlines()[0]})") from None


def _check_columns(names: Sequence[str], where: str) -> None:
    if _SUMS in names:
        raise DataError(
            f"{where}: it holds sums of log-probs alone, and a cache holds every token's (token_logps), from which any "
            "objective's sum can be taken; let the engine write its log-prob of every token"
        )
    if absent := [name for name in _NEEDS if name not in names]:
        raise DataError(f"{where}: no column {absent[0]!r}; needed are {', '.join(_NEEDS)}: see docs/export.md")


def _read(row: Mapping[str, Any], where: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """(n, 16) digests of a row's completions, and the log-probs of their scored tokens."""
    prompt, completions, logps = (row[name] for name in _NEEDS)
    counts = row.get("counts") or [None] * len(completions)
    if not len(completions) == len(logps) == len(counts):
        raise DataError(f"{where}: {len(completions)} completions and {len(logps)} lists of token_logps")
    scored = [_scored(ids, said, not prompt, where) for ids, said in zip(completions, logps, strict=True)]
    mask = None
    if row.get("counts"):
        marks = [said[0 if prompt else 1 :] for said in counts]
        mask = np.array([bool(mark) for one in marks for mark in one], dtype=np.uint8)
        if [len(one) for one in marks] != [len(one) for one in scored]:
            raise DataError(f"{where}: counts must say of every token of completion_ids whether it counts")
    splits = starts_of([len(prompt), *map(len, completions)]).astype(np.uint64)
    try:
        ids = np.array([*prompt, *(token for one in completions for token in one)], dtype=np.uint32)
    except (OverflowError, TypeError, ValueError) as error:
        raise DataError(f"{where}: token ids that are none ({error})") from None
    return completion_digests(ids, splits, np.array([len(completions)]), mask), scored


def _scored(ids: Sequence[int], values: Sequence[Any], empty_prompt: bool, where: str) -> np.ndarray:
    """The values of a completion's scored tokens: all, but for the first one behind an empty prompt."""
    if len(values) != len(ids):
        raise DataError(f"{where}: {len(ids)} tokens and {len(values)} values for them")
    said = list(islice(values, 1 if empty_prompt else 0, None))
    if any(value is None for value in said):
        raise DataError(f"{where}: a null for a token that something precedes")
    found = np.array(said, dtype=np.float32)
    if not np.isfinite(found).all() or (found > 0).any():
        raise DataError(f"{where}: token_logps must be log-probabilities, finite and not above 0")
    return found
