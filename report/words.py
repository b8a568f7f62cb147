"""What strangers wrote, as text that can do nothing: labels, prompts and names end up in terminals and on pages."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Callable
from typing import Any

Format = str | Callable[[Any], str]
"""A format specification of Python's, or what makes words of a value; empty for the usual."""

_ACTIVE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Categories of characters that steer a terminal or turn the direction of a line, rather than being seen."""
_JOINERS = "\u200c\u200d"
"""Of them those that scripts and emoji are written with."""


def plain(text: str) -> str:
    """The text on one line, with what would act instead of being seen spelled out."""
    return "".join(character if _seen(character) else _spelled(character) for character in text)


def escaped(text: str) -> str:
    """`plain`, for a page: between tags or within a quoted attribute."""
    return html.escape(plain(text))


def said(value: Any, form: Format = "") -> str:
    """A value as people read it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if callable(form):
        return form(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return format(value, form or ("," if isinstance(value, int) else ".4g"))
    return plain(str(value))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _seen(character: str) -> bool:
    return unicodedata.category(character) not in _ACTIVE or character in _JOINERS


def _spelled(character: str) -> str:
    return ascii(character)[1:-1]
