"""The valid name that a mistyped one was meant to be: every error that suggests a name asks here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LIKENESS = 0.6
"""From here on a name passes for another, mistyped: `bf16` and `bfloat16` have 0.67, `hook` and `hookpoint` 0.62."""


def nearest(name: str, valid: Iterable[str], likeness: float = LIKENESS) -> str | None:
    """The valid name closest to `name`, or None where none is close."""
    return next(iter(nearest_few(name, valid, most=1, likeness=likeness)), None)


def nearest_few(name: str, valid: Iterable[str], most: int = 3, likeness: float = LIKENESS) -> list[str]:
    """At most so many valid names, the closest first."""
    return difflib.get_close_matches(name, list(valid), n=most, cutoff=likeness)
