"""Which prompts are held out: by the prompt alone, so that a dataset may grow and no prompt changes its side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any


def side_of_prompts(share: float, held_out: bool) -> Callable[[Any], bool]:
    """Whether a group with this prompt is among the held-out ones, a share of all prompts, or among the others."""
    return lambda prompt: (_place(prompt) < share) == held_out


def _place(prompt: Any) -> float:
    """Of a prompt in [0, 1), evenly spread; text counts as what a user says, so that a question has one side."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    said = json.dumps(_without_nulls(prompt), sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(said.encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64


def _without_nulls(value: Any) -> Any:
    """Arrow gives every message the fields of all, so that nulls say nothing of the prompt."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
