"""
Rows from a file, a folder or the hub, as a `datasets.Dataset` in one of the layouts of `layouts`, in text or messages
(lists of role and content). What does not fit is refused here, with its file, row and column.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

from fpo.errors import DataError
from fpo.memo import file_facts
from fpo.stage1_cache.read.columns import ColumnUse, group_columns, meant

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
"""Suffix (before an optional .gz) to the reader of `datasets`."""
# train.jsonl and train-00000-of-00002.parquet both belong to the split "train".
_SPLIT_OF_STEM = re.compile(r"(?P<split>\w+(\.\w+)*?)(-\d+-of-\d+)?")


class ReadGroups(NamedTuple):
    """The rows of one split, and which of the dataset's columns they are made of."""

    dataset: Dataset
    columns: ColumnUse
    bad: frozenset[int]
    """Rows that hold what their columns cannot; none where these are refused."""


def read_groups(
    source: str,
    split: str,
    subset: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    *,
    drop_bad: bool = False,
) -> ReadGroups:
    """
    The rows of one split, with the columns of their layout and no others.

    `source`: a .jsonl, .json, .parquet or .csv file (.gz too), which is one split named train; a folder of
    such files named by their split, or written by `Dataset.save_to_disk`; or a hub id with `subset` and
    `revision`. `split` may slice and add, as in `datasets`: train[:90%], train+test. Where prompt is text
    and the completions are whole conversations (UltraFeedback), the conversations count and prompt is left
    out. `columns`: our column names to the dataset's, see `group_columns`, as for `drop_bad`. Raises `DataError`.
    """
    rows = read_rows(source, split, subset, revision)
    return ReadGroups(*group_columns(rows, source, columns, drop_bad=drop_bad))


def read_column(
    source: str, split: str, name: str, subset: str | None = None, revision: str | None = None, *, origin: str = ""
) -> list[str]:
    """
    What a column says of every row, as text, whatever it is for: rows are those of `read_groups`, by number; `origin`
    stands for a column of that name that is not there. Raises `DataError` where there is no such column.
    """
    dataset = read_rows(source, split, subset, revision)
    if name == "origin" and name not in dataset.column_names and origin:
        return [origin] * len(dataset)
    if name not in dataset.column_names:
        raise DataError(f"{source}: no column {name!r}{meant(name, dataset.column_names)}")
    return [str(value) for value in dataset[name]]


def read_rows(source: str, split: str, subset: str | None = None, revision: str | None = None) -> Dataset:
    """The rows of one split as they are, whatever they hold; sources and errors as in `read_groups`."""
    path = _local(source, subset, revision)
    dataset = _from_hub(source, split, subset, revision) if path is None else _from_disk(path, split)
    if len(dataset) == 0:
        raise _no_rows(source, split)
    return dataset


def data_fingerprint(source: str, split: str, subset: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """
    What tells, without reading the data, that it is unchanged, in JSON types: `file_facts` of each file, or the
    commit of a hub dataset. Raises `DataError` as `read_groups` does for what is not there.
    """
    path = _local(source, subset, revision)
    if path is None:
        builder = _hub(load_dataset_builder, source, subset, revision=revision)
        facts = {"repo": source, "subset": builder.config.name, "commit": builder.hash}
        return {"split": split, "hub": facts}
    if path.is_file():
        files = [path]
    elif _saved_to_disk(path):
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = [Path(file) for name in _folder_splits(path, split).values() for file in name]
    try:
        return {"split": split, "files": [file_facts(file) for file in files]}
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None


def nearest_file(path: Path) -> str:
    """`meant` among the files beside a path."""
    return meant(path.name, [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else [])


def _local(source: str, subset: str | None, revision: str | None) -> Path | None:
    """The path that a source names, or None for a hub id."""
    path = Path(source).expanduser()
    if path.exists():
        if subset is not None or revision is not None:
            raise DataError(f"{source} is local: subset and revision are for hub datasets; leave them out")
        return path
    if source.startswith(("/", ".", "~")) or source.count("/") > 1 or _format(path):
        raise DataError(f"{source}: no such file or folder{nearest_file(path)}")
    return None


def _format(path: Path) -> str | None:
    return FORMATS.get((path.with_suffix("") if path.suffix == ".gz" else path).suffix)


def _saved_to_disk(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _unknown_split(source: object, name: str, known: Iterable[str]) -> DataError:
    known = sorted(known)
    return DataError(f"{source}: no split {name!r}{meant(name, known)}; its splits: {', '.join(known) or 'none'}")


def _no_rows(source: object, split: str) -> DataError:
    return DataError(f"{source}: split {split!r} has no rows; choose another split or slice")


def _split_names(split: str) -> list[str]:
    """The splits that a specification like train[:90%]+test reads."""
    return [part.split("[")[0].strip() for part in split.split("+")]


def _folder_splits(folder: Path, split: str) -> dict[str, list[str]]:
    """The files of the splits asked for, from the folder or its data/ subfolder."""
    found: dict[str, list[str]] = {}
    for file in sorted(file for place in (folder, folder / "data") for file in place.glob("*")):
        name = file.name.split(".gz")[0].rpartition(".")[0]
        if _format(file) and file.is_file() and (match := _SPLIT_OF_STEM.fullmatch(name)):
            found.setdefault(match["split"], []).append(str(file))
    names = _split_names(split)
    for name in names:
        if name not in found:
            raise _unknown_split(folder, name, found)
    return {name: found[name] for name in names}


def _from_disk(path: Path, split: str) -> Dataset:
    if path.is_dir() and _saved_to_disk(path):
        return _from_saved(path, split)
    files = _folder_splits(path, split) if path.is_dir() else {"train": [str(path)]}
    for name in _split_names(split):
        if name not in files:
            raise DataError(
                f"{path}: a single file is the split 'train', not {name!r}; ask for train (slices like "
                "train[:90%] too), or name a folder of files named by split"
            )
    formats = {_format(Path(file)) for group in files.values() for file in group}
    if len(formats) != 1 or None in formats:
        raise DataError(f"{path}: not one of the formats {', '.join(FORMATS)} (.gz too) throughout; convert it")
    # `datasets` names its own cache of a file by path and mtime alone; the name adds what else tells that it changed.
    facts = data_fingerprint(str(path), split)
    name = "fpo-" + hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    try:
        return cast(Dataset, load_dataset(formats.pop(), name=name, data_files=files, split=split))
    except Exception as error:
        _check_cache_folder(error)
        for group in files.values():
            for file in group:
                _diagnose(Path(file), error)
        if "corresponds to no data" in str(error):
            raise _no_rows(path, split) from error
        raise DataError(f"{path}, split {split!r}: {_innermost(error)}") from error


def _from_saved(folder: Path, split: str) -> Dataset:
    loaded = load_from_disk(folder)
    parts = loaded if isinstance(loaded, DatasetDict) else {str(loaded.split or "train"): loaded}
    for name in _split_names(split):
        if name not in parts:
            raise _unknown_split(folder, name, map(str, parts))
    try:
        slices = ReadInstruction.from_spec(split).to_absolute({name: len(part) for name, part in parts.items()})
    except (ValueError, AssertionError) as error:
        raise DataError(f"{folder}, split {split!r}: {error}") from error
    return concatenate_datasets([parts[part.splitname].select(range(part.from_, part.to)) for part in slices])


def _from_hub(source: str, split: str, subset: str | None, revision: str | None) -> Dataset:
    return cast(Dataset, _hub(load_dataset, source, subset, split=split, revision=revision))


def _hub(load: Any, source: str, subset: str | None, **arguments: Any) -> Any:
    try:
        return load(source, subset, **arguments)
    except Exception as error:  # the hub client has no common base class for what can go wrong on the way
        raise DataError(f"hub dataset {source!r}: {_innermost(error)}") from error


def _check_cache_folder(error: Exception) -> None:
    """`DataError` where it is not the data that cannot be read, but the cache of `datasets` that cannot be written."""
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise DataError(
            f"{folder}, where `datasets` keeps what it has read, cannot be written; set HF_HOME to a folder that can be"
        ) from error


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _diagnose(file: Path, error: Exception) -> None:
    """Raise the `DataError` that names the line where a file cannot be read, if one can be found."""
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty") from error
    if _format(file) != "json":
        return
    number = 0
    holds_rows = False
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
            if ".jsonl" not in file.suffixes:
                holds_rows = bool(json.load(lines))
            else:
                for number, line in enumerate(lines, start=1):
                    if line.strip() and not isinstance(json.loads(line), dict):
                        raise DataError(f"{file}, line {number}: not a JSON object; write one row per line") from error
                    holds_rows = holds_rows or bool(line.strip())
    except json.JSONDecodeError as wrong:
        line_number = number or wrong.lineno
        raise DataError(f"{file}, line {line_number}: not JSON ({wrong.msg}, column {wrong.colno})") from error
    except UnicodeDecodeError as wrong:
        raise DataError(f"{file}, line {number}: not UTF-8 ({wrong.reason}); convert the file") from error
    except (EOFError, OSError) as wrong:
        raise DataError(f"{file}, after line {number}: cannot be decompressed ({wrong}); copy it again") from error
    if not holds_rows:
        raise DataError(
            f"{file}: the file holds no rows, only {f'{number} blank lines' if number else 'an empty list'}"
        )
