"""
What `data.transform` makes of groups before they are tokenised: pairs of lists, nothing of ties, near scores and
duplicates, and pairs with a goal (reward-augmented data, https://arxiv.org/abs/2410.08067).

A pair (y_w, y_l) with the scores (s_w, s_l) becomes two: with the goal s_w y_w is preferred, with the goal s_l y_l is.
The score of a completion is then the paper's relabelled reward -(goal - score)^2, and pairs with equal scores are left
out: they would be each other's contradiction, which the paper's own code keeps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fpo.errors import DataError
from fpo.recipe import Transform
from fpo.stage1_cache.read import Group, said_digest


class Transforms:
    """The transforms of one split; they remember which groups they have seen."""

    def __init__(self, wanted: Transform | None) -> None:
        self.wanted = wanted or Transform()
        self.copies = 2 if self.wanted.reward_goals else 1
        """How many groups a row becomes; the second ones are numbered on behind the last row."""
        self.makes_pairs = self.wanted.pair is not None
        self._seen: set[bytes] = set()
        self._duplicates: set[int] = set()

    def of(self, group: Group, row: int, copy: int) -> Group | str:
        """
        The group that this one becomes, or the key of `drops.DROPPED` that tells why it is none. Copies of a row come
        one after another, the first ones of all rows before the second ones. Raises DataError where a group has no
        scores to go by, or goals are asked for what is no pair.
        """
        wanted = self.wanted
        if wanted.pair is not None:
            if len(group.completions) < 2:
                return "no_pair"
            group = _two(group, self._other(len(group.completions), row))
        if wanted.min_margin is not None or wanted.reward_goals:
            margin = _margin(group, row)
            if margin == 0:
                return "tie"
            if margin < (wanted.min_margin or 0):
                return "near"
        if wanted.dedup and self._is_repeated(group, row, copy):
            return "duplicate"
        if wanted.reward_goals:
            if len(group.completions) != 2:
                raise DataError(
                    f"row {row}: data.transform.reward_goals takes pairs, and this group has {len(group.completions)} "
                    "completions; set data.transform.pair: best_worst with it"
                )
            return _with_goal(group, copy, wanted.goal, wanted.reward_goals)
        return group

    def forget_rows(self) -> None:
        """What follows are other rows with the same numbers; groups that were seen stay so."""
        self._duplicates.clear()

    def _other(self, n: int, row: int) -> int:
        """Which of n completions stands against the first, the best one."""
        if self.wanted.pair == "best_worst":
            return n - 1
        return int(np.random.default_rng([self.wanted.seed, row]).integers(1, n))

    def _is_repeated(self, group: Group, row: int, copy: int) -> bool:
        if copy > 0:
            return row in self._duplicates
        digest = said_digest([group.prompt, list(group.completions)])[:16]
        if digest in self._seen:
            self._duplicates.add(row)
            return True
        self._seen.add(digest)
        return False


def _margin(group: Group, row: int) -> float:
    """Between the largest and the smallest score."""
    if not group.scores or any(math.isnan(score) for score in group.scores):
        raise DataError(
            f"row {row}: data.transform goes by scores, and the data gives none; name their columns in data.columns "
            "(score_chosen and score_rejected, scores, ranks), or leave min_margin and reward_goals out"
        )
    return max(group.scores) - min(group.scores)


def _two(group: Group, other: int) -> Group:
    return group._replace(
        completions=[group.completions[0], group.completions[other]],
        scores=[group.scores[0], group.scores[other]],
        places=[group.places[0], group.places[other]],
    )


def _with_goal(group: Group, copy: int, goal: str, said_by: str) -> Group:
    """A pair whose prompt says the score of one of its completions, which is preferred."""
    order = (copy, 1 - copy)
    own, other = (group.scores[place] for place in order)
    said = goal.replace("{score}", f"{own:.0f}" if own == round(own) else repr(own))
    return group._replace(
        prompt=_told(group.prompt, said, said_by),
        completions=[group.completions[place] for place in order],
        scores=[0.0, -((own - other) ** 2)],
        places=[group.places[place] for place in order],
        notes=[note for note in group.notes if note != "score_against"],
    )


def _told(prompt: Any, said: str, said_by: str) -> Any:
    if isinstance(prompt, str):
        return f"{said}\n\n{prompt}"
    first = prompt[0]
    if first["role"] == said_by:
        content = first.get("content")
        joined = f"{said}\n\n{content}" if isinstance(content, str) else [{"type": "text", "text": said}, *content]
        return [{**first, "content": joined}, *prompt[1:]]
    if said_by == "system":
        return [{"role": "system", "content": said}, *prompt]
    at = next((place for place, message in enumerate(prompt) if message["role"] == "user"), None)
    if at is None:
        return [{"role": "user", "content": said}, *prompt]
    return [*prompt[:at], *_told(prompt[at:], said, said_by)]
