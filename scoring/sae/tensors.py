"""
The tensors of one weights file: names and shapes from its header, values as float32.

safetensors files go through the library's torch reader, since its numpy reader has no bfloat16; .npz through numpy; .pt
and .pth through torch, which maps the file and loads nothing but tensors. Only the tensors that are asked for are read.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable
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


class _MoreThanTensorsError(Exception):
    """A pickle that asks for a class or a function; none is imported. The text is its name."""


class Weights:
    """The tensors of one .safetensors, .npz, .pt or .pth file. Raises SaeError for a file whose header is none."""

    def __init__(self, source: str, path: Path) -> None:
        self._source, self._path = source, path
        shapes_of, self._values_of = _CONTAINERS.get(path.suffix, (_safetensors_shapes, _safetensors_values))
        try:
            self.shapes = shapes_of(path)
        except _MoreThanTensorsError as error:
            raise SaeError(
                f"SAE {source}: {path} asks for {error}, and nothing in it but tensors is loaded; where you trust it, "
                f"load it once and torch.save the state_dict alone"
            ) from error
        except _UNREADABLE as error:
            raise SaeError(
                f"SAE {source}: {path} cannot be read ({_line(error)}); is the file complete? "
                f"Git LFS pointers and broken downloads look like this"
            ) from error

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor, float32. Raises SaeError where it is damaged, not a float, or not finite."""
        try:
            values = self._values_of(self._path, name)
        except _UNREADABLE as error:
            raise SaeError(f"SAE {self._source}: {name} in {self._path} cannot be read ({_line(error)})") from error
        if not np.isfinite(values).all():
            raise SaeError(f"SAE {self._source}: {name} in {self._path} has values that are not finite")
        return values


def _safetensors_shapes(path: Path) -> dict[str, Shape]:
    with safe_open(path, framework="np") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _safetensors_values(path: Path, name: str) -> NDArray[np.float32]:
    with safe_open(path, framework="pt") as tensors:
        if (dtype := tensors.get_slice(name).get_dtype()) not in _DTYPES:
            raise ValueError(f"dtype {dtype}, expected one of {', '.join(_DTYPES)}")
        start, stop = byte_ranges(path)[name]
        _refuse_expansion(stop - start, _bytes_held(path, start, stop - start))
        return _copied(tensors.get_tensor(name))


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


def _npz_values(path: Path, name: str) -> NDArray[np.float32]:
    with zipfile.ZipFile(path) as members:
        member = members.getinfo(f"{name}.npy")
    held = min(member.compress_size, _bytes_held(path, member.header_offset, member.compress_size))
    _refuse_expansion(member.file_size, held)
    with np.load(path, allow_pickle=False) as archive:
        values: NDArray[Any] = archive[name]
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"dtype {values.dtype}, expected a float")
    return values.astype(np.float32, copy=False)


def _torch_shapes(path: Path) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in _torch_tensors(path).items()}


def _torch_values(path: Path, name: str) -> NDArray[np.float32]:
    tensor = _torch_tensors(path)[name]
    if not tensor.is_floating_point():
        raise ValueError(f"dtype {tensor.dtype}, expected a float")
    # Strides of 0 make a tensor of any size from one number.
    held = min(tensor.untyped_storage().nbytes(), _bytes_held(path, 0, path.stat().st_size))
    _refuse_expansion(tensor.nbytes, held)
    return _copied(tensor.detach())


def _torch_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The named tensors that torch.save has written, as maps of the file."""
    if not zipfile.is_zipfile(path):
        raise ValueError("no zip archive, as torch.save has written since torch 1.6")
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("its members are compressed, and torch maps them as they are")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes raise whatever a part of torch's unpickler raises
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _MoreThanTensorsError(asked[1]) from error
        # torch's own words advise to load it without this protection.
        is_advice = isinstance(error, pickle.UnpicklingError)
        raise ValueError("no pickle of tensors alone" if is_advice else _line(error)) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, not tensors by name")
    return {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


_CONTAINERS: dict[str, tuple[Callable[[Path], dict[str, Shape]], Callable[[Path, str], NDArray[np.float32]]]] = {
    ".npz": (_npz_shapes, _npz_values),
    ".pt": (_torch_shapes, _torch_values),
    ".pth": (_torch_shapes, _torch_values),
}
"""By the file's suffix; any other is safetensors."""


def _copied(stored: torch.Tensor) -> NDArray[np.float32]:
    """A copy, since what the libraries give is a map of the file. numpy's is three times as fast as torch's."""
    readable = stored.float() if stored.dtype == torch.bfloat16 else stored
    return np.array(readable.numpy(), np.float32)


def _line(error: Exception) -> str:
    """The first line: numpy's further ones advise to trust the file."""
    return str(error).partition("\n")[0] or type(error).__name__


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
