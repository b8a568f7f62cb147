"""
What a stranger can do to a cache or to a column of it (each a folder): put other bytes into a shard and make every
checksum outside it fit again.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

from fpo.canonical import canonical_json, checked_json, parse_checked_json
from fpo.store import open_cache, verify
from fpo.store.format.archive import pack, unpack


def shard_file(folder: Path, sid: int = 0) -> Path:
    return folder / f"shards/{sid:06d}.zarr.zip"


def members_of(data: bytes) -> dict[str, bytes]:
    return {name: bytes(member) for name, member in unpack(data).items()}


def forge(folder: Path, data: bytes, sid: int = 0, **claims: Any) -> None:
    """Shard `sid` gets these bytes; its record and the manifest say so, and what else is claimed."""
    shard_file(folder, sid).write_bytes(data)
    claims |= {"size": len(data)}
    sha256 = hashlib.sha256(data).hexdigest()
    record = folder / f"records/{sid:06d}.json"
    record.write_bytes(checked_json(parse_checked_json(record.read_bytes()) | claims | {"sha256": sha256}))
    body = parse_checked_json((folder / "manifest.json").read_bytes())
    body["shards"][sid] |= claims | {"sha256": sha256}
    for total in ("n_groups", "n_completions", "n_tokens"):
        body[total] = sum(entry[total] for entry in body["shards"])
    (folder / "manifest.json").write_bytes(checked_json(body))


def forge_members(folder: Path, changes: dict[str, bytes | None], sid: int = 0, **claims: int) -> None:
    """The shard with these members changed, added, or (None) left out, in a zip of our own spelling."""
    members = members_of(shard_file(folder, sid).read_bytes()) | changes
    forge(folder, pack({name: data for name, data in members.items() if data is not None}), sid, **claims)


def forge_metadata(folder: Path, array: str, change: dict[str, Any], sid: int = 0) -> None:
    """The zarr.json of an array, in our own spelling, with these fields changed."""
    name = f"{array}/zarr.json"
    metadata = json.loads(members_of(shard_file(folder, sid).read_bytes())[name]) | change
    spelled = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()
    forge_members(folder, {name: spelled}, sid)


def foreign_zip(folder: Path, sid: int = 0, compression: int = zipfile.ZIP_STORED, **extra: bytes) -> bytes:
    """The same members as Python's zipfile writes them, with the extra ones behind."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in members_of(shard_file(folder, sid).read_bytes()).items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
        for name, data in extra.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return out.getvalue()


def forge_recipe(store: Path, recipe: dict[str, Any], manifest: bytes = b"{}") -> Path:
    """A cache folder whose name fits any recipe that a stranger likes."""
    data = canonical_json(recipe)
    folder = store / hashlib.sha256(data).hexdigest()
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_bytes(data)
    (folder / "manifest.json").write_bytes(manifest)
    return folder


def cache_of(folder: Path) -> Path:
    """The cache that this is, or that this is a column of."""
    return folder.parent.parent if folder.parent.name == "columns" else folder


def read_all(folder: Path) -> int:
    """What training does with a cache and all its columns; how many groups it got."""
    cache = cache_of(folder)
    opened = open_cache(cache.parent, cache.name, columns="all")
    return sum(len(opened.shard(sid)) for sid in range(len(opened.shard_groups)))


def problems(folder: Path) -> list[str]:
    cache = cache_of(folder)
    return verify(cache.parent, cache.name).problems
