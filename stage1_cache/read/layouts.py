"""
What the rows of a dataset look like, and the group that each becomes: a prompt with its completions, best first. What
other tools write is in `foreign`.

    pair      chosen, rejected                                 text or messages, the prompt may be implicit
    sides     prompt, chosen, rejected                         lists of completions each
    list      prompt, completions, scores | ranks | labels     lists that belong together
    rated     prompt, completions                              objects with response and overall_score
    unpaired  prompt, completion, label                        one completion

A score is a number that is higher for what is better: a rating as it is, a rank negated, a label as 1 or 0.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from fpo.errors import DataError

RATINGS = ("scores", "ranks", "labels")
"""What may stand beside a list of completions; the first that is there counts."""
PAIR_SCORES = ("score_chosen", "score_rejected")
EXTRAS = ("tools", "chat_template_kwargs")
"""Columns for the chat template, passed on as they are."""

_SAYS_NOTHING = math.nan
_FLOAT32_MAX = 3.4028234663852886e38
_FLOAT32_TINY = 1.2e-38


class Group(NamedTuple):
    """A row of any layout."""

    prompt: Any
    """Text, or a list of messages."""
    completions: Sequence[Any]
    """Best first; each text, or a list of messages."""
    scores: Sequence[float]
    """Of each completion; NaN where the data says nothing."""
    weight: float
    places: Sequence[str]
    """Where in the row each completion stands."""
    notes: Sequence[str]
    """Keys of `drops.NOTED`."""
    extras: Mapping[str, Any] = MappingProxyType({})
    """Of `EXTRAS`, what stands elsewhere in the row than in their columns."""


@dataclass(frozen=True)
class Layout:
    """How rows become groups."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    group: Callable[[Mapping[str, Any]], Group]
    """Raises `WrongValue`."""
    shows: str = "prompt"
    """The column whose first value says whether all of the data is text or messages, as in TRL."""
    unit: str = "groups"
    """What the rows are called in a report."""
    whole: bool = False
    """Whether a row without one of its completions is worth nothing."""
    messages: bool = False
    """Whether its groups are messages whatever the columns hold; else the first value of `shows` says so."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Our names of all that may be read."""
        return (*self.needs, *self.may, "weight", *EXTRAS)

    def holds_messages(self, first: Mapping[str, Any]) -> bool:
        """Whether groups of a dataset with this first row are messages, not text."""
        return self.messages or isinstance(first[self.shows], list)


class WrongValue(DataError):
    """A value that its column cannot hold; names the column, whoever knows the row adds it."""

    def __init__(self, column: str, what: str) -> None:
        super().__init__(f"column {column!r}: {what}")
        self.column = column


def own_layout(columns: Collection[str], first: Mapping[str, Any]) -> Layout:
    """The layout of rows with these columns of ours, of which this is the first."""
    if "chosen" in columns:
        several = [first[side] for side in ("chosen", "rejected") if isinstance(first[side], list)]
        return SIDES if any(isinstance(one, str | list) for side in several for one in side) else PAIR
    if "completions" in columns:
        return LIST if any(name in columns for name in RATINGS) else RATED
    return UNPAIRED


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """
    (prompt, chosen, rejected) of a pair whose prompt is implicit: the prompt is the longest prefix, of
    characters or of messages, that chosen and rejected share.

    As TRL's function of that name: a space before the boundary goes to the completions, and where one side
    begins the other, the prompt ends one character (message) before the shorter does. Unlike it, the prompt
    is empty where already the first characters differ, even if chosen *ends* with a space (TRL looks there
    and takes all of chosen but this space for the prompt), and where a side is empty (TRL stops).
    """
    shorter = min(len(chosen), len(rejected))
    for boundary in range(shorter):
        if chosen[boundary] != rejected[boundary]:
            if boundary > 0 and chosen[boundary - 1] == " ":
                boundary -= 1
            break
    else:
        boundary = max(shorter - 1, 0)
    return chosen[:boundary], chosen[boundary:], rejected[boundary:]


def as_conversation(group: Group) -> Group:
    """A group of text as what a user says and an assistant answers."""
    return group._replace(
        prompt=[{"role": "user", "content": group.prompt}],
        completions=[[{"role": "assistant", "content": text}] for text in group.completions],
    )


def said_digest(said: Any) -> bytes:
    """SHA-256 of text or messages, the same whatever dataset they stand in."""
    text = json.dumps(_without_nulls(said), sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _without_nulls(value: Any) -> Any:
    """Arrow gives every message the fields of all in its dataset, so that nulls say nothing."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def pair_numbers(row: Mapping[str, Any]) -> tuple[tuple[float, float], float]:
    """Scores and weight of a pair. Raises `WrongValue`."""
    if PAIR_SCORES[0] in row:
        return (_number(row[PAIR_SCORES[0]], PAIR_SCORES[0]), _number(row[PAIR_SCORES[1]], PAIR_SCORES[1])), _weight(
            row
        )
    if "margin" in row:
        return (_number(row["margin"], "margin"), 0.0), _weight(row)
    return (_SAYS_NOTHING, _SAYS_NOTHING), _weight(row)


def pair_group(row: Mapping[str, Any], prompt: Any, sides: Sequence[Any], places: Sequence[str]) -> Group:
    """A pair with an explicit prompt, the preferred side first. Raises `WrongValue`."""
    scores, weight = pair_numbers(row)
    notes = ["score_against"] if scores[0] < scores[1] else []
    return Group(prompt, sides, scores, weight, places, [*notes, *_if_repeated(prompt, sides)])


def unpaired_group(row: Mapping[str, Any], prompt: Any, completion: Any, label: str) -> Group:
    """A completion with the column that says whether it is a good one. Raises `WrongValue`."""
    scores, notes = [_label(row[label], label)], _if_repeated(prompt, [completion])
    return Group(prompt, [completion], scores, _weight(row), ["completion"], notes)


def _pair(row: Mapping[str, Any]) -> Group:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is not None:
        return pair_group(row, prompt, (chosen, rejected), ("chosen", "rejected"))
    scores, weight = pair_numbers(row)
    notes = ["score_against"] if scores[0] < scores[1] else []
    shorter = min(len(chosen), len(rejected))
    if len(chosen) != len(rejected) and chosen[:shorter] == rejected[:shorter]:
        notes.append("one_begins_other")
    prompt, chosen, rejected = extract_prompt(chosen, rejected)
    return Group(prompt, (chosen, rejected), scores, weight, ("chosen", "rejected"), notes)


def _sides(row: Mapping[str, Any]) -> Group:
    sides = {side: _list(row, side) for side in ("chosen", "rejected")}
    completions = [one for side in sides.values() for one in side]
    scores = [1.0] * len(sides["chosen"]) + [0.0] * len(sides["rejected"])
    places = [f"{side}[{index}]" for side, ones in sides.items() for index in range(len(ones))]
    return _ranked(row, completions, scores, places)


def _listed(row: Mapping[str, Any]) -> Group:
    completions = _list(row, "completions")
    rating = next(name for name in RATINGS if name in row)
    given = _list(row, rating)
    if len(given) != len(completions):
        raise WrongValue(rating, f"{len(given)} values for {len(completions)} completions; give one for each")
    scores = [_SCORES[rating](value, f"{rating}[{index}]") for index, value in enumerate(given)]
    return _ranked(row, completions, scores, [f"completions[{index}]" for index in range(len(completions))])


def _rated(row: Mapping[str, Any]) -> Group:
    completions = _list(row, "completions")
    for index, one in enumerate(completions):
        if not isinstance(one, dict) or one.get("response") is None:
            raise WrongValue(f"completions[{index}]", f"{kind(one)} without a response")
    places = [f"completions[{index}]" for index in range(len(completions))]
    scores = [
        _number(one.get("overall_score"), f"{place}.overall_score")
        for one, place in zip(completions, places, strict=True)
    ]
    return _ranked(row, [one["response"] for one in completions], scores, places)


def _unpaired(row: Mapping[str, Any]) -> Group:
    return _ranked(row, [row["completion"]], [_label(row["label"], "label")], ["completion"])


def _ranked(row: Mapping[str, Any], completions: list[Any], scores: list[float], places: list[str]) -> Group:
    """The group with its completions sorted, best first; equals stay in the data's order."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    completions = [completions[place] for place in order]
    prompt = row["prompt"]
    return Group(
        prompt,
        completions,
        [scores[place] for place in order],
        _weight(row),
        [places[place] for place in order],
        _if_repeated(prompt, completions),
    )


def _if_repeated(prompt: Any, completions: Sequence[Any]) -> list[str]:
    """The note on an explicit prompt with which all completions begin."""
    if not prompt or not completions:
        return []
    size = len(prompt)
    repeated = all(isinstance(one, str | list) and one[:size] == prompt for one in completions)
    return ["prompt_repeated"] if repeated else []


def _list(row: Mapping[str, Any], column: str) -> list[Any]:
    value = row[column]
    if not isinstance(value, list):
        raise WrongValue(column, f"{kind(value)}, not a list; write one value per completion")
    return value


def _number(value: Any, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongValue(column, f"{kind(value)}, not a number; mend or remove the row")
    if not abs(value) <= _FLOAT32_MAX:  # not a number either
        raise WrongValue(column, f"{value}, not a finite number in float32; mend or remove the row")
    return float(value)


def _weight(row: Mapping[str, Any]) -> float:
    if "weight" not in row:
        return 1.0
    weight = _number(row["weight"], "weight")
    if weight < _FLOAT32_TINY:
        raise WrongValue("weight", f"{weight}, not above 0 in float32; remove the row if it shall not count")
    return weight


def _label(value: Any, column: str) -> float:
    if value not in (True, False):  # 0, 1, 0.0 and 1.0 are equal to one of them
        raise WrongValue(column, f"{kind(value)}, not true or false; mend or remove the row")
    return float(value)


_SCORES: dict[str, Callable[[Any, str], float]] = {
    "scores": _number,
    "ranks": lambda value, column: -_number(value, column),
    "labels": _label,
}


def kind(value: Any) -> str:
    """What a value is, for people."""
    return {str: "text", list: "a list", dict: "an object", type(None): "null"}.get(type(value), repr(value)[:40])


PAIR = Layout(
    needs=("chosen", "rejected"),
    may=("prompt", *PAIR_SCORES, "margin"),
    group=_pair,
    shows="chosen",
    unit="pairs",
    whole=True,
)
SIDES = Layout(needs=("prompt", "chosen", "rejected"), may=(), group=_sides)
LIST = Layout(needs=("prompt", "completions"), may=RATINGS, group=_listed)
RATED = Layout(needs=("prompt", "completions"), may=(), group=_rated)
UNPAIRED = Layout(needs=("prompt", "completion", "label"), may=(), group=_unpaired, unit="completions")
