"""Sizes, ages and facts as people read them."""

from __future__ import annotations

import json
import re
import shutil
from datetime import UTC, datetime
from typing import Any

_NUMBER = re.compile(r"-?[0-9]{1,20}\.[0-9]{1,20}(e[+-]?[0-9]{1,3})?")


def size(n_bytes: int) -> str:
    """1.5 MiB"""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def groups_word(n_groups: int, n_completions: int) -> str:
    """Groups of two are called pairs."""
    return "pairs" if n_completions == 2 * n_groups else "groups"


def age(moment: datetime | None) -> str:
    if moment is None:
        return "-"
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def with_numbers(value: Any) -> Any:
    """Facts are spelled as text, so that their bytes never change; people read numbers."""
    if isinstance(value, dict):
        return {name: with_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [with_numbers(item) for item in value]
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(f"{float(value):.3g}")
    return value


def indented(value: Any) -> str:
    return "\n".join(f"  {line}" for line in json.dumps(value, indent=2).splitlines())


def terminal_width() -> int | None:
    """Of the terminal that is printed to, or as COLUMNS says; None where lines go into a file or a pipe."""
    return shutil.get_terminal_size(fallback=(0, 0)).columns or None
