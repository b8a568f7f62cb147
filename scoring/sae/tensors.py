"""
The tensors of one weights file: names and shapes from its header, values as float32.

safetensors files go through the library's torch reader, since its numpy reader has no bfloat16; .npz through numpy.
Only the tensors that are asked for are read.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fpo.errors import SaeError
from fpo.scoring.weights import byte_ranges

Shape = tuple[int, ...]

# zipfile, zlib, numpy and safetensors, on files that are cut, foreign or made to harm; a RuntimeError is a zip with a
# password, or a header that nests too deeply.
_UNREADABLE = (
    ValueError,
    LookupError,
    TypeError,
    OSError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    SafetensorError,
)

_DTYPES = ("F64", "F32", "F16", "BF16")

_MAX_NPY_HEADER = 2**10
"""Characters; a real one has about 100, and Python's parser runs out of memory on some thousands of signs in a row."""

_MAX_EXPANSION, _SLACK_BYTES = 8, 2**20
"""
A tensor may be so many times larger than the bytes that a file really holds of it, plus the slack (zeros of a bias).
Trained weights do not compress to a half; a gigabyte of zeros is a megabyte of zip, and no byte of a file with holes.
"""


class Weights:
    """The tensors of one .safetensors or .npz file. Raises SaeError for a file whose header is none."""

    def __init__(self, source: str, path: Path) -> None:
        self._source, self._path = source, path
        self._is_npz = path.suffix == ".npz"
        try:
            self.shapes = _npz_shapes(path) if self._is_npz else _safetensors_shapes(path)
        except _UNREADABLE as error:
            raise SaeError(
                f"SAE {source}: {path} cannot be read ({_line(error)}); is the file complete? "
                f"Git LFS pointers and broken downloads look like this"
            ) from error

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor, float32. Raises SaeError where it is damaged, not a float, or not finite."""
        try:
            values = self._read_npz(name) if self._is_npz else self._read_safetensors(name)
        except _UNREADABLE as error:
            raise SaeError(f"SAE {self._source}: {name} in {self._path} cannot be read ({_line(error)})") from error
        if not np.isfinite(values).all():
            raise SaeError(f"SAE {self._source}: {name} in {self._path} has values that are not finite")
        return values

    def _read_npz(self, name: str) -> NDArray[np.float32]:
        with zipfile.ZipFile(self._path) as members:
            member = members.getinfo(f"{name}.npy")
        held = min(member.compress_size, _bytes_held(self._path, member.header_offset, member.compress_size))
        _refuse_expansion(member.file_size, held)
        with np.load(self._path, allow_pickle=False) as archive:
            values: NDArray[Any] = archive[name]
        if not np.issubdtype(values.dtype, np.floating):
            raise ValueError(f"dtype {values.dtype}, expected a float")
        return values.astype(np.float32, copy=False)

    def _read_safetensors(self, name: str) -> NDArray[np.float32]:
        with safe_open(self._path, framework="pt") as tensors:
            if (dtype := tensors.get_slice(name).get_dtype()) not in _DTYPES:
                raise ValueError(f"dtype {dtype}, expected one of {', '.join(_DTYPES)}")
            start, stop = byte_ranges(self._path)[name]
            _refuse_expansion(stop - start, _bytes_held(self._path, start, stop - start))
            stored = tensors.get_tensor(name)
            readable = stored.float() if stored.dtype == torch.bfloat16 else stored
            # A copy, since what the library gives is a map of the file. numpy's is three times as fast as torch's.
            return np.array(readable.numpy(), np.float32)


def _safetensors_shapes(path: Path) -> dict[str, Shape]:
    with safe_open(path, framework="np") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _npz_shapes(path: Path) -> dict[str, Shape]:
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read_header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read_header(file, max_header_size=_MAX_NPY_HEADER)
                if prod(shape) * dtype.itemsize > archive.getinfo(member).file_size:
                    raise ValueError(f"{member} claims the shape {shape}")
                shapes[member.removesuffix(".npy")] = shape
    return shapes


def _line(error: Exception) -> str:
    """The first line: numpy's further ones advise to trust the file."""
    return str(error).partition("\n")[0]


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
