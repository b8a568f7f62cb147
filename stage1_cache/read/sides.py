"""Which prompts are held out: by the prompt alone, so that a dataset may grow and no prompt changes its side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fpo.stage1_cache.read.layouts import said_digest


def side_of_prompts(share: float, held_out: bool) -> Callable[[Any], bool]:
    """Whether a group with this prompt is among the held-out ones, a share of all prompts, or among the others."""
    return lambda prompt: (_place(prompt) < share) == held_out


def _place(prompt: Any) -> float:
    """Of a prompt in [0, 1), evenly spread; text counts as what a user says, so that a question has one side."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return int.from_bytes(said_digest(prompt)[:8]) / 2**64
