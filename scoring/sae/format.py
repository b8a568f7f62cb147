"""
What a format answers: is this one mine (`claims`), what do its headers say (`facts`), and the arrays of its encoder
(`read`) and decoder (`read_decoder`).

A new format is one module with a subclass, and its line in `formats.FORMATS`.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from fpo.errors import SaeError
from fpo.scoring.sae.arrays import Array, Decoder, SaeArrays, SaeFacts, SaeHeader
from fpo.scoring.sae.tensors import Shape, Weights

UNSET_THRESHOLD = {"threshold -1": "it was never set in training, every feature would pass"}

_MAX_JSON_BYTES = 2**20
"""Of a config; those of real SAEs have a few kilobytes."""


@dataclass(frozen=True)
class SaeFiles:
    """One SAE's files on this disk, as one format names them. `source` is what the user wrote."""

    source: str
    weights: Path
    config_path: Path | None
    """None where no file of the format's name is there."""
    place: str
    """Path of the SAE's folder, in the repository or on disk; it can say where the SAE hooks."""

    @cached_property
    def tensors(self) -> Weights:
        return Weights(self.source, self.weights)

    @cached_property
    def config(self) -> dict[str, Any]:
        """{} where there is none. Raises SaeError for one that is no JSON object."""
        return {} if self.config_path is None else _read_config(self.source, self.config_path)

    def matrix(self, name: str) -> tuple[int, int]:
        """Shape of a tensor. Raises SaeError where there is none of that name, or one that is no matrix."""
        shapes = self.tensors.shapes
        if len(shapes.get(name, ())) != 2:
            raise SaeError(f"SAE {self.source}: {self.weights.name} has no matrix {name}; found {self.listing()}")
        rows, columns = shapes[name]
        return rows, columns

    def check_shapes(self, expected: dict[str, Shape]) -> None:
        """SaeError for the first of these tensors that is missing or shaped otherwise."""
        for name, shape in expected.items():
            if (found := self.tensors.shapes.get(name, "no such tensor")) != shape:
                raise SaeError(f"SAE {self.source}: {name} must have shape {shape}, {self.weights.name} has {found}")

    def listing(self) -> str:
        """The tensors by name and shape, for messages."""
        return ", ".join(f"{name} {shape}" for name, shape in sorted(self.tensors.shapes.items())) or "nothing"


class Format(ABC):
    """One way to write an SAE. The docstrings of a subclass and of its `claims` are what docs/saes.md says of it."""

    name: ClassVar[str]
    """In facts and cache keys; never changes."""
    title: ClassVar[str]
    """For people."""
    weights: ClassVar[str]
    """
    Where the weights stand inside an SAE's folder, with a * where the name is not fixed. Formats may share a name: the
    contents decide.
    """
    config: ClassVar[str | None] = None
    """The same of the configuration; a * stands for the weights' name without its suffix. None where there is none."""
    needs_config: ClassVar[bool] = False
    """Whether nothing can be said without the configuration."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """What of this format is no per-token encoder of a hookpoint's output, or not computed here: what -> why."""

    @property
    def files(self) -> list[str]:
        """The files that make one SAE."""
        return [self.config, self.weights] if self.config and self.needs_config else [self.weights]

    @abstractmethod
    def claims(self, files: SaeFiles) -> bool:
        """Whether the tensors, or the configuration, are those of this format. Reads headers only."""

    @abstractmethod
    def facts(self, files: SaeFiles) -> SaeHeader:
        """What headers and configuration say. Raises SaeError for what is refused, missing or of the wrong shape."""

    @abstractmethod
    def read(self, files: SaeFiles) -> SaeArrays:
        """The canonical encoder. Only the tensors that make it are read."""

    @abstractmethod
    def read_decoder(self, files: SaeFiles) -> Decoder:
        """The decoder, float32, in the units of the canonical encoder's activations."""

    def refuse(self, files: SaeFiles, what: str, value: str = "") -> SaeError:
        """The error for something in `refuses`, with the value that the files have for it."""
        return SaeError(f"SAE {files.source}: {f'{what} {value}'.rstrip()} is not supported: {self.refuses[what]}")


def check_config_sizes(
    files: SaeFiles,
    d_in: int,
    d_sae: int,
    *,
    names: tuple[str, str] = ("d_in", "d_sae"),
    section: Mapping[str, Any] | None = None,
) -> None:
    """SaeError where the configuration, or this section of it, gives other sizes than the weights have."""
    config = files.config if section is None else section
    for name, found in zip(names, (d_in, d_sae), strict=True):
        if (said := config.get(name, found)) != found:
            raise SaeError(f"SAE {files.source}: config says {name} {said}, the weights have {found}")


def check_k(files: SaeFiles, k: int, d_sae: int) -> None:
    if not 0 < k <= d_sae:
        raise SaeError(f"SAE {files.source}: k is {k}, of {d_sae} features")


def stated_l0(value: object) -> float | None:
    """What a configuration says about active features per token; None where it says nothing."""
    return float(value) if isinstance(value, int | float) else None


def positive_number(files: SaeFiles, name: str, value: object) -> float:
    """A number that a product, a quotient or a threshold needs. SaeError where it is none, or not above zero."""
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SaeError(f"SAE {files.source}: {name} must be a positive number, found {value!r}")
    return float(value)


def decoder_of(files: SaeFiles, facts: SaeFacts, matrix: str, bias: str, *, transposed: bool = False) -> Decoder:
    """These two tensors. Raises SaeError where they are not shaped as a decoder's; `transposed`, as nn.Linear's."""
    d_out = facts.d_in if facts.predicts is None else files.matrix(matrix)[0 if transposed else 1]
    shape = (d_out, facts.d_sae) if transposed else (facts.d_sae, d_out)
    for name, expected in ((matrix, shape), (bias, (d_out,))):
        if (found := files.tensors.shapes.get(name, "no such tensor")) != expected:
            raise SaeError(f"SAE {files.source}: the decoder's {name} must have shape {expected}, found {found}")
    W = files.tensors.read(matrix)
    return Decoder(W.T if transposed else W, files.tensors.read(bias))


def read_threshold(known: Format, files: SaeFiles, name: str) -> Array:
    """A threshold of activations. Refused where it was never set (UNSET_THRESHOLD)."""
    threshold = files.tensors.read(name)
    if (threshold == -1).all():
        raise known.refuse(files, "threshold -1")
    return threshold


def _read_config(source: str, path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > _MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes, at most {_MAX_JSON_BYTES} are read")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SaeError(f"SAE {source}: {path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise SaeError(f"SAE {source}: {path} holds a {type(config).__name__}, not an object")
    return config
