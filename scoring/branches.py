"""
Where the branches of a row are: a completion's keys are its prompt's and its own. What holds it stands in the place of
a mask, so it reaches the attention by the family's own way, and does so again where activations are computed twice.

Dimension key:  T tokens of the row   Q queries, L keys of a branch
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from fpo.scoring.packing import Packed, Reach

T = TypeVar("T")

KEPT_ELEMENTS = 1 << 19
"""Of a mask that is kept for the next layer: those of short branches come again."""


class Branch(NamedTuple):
    """Consecutive queries, the last of the keys that they may see."""

    own: int
    """Which part of the row."""
    trunk: int | None = None
    """The part that begins with its group's prompt; None is its own."""
    prompt: int = 0
    """Tokens of that prompt."""


class Branches:
    """
    What stands in the place of a row's mask. No tuple: what wraps a model takes those apart.
    """

    def __init__(self, packed: Packed, reach: Reach, width: int) -> None:
        """
        reach  the family's mask function
        width  tokens of the row: a soft prompt's are among them, or are keys and values alone
        """
        self.packed = packed
        self.reach = reach
        self.virtual = packed.n_virtual
        """Keys of a soft prompt, before all others; every branch sees them."""
        self.embedded = width == packed.position_ids.shape[1]
        """Whether these, if there are any, are of tokens of the row."""
        self.parts = [self.virtual] if self.embedded and self.virtual else []
        """Tokens of each part of the row: the soft prompt, a prompt with its first completion, a further completion."""
        branches = [Branch(0)] if self.parts else []
        for prompt, *completions in packed.sizes:
            trunk = len(self.parts)
            branches.append(Branch(trunk))
            branches += [Branch(trunk + place, trunk, prompt) for place in range(1, len(completions))]
            self.parts += [prompt + completions[0], *completions[1:]]
        self.branches = [branch for branch in branches if self.parts[branch.own]]
        self.keys = self.parts if self.embedded else [self.virtual, *self.parts]
        """Keys of each part; those of a soft prompt that has no tokens stand before them."""
        self._key_starts = list(accumulate(self.keys, initial=0))
        self._kept: dict[str, Any] = {}
        self._masks: dict[tuple[int, int], Bool[Tensor, "1 1 Q L"]] = {}
        self._reaches: dict[int, bool] = {}

    def seen(self, branch: Branch) -> list[tuple[int, int]]:
        """Where the branch's keys are among those of the row, from and up to: soft prompt, prompt, its own."""
        offset = len(self.keys) - len(self.parts)
        ranges = []
        if self.virtual and (branch.own or not self.embedded):
            ranges.append((0, self.virtual))
        if branch.trunk is not None:
            start = self._key_starts[branch.trunk + offset]
            ranges.append((start, start + branch.prompt))
        own = branch.own + offset
        return [*ranges, (self._key_starts[own], self._key_starts[own + 1])]

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """What a kernel makes of the branches, once for all layers."""
        if name not in self._kept:
            self._kept[name] = make()
        found: T = self._kept[name]
        return found

    @property
    def reaches_all(self) -> bool:
        """Whether every token sees all that precedes it in its branch, however long."""
        longest = max(sum(end - begin for begin, end in self.seen(branch)) for branch in self.branches)
        return self.is_causal(longest, longest)

    def mask(self, queries: int, keys: int, device: torch.device) -> Bool[Tensor, "1 1 Q L"]:
        """Which keys the last of them, as queries, see."""
        found = self._masks.get((queries, keys))
        if found is None:
            place = torch.arange(keys, device=device)
            zero = place.new_zeros(())
            found = self.reach(zero, zero, place[keys - queries :, None], place[None]).expand(queries, keys)[None, None]
            if queries * keys <= KEPT_ELEMENTS:
                self._masks[queries, keys] = found
        return found

    def is_causal(self, queries: int, keys: int) -> bool:
        """Whether every key is a query, and each sees all before it: as soon as the last one sees the first one."""
        if queries < keys or self.reach is causal_mask_function:
            return queries == keys
        if keys not in self._reaches:  # of any layer: asked once
            zero = torch.zeros((), dtype=torch.long)
            self._reaches[keys] = bool(self.reach(zero, zero, zero + keys - 1, zero))
        return self._reaches[keys]
