"""
The files of an SAE: found in a folder or on the Hugging Face hub, their headers and tensors read as float32.

Only what is asked for is downloaded (some folders hold gigabytes of examples beside the weights) and only the
tensors that are asked for are read. numpy alone: safetensors' own numpy reader has no bfloat16.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpo.errors import SaeError

# The weights file tells the format; beside it stands at most one configuration.
FORMATS = {
    "params.npz": ("gemma_scope", "config.json"),
    "params.safetensors": ("gemma_scope_2", "config.json"),
    "sae_weights.safetensors": ("saelens", "cfg.json"),
    "sae.safetensors": ("sparsify", "cfg.json"),
}
ACCEPTED = (
    "accepted: Gemma Scope (params.npz), Gemma Scope 2 (params.safetensors), "
    "SAELens (cfg.json, sae_weights.safetensors), sparsify (cfg.json, sae.safetensors)"
)

_HUB_SOURCE = re.compile(r"^([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w.-]+))?(?:/(.+?))?/?$")
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


_MAX_JSON_BYTES = 2**20
"""Of a config or a header of tensors; those of real SAEs have a few kilobytes."""

_MAX_EXPANSION, _SLACK_BYTES = 8, 2**20
"""
A tensor may be so many times larger than the bytes that a file really holds of it, plus the slack (zeros of a bias).
Trained weights do not compress to a half; a gigabyte of zeros is a megabyte of zip, and no byte of a file with holes.
"""


@dataclass(frozen=True)
class SaeFiles:
    """One SAE's files on this disk. `source` is what the user wrote; `config` is {} where there is none."""

    source: str
    format: str
    weights: Path
    config: dict[str, Any]
    place: str
    """Path of the SAE's folder, in the repository or on disk; it can say where the SAE hooks."""


def find_files(source: str, hookpoint: str | None) -> SaeFiles:
    """
    The files of `source`: a local folder or params.npz, or `owner/repo[@revision][/folder]` on the hub.

    Where the folder holds one SAE per hookpoint, as sparsify writes them, `hookpoint` chooses among them.
    Raises SaeError for a source that is not there, holds no SAE or holds several.
    """
    local = Path(source).expanduser()
    if local.exists():
        return _find_local(source, local, hookpoint)
    hub = _HUB_SOURCE.match(source)
    if hub is None:
        raise SaeError(f"SAE {source}: no such folder, and not a hub id (owner/repo/folder); {ACCEPTED}")
    return _find_on_hub(source, hub[1], hub[2], hub[3] or "", hookpoint)


def _find_local(source: str, path: Path, hookpoint: str | None) -> SaeFiles:
    if path.is_file():
        if path.name not in FORMATS:
            raise SaeError(f"SAE {source}: a file named {path.name}; {ACCEPTED}")
        names, folder = [path.name], path.parent
    else:
        folders = [path, *([path / _inside_model(hookpoint)] if hookpoint else [])]
        found = [(folder, names) for folder in folders if (names := [n for n in FORMATS if (folder / n).is_file()])]
        if not found:
            raise SaeError(f"SAE {source}: no SAE here; found {_listing(path)}; {ACCEPTED}")
        folder, names = found[0]
    if len(names) > 1:
        raise SaeError(f"SAE {source}: holds {' and '.join(names)}; keep one format per folder")
    sae_format, config_name = FORMATS[names[0]]
    config = _read_config(source, folder / config_name, sae_format)
    return SaeFiles(source, sae_format, folder / names[0], config, folder.resolve().as_posix())


def _find_on_hub(source: str, repo: str, revision: str | None, folder: str, hookpoint: str | None) -> SaeFiles:
    """Files are asked for by name, so that one cached earlier is found without a connection."""
    stem, _, last = folder.rpartition("/")
    names = [last] if last in FORMATS else list(FORMATS)
    folder = stem if last in FORMATS else folder
    folders = [folder, *([f"{folder}/{_inside_model(hookpoint)}".lstrip("/")] if hookpoint else [])]
    unreachable: list[str] = []
    for place in folders:
        for name in names:
            weights = _download(source, repo, revision, f"{place}/{name}".lstrip("/"), unreachable)
            if weights is None:
                continue
            sae_format, config_name = FORMATS[name]
            config_path = _download(source, repo, revision, f"{place}/{config_name}".lstrip("/"), unreachable)
            config = _read_config(source, config_path or weights.with_name(config_name), sae_format)
            return SaeFiles(source, sae_format, weights, config, f"{repo}/{place}")
    if unreachable:
        raise SaeError(
            f"SAE {source}: no such folder here, not in the hub's cache, and the hub cannot be reached "
            f"({unreachable[0]})"
        )
    raise SaeError(f"SAE {source}: repository {repo} has no SAE in {' or '.join(map(repr, folders))}; {ACCEPTED}")


def _download(source: str, repo: str, revision: str | None, name: str, unreachable: list[str]) -> Path | None:
    """
    One file of a hub repository, through its cache; None where the repository has no such file, or where it
    is not cached and the hub cannot be reached, which is then noted in `unreachable`.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except hub.LocalEntryNotFoundError as error:
        unreachable.append(type(error.__cause__ or error).__name__)
        return None
    except hub.EntryNotFoundError:
        return None
    except hub.GatedRepoError as error:
        raise SaeError(f"SAE {source}: {repo} is gated; accept its licence and run `hf auth login`") from error
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as error:
        where = f"{repo}@{revision}" if revision else repo
        raise SaeError(f"SAE {source}: neither a folder here nor a hub repository {where}; {ACCEPTED}") from error
    except (hub.HfHubHTTPError, OSError) as error:
        raise SaeError(f"SAE {source}: cannot download {name} ({type(error).__name__}: {error})") from error


def _read_config(source: str, path: Path, sae_format: str) -> dict[str, Any]:
    if not path.is_file():
        if sae_format in ("saelens", "sparsify"):
            raise SaeError(f"SAE {source}: {path.name} is missing beside the weights; {ACCEPTED}")
        return {}
    try:
        if (size := path.stat().st_size) > _MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes, at most {_MAX_JSON_BYTES} are read")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SaeError(f"SAE {source}: {path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise SaeError(f"SAE {source}: {path} holds a {type(config).__name__}, not an object")
    return config


def _inside_model(hookpoint: str) -> str:
    """sparsify names its folders by the path inside the base model: layers.10.mlp, h.3."""
    return re.sub(r"^(model|transformer|gpt_neox)\.", "", hookpoint)


def _listing(folder: Path) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


class Weights:
    """The tensors of one .safetensors or .npz file: shapes from the header, values as float32."""

    def __init__(self, source: str, path: Path) -> None:
        self._source, self._path = source, path
        self._headers: dict[str, dict[str, Any]] = {}
        try:
            if path.suffix == ".npz":
                self.shapes = _npz_shapes(path)
            else:
                self._headers, self._start = _safetensors_headers(path)
                self.shapes = {name: tuple(h["shape"]) for name, h in self._headers.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError, zipfile.BadZipFile) as error:
            raise SaeError(
                f"SAE {source}: {path} cannot be read ({error}); is the file complete? "
                f"Git LFS pointers and broken downloads look like this"
            ) from error

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor, float32. Raises SaeError where it is damaged, not a float, or not finite."""
        try:
            raw = self._read_npz(name) if self._path.suffix == ".npz" else self._read_safetensors(name)
        except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise SaeError(f"SAE {self._source}: {name} in {self._path} cannot be read ({error})") from error
        values = raw.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise SaeError(f"SAE {self._source}: {name} in {self._path} has values that are not finite")
        return values

    def _read_npz(self, name: str) -> NDArray[Any]:
        with zipfile.ZipFile(self._path) as members:
            member = members.getinfo(f"{name}.npy")
        held = min(member.compress_size, _bytes_held(self._path, member.header_offset, member.compress_size))
        _refuse_expansion(member.file_size, held)
        with np.load(self._path, allow_pickle=False) as archive:
            values: NDArray[Any] = archive[name]
        if not np.issubdtype(values.dtype, np.floating):
            raise ValueError(f"dtype {values.dtype}, expected a float")
        return values

    def _read_safetensors(self, name: str) -> NDArray[Any]:
        header = self._headers[name]
        dtype, shape = header["dtype"], self.shapes[name]
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype}, expected one of {', '.join(_DTYPES)}")
        start, stop = header["data_offsets"]
        if stop - start != prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
            raise ValueError(f"{stop - start} bytes for shape {shape} of {dtype}")
        offset = self._start + start
        _refuse_expansion(stop - start, _bytes_held(self._path, offset, stop - start))
        values = np.fromfile(self._path, _DTYPES[dtype], count=prod(shape), offset=offset).reshape(shape)
        # bfloat16 is the upper half of a float32.
        return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values


def _safetensors_headers(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MAX_JSON_BYTES):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        headers = json.loads(file.read(length))
    headers.pop("__metadata__", None)
    end = max((header["data_offsets"][1] for header in headers.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes, its header announces {8 + length + end}")
    return headers, 8 + length


def _npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read_header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read_header(file)
                if prod(shape) * dtype.itemsize > archive.getinfo(member).file_size:
                    raise ValueError(f"{member} claims the shape {shape}")
                shapes[member.removesuffix(".npy")] = shape
    return shapes


def _refuse_expansion(n_bytes: int, held: int) -> None:
    """ValueError for a tensor that takes far more memory than the file has bytes for it; asked before it is read."""
    if n_bytes > _MAX_EXPANSION * held + _SLACK_BYTES:
        raise ValueError(f"it claims {n_bytes} bytes, the file holds {held} for it")


def _bytes_held(path: Path, start: int, length: int) -> int:
    """Of this range of a file, the bytes that are no holes, where the system tells."""
    if not hasattr(os, "SEEK_DATA"):
        return length
    held, at, end = 0, start, start + length
    with path.open("rb") as file:
        while at < end:
            try:
                data = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole from here to the end of the file
                break
            at = min(os.lseek(file.fileno(), data, os.SEEK_HOLE), end)
            held += max(at - data, 0)
    return held
