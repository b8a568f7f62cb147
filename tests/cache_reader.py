"""
A reader of caches that was written from docs/cache-format.md alone: json, hashlib, zipfile, zstd and numpy.

    base = read(folder of a cache);  column = read(folder of a column)
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import zstd


def spelled(body: Any, **how: Any) -> bytes:
    return json.dumps(body, sort_keys=True, ensure_ascii=False, **how).encode()


def checked(path: Path) -> dict[str, Any]:
    """Checked JSON without its check."""
    body = json.loads(path.read_bytes())
    claimed = body.pop("check")
    assert claimed == hashlib.sha256(spelled(body, indent=1) + b"\n").hexdigest()
    assert path.read_bytes() == spelled(body | {"check": claimed}, indent=1) + b"\n"
    return body


def arrays_of(data: bytes, attributes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every array of a shard, by name."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    members = {name: archive.read(name) for name in archive.namelist()}
    assert json.loads(members["zarr.json"])["attributes"] == attributes
    found = {}
    for name in (name.removesuffix("/zarr.json") for name in members if name.endswith("/zarr.json")):
        document = json.loads(members[f"{name}/zarr.json"])
        chunk = f"{name}/c" + "/0" * len(document["shape"])
        raw = zstd.decompress(members[chunk]) if chunk in members else b""
        array = np.frombuffer(raw, np.dtype(document["data_type"]).newbyteorder("<"))
        found[name] = array.reshape(document["shape"])
    return found


def rows_digest(arrays: dict[str, np.ndarray]) -> str:
    """Whose rows a shard holds: of a base all that its data says, of a column the ids."""
    names = ["group_id"]
    if "completion_digest" in arrays:
        names += ["n_completions", "completion_digest", "score", "weight"]
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in names)).hexdigest()


def read(folder: Path) -> list[dict[str, np.ndarray]]:
    """The arrays of every shard of a cache or of a column, held against its name, its recipe and its manifest."""
    text = (folder / "recipe.json").read_bytes()
    recipe, key = json.loads(text), hashlib.sha256(text).hexdigest()
    assert (folder.name, spelled(recipe, separators=(",", ":")), recipe["format"]) == (key, text, 1)
    manifest = checked(folder / "manifest.json")
    sizes = recipe["shard_groups"] if "base" in recipe else recipe["groups"]["shard_groups"]
    assert (manifest["key"], [entry["n_groups"] for entry in manifest["shards"]]) == (key, sizes)
    if "groups" in recipe:
        digests = b"".join(bytes.fromhex(entry["rows_digest"]) for entry in manifest["shards"])
        assert hashlib.sha256(digests).hexdigest() == recipe["groups"]["digest"]
    shards = []
    for sid, entry in enumerate(manifest["shards"]):
        data = (folder / f"shards/{sid:06d}.zarr.zip").read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size"], entry["sha256"])
        counts = {name: entry[name] for name in ("n_groups", "n_completions", "n_tokens", "shard")}
        shards.append(arrays_of(data, {"format": 1, "key": key, **counts}))
        assert rows_digest(shards[-1]) == entry["rows_digest"]
    return shards
