"""
What people and models call features: Neuronpedia's public exports, from a copy on this machine or from their bucket.
A label is a stranger's text and a guess: it says what a feature looked like to whoever wrote it.

An export holds explanations in batches that are sorted by the feature's index as text, and several of one feature: all
of them are read, and kept small beside what else only saves time (`fpo.memo`).
https://docs.neuronpedia.org/api-and-data/exports
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fpo.errors import CacheError, FpoError
from fpo.memo import file_facts, keep, memo_folder, remember
from fpo.store.remote.bucket import BucketFolder

BUCKET = "neuronpedia-datasets"
SITE = "https://www.neuronpedia.org"
MAX_BATCH_BYTES = 2**28
"""Largest file of an export that is read, and the most that it may unpack to, four times."""
MAX_LABEL = 300
"""Characters of a label that are kept."""

_SOURCE = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Label(NamedTuple):
    """What one explainer calls a feature."""

    text: str
    method: str
    """How it was made and by which model, as the export says."""


Labels = dict[int, Label]
"""By feature, one each."""


class Names(NamedTuple):
    """What the features of one SAE are called, and where they are shown."""

    labels: Labels
    source: str | None = None
    """model/source of Neuronpedia's pages."""
    note: str | None = None
    """What to say where something is missing."""

    def label(self, feature: int) -> str | None:
        found = self.labels.get(feature)
        return None if found is None else found.text

    def link(self, feature: int) -> str | None:
        return None if self.source is None else f"{SITE}/{self.source}/{feature}"


class Pretrained(NamedTuple):
    """What SAELens' table knows of an SAE of the hub."""

    release: str
    sae_id: str
    neuronpedia: str | None
    """model/source, where Neuronpedia shows it."""


def feature_names(where: str | None, sae: str | None) -> Names:
    """
    The names of an SAE's features; none, and a note, where nobody can be asked.

    where  as `read_labels`, or `neuronpedia`: the source that SAELens' table has for the SAE; None asks for no labels
    sae    what its maker called it
    Raises FpoError for a place on this machine that is no export.
    """
    known = None if sae is None else pretrained(sae)
    source = known.neuronpedia if known else None
    if where is None:
        return Names({}, source, f"--labels neuronpedia names the features as {source} has them" if source else None)
    if where == "neuronpedia":
        if source is None:
            return Names({}, None, f"features have no names: no installed table of SAELens has a source for {sae}")
        where = source
    try:
        return Names(read_labels(where), where if is_source(where) else source)
    except CacheError as error:  # the bucket cannot be reached, or does not have it
        return Names({}, source, f"features have no names: {error}")


def read_labels(where: str) -> Labels:
    """
    The labels of all features that an export names.

    where  a file or folder of explanations (.jsonl, .jsonl.gz) on this machine, or a source such as
           gemma-2-2b/20-gemmascope-res-16k, read from Neuronpedia's bucket once and then from the copy
    Raises FpoError for what is not there or no export.
    """
    path = Path(where).expanduser()
    if path.is_file():
        return _chosen(_rows(path.name, path.read_bytes(), str(path)))
    if path.is_dir():
        return _chosen(_batches(_folder(path)))
    if not is_source(where):
        raise FpoError(
            f"--labels {where}: no file or folder here, and no source such as gemma-2-2b/20-gemmascope-res-16k"
        )
    copy = memo_folder() / "labels" / f"{where}.jsonl.gz"
    if not copy.is_file():
        keep(copy, _packed(_chosen(_batches(_exported(where)))))
    return _chosen(_rows(copy.name, copy.read_bytes(), str(copy)))


def is_source(where: str) -> bool:
    """Whether this is Neuronpedia's name of an SAE rather than a place on this machine."""
    return not Path(where).expanduser().exists() and _SOURCE.fullmatch(where) is not None


def pretrained(sae: str) -> Pretrained | None:
    """
    The row of SAELens' table of pretrained SAEs for a hub id with the path inside, or for `sae_lens:RELEASE/ID`: the
    one that Neuronpedia shows first; None where it has none, or sae_lens is not installed. The package itself is not
    imported.
    """
    table = _saelens_table()
    if table is None:
        return None
    name = sae.removesuffix("/params.npz").strip("/")
    facts = {"what": "SAELens' row of an SAE", "sae": name, "table": file_facts(table)}
    found = remember(facts, lambda: {"row": _row_of(name, table)})["row"]
    return None if found is None else Pretrained(*found)


def _saelens_table() -> Path | None:
    spec = importlib.util.find_spec("sae_lens")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for folder in folders if (path := Path(folder) / "pretrained_saes.yaml").is_file()), None)


def _row_of(name: str, table: Path) -> list[str | None] | None:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    releases = yaml.load(table.read_text(encoding="utf-8"), Loader=loader)
    rows = [
        [release, one["id"], one.get("neuronpedia")]
        for release, facts in releases.items()
        for one in facts.get("saes", [])
        if name in (f"{facts.get('repo_id')}/{one.get('path', one['id'])}", f"sae_lens:{release}/{one['id']}")
    ]
    return min(rows, key=lambda row: row[2] is None, default=None)


def _folder(path: Path) -> BucketFolder:
    from obstore.store import LocalStore

    return BucketFolder(path.resolve().as_uri(), LocalStore(path))


def _exported(source: str) -> BucketFolder:
    from obstore.store import S3Store

    prefix = f"v1/{source}/explanations"
    store = S3Store(BUCKET, prefix=prefix, region="us-east-1", skip_signature=True, client_options={"timeout": "60s"})
    return BucketFolder(f"s3://{BUCKET}/{prefix}", store)


def _batches(place: BucketFolder) -> Iterator[dict[str, Any]]:
    names = [name for name in place.names() if re.search(r"\.jsonl(\.gz)?$", name)]
    if not names:
        raise FpoError(f"{place.where('')} holds no explanations (.jsonl or .jsonl.gz)")
    for name in names:
        yield from _rows(name, place.read(name, MAX_BATCH_BYTES), place.where(name))


def _rows(name: str, data: bytes, where: str) -> Iterator[dict[str, Any]]:
    """The lines of a file of an export. Raises FpoError naming one that is none."""
    try:
        unpacked = _unpacked(data) if name.endswith(".gz") else data
    except (OSError, EOFError, ValueError) as error:
        raise FpoError(f"{where} cannot be unpacked ({error}); copy it again") from None
    for number, line in enumerate(unpacked.splitlines(), start=1):
        if line.strip():
            yield _row(line, f"{where}, line {number}")


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        return {**row, "index": int(row["index"]), "description": str(row["description"] or "")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FpoError(f"{where}: no explanation of a feature as Neuronpedia exports them ({error!r})") from None


def _unpacked(data: bytes) -> bytes:
    with gzip.open(io.BytesIO(data)) as file:
        unpacked = file.read(4 * MAX_BATCH_BYTES + 1)
    if len(unpacked) > 4 * MAX_BATCH_BYTES:
        raise ValueError(f"more than {4 * MAX_BATCH_BYTES} bytes unpacked")
    return unpacked


def _chosen(rows: Iterator[dict[str, Any]]) -> Labels:
    """One label per feature: of several that of the method that names most features, so that labels are alike."""
    found: dict[int, dict[str, str]] = {}
    for row in rows:
        method = " ".join(str(row[name]) for name in ("typeName", "explanationModelName") if row.get(name))
        text = " ".join(row["description"].split())[:MAX_LABEL]
        if text:
            found.setdefault(row["index"], {}).setdefault(method, text)
    counts = Counter(method for labels in found.values() for method in labels)
    chosen = {index: min(labels, key=lambda method: (-counts[method], method)) for index, labels in found.items()}
    return {index: Label(found[index][method], method) for index, method in chosen.items()}


def _packed(labels: Labels) -> bytes:
    rows = [
        {"index": str(index), "description": label.text, "typeName": label.method} for index, label in labels.items()
    ]
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)
