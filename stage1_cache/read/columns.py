"""
Which of a dataset's columns its groups are made of, and what these must hold: text, or messages (lists of role and
content), the same in every row. The columns of pairs are checked whole, in Arrow; rows are decoded only where Arrow
cannot tell. A column that holds what the prompt lacks - the prompt itself under another name, a system prompt - is
never left out unless the recipe says so.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, Value

from fpo.errors import DataError
from fpo.nearest import nearest
from fpo.stage1_cache.read.foreign import FOREIGN_COLUMNS, foreign_layout
from fpo.stage1_cache.read.layouts import (
    EXTRAS,
    PAIR,
    PAIR_SCORES,
    RATED,
    RATINGS,
    SIDES,
    UNPAIRED,
    Layout,
    WrongValue,
    extract_prompt,
    kind,
    own_layout,
    pair_numbers,
)

_PROMPT_NAMES = ("question", "instruction", "query", "problem", "input")
"""What other datasets call the prompt."""
_PART_NAMES = ("system", "system_prompt", "system_message", "input", "context", "history")
"""What other datasets call a part of the prompt that stands in a column of its own."""
_IDENTIFIER = re.compile(r".*(^|_)(ids?|hash|sha\d*|key|index|idx)", re.IGNORECASE)
# Rows that are looked at for text that would be lost, spread over the dataset.
_SAMPLE = 1000


class ColumnUse(NamedTuple):
    """Which of a dataset's columns its groups are made of."""

    prompt: str | None
    """The dataset's name for the prompt; None where it is implicit."""
    unused: tuple[str, ...]
    """Columns that nothing is read from."""


class _Family(NamedTuple):
    """Layouts that have their columns in common."""

    says: str
    needs: tuple[str, ...]
    """By which a dataset is recognised."""
    may: tuple[str, ...]
    example: str


# In the order in which a dataset that fits several is read.
_FAMILIES = (
    _Family(
        "chosen and rejected",
        PAIR.needs,
        tuple(dict.fromkeys((*PAIR.columns, *SIDES.columns))),
        "{prompt: ..., chosen: ..., rejected: ...}",
    ),
    _Family(
        "completions with scores, ranks or labels",
        ("completions",),
        ("prompt", *RATINGS, "weight", *EXTRAS),
        "{prompt: ..., completions: ..., scores: ...}",
    ),
    _Family(
        "completion and label",
        ("completion", "label"),
        UNPAIRED.columns,
        "{prompt: ..., completion: ..., label: ...}",
    ),
)
_KNOWN = {name for family in _FAMILIES for name in (*family.needs, *family.may)}


def group_columns(
    dataset: Dataset,
    source: str,
    columns: Mapping[str, str | None] | None = None,
    *,
    drop_bad: bool = False,
) -> tuple[Dataset, ColumnUse, frozenset[int]]:
    """
    The dataset with only the columns that groups are made of, under our names and every row checked, which those
    are, and which rows hold what they cannot; without `drop_bad` the first such row is refused. A prompt of text beside
    completions that are whole conversations (UltraFeedback) is left out: it is implicit in them.

    `columns`: our name to the dataset's, as `data.columns` of the recipe; null leaves a column out. Raises `DataError`.
    """
    columns = columns or {}
    names = dataset.column_names
    foreign = _foreign(dataset, columns)
    if foreign is None:
        read = _assigned(dataset, source, columns)
    else:
        read = _of_ratings({name: name for name in foreign.columns if name in names and name not in columns})
    if images := [name for name in ("image", "images") if name in names and name not in columns]:
        raise DataError(
            f"{source}: column {images[0]!r}: rows with images are not supported; remove the column, or leave it "
            f"out with data.columns: {_flow({**columns, images[0]: None})}"
        )
    rows = dataset.select_columns(list(read.values())).rename_columns({theirs: ours for ours, theirs in read.items()})
    try:
        first = rows[0]
    except UnicodeDecodeError as error:
        raise DataError(f"{source}, row 0: not UTF-8 ({error.reason}); convert the file") from error
    layout = layout_of(read, first)
    _check_needs(layout, read, first, source, names)
    rows = rows.remove_columns([ours for ours in read if ours not in layout.columns])
    read = {ours: theirs for ours, theirs in read.items() if ours in layout.columns}
    if not layout.messages and (wrong := _wrong_first(first[layout.shows])):
        raise DataError(f"{source}, row 0, column {layout.shows!r}: {wrong}")
    conversational = layout.holds_messages(first)
    if layout is PAIR and conversational and isinstance(first.get("prompt"), str):
        rows = _without_text_prompt(rows, first, source)
        del read["prompt"]
    wrong_rows = _wrong_rows(rows, layout, conversational, source)
    if not drop_bad and (refused := next(wrong_rows, None)) is not None:
        raise DataError(refused.message)
    bad = frozenset(one.row for one in wrong_rows)
    use = ColumnUse(
        read.get("prompt" if foreign is None else foreign.shows),
        tuple(name for name in names if name not in read.values()),
    )
    bare = layout is PAIR and (not conversational or _opens_with_answer(first))
    good = dataset.select([row for row in range(len(dataset)) if row not in bad]) if bad else dataset
    _refuse_loss(good, source, columns, read, layout, answers_only=bare)
    return rows, use, bad


def meant(name: str, names: Iterable[str]) -> str:
    """A hint " (did you mean ...?)" with the most similar of the names, or nothing."""
    # A dataset's names are anyone's: `train` and `train_prefs` (0.63) are two splits, neither of them mistyped.
    close = nearest(name, names, likeness=0.7)
    return f" (did you mean {close!r}?)" if close else ""


def _assigned(dataset: Dataset, source: str, columns: Mapping[str, str | None]) -> dict[str, str]:
    """Our name to the dataset's, of the columns that are read. Raises `DataError` for names that it does not have."""
    names = dataset.column_names
    for ours, theirs in columns.items():
        absent = theirs if theirs is not None else ours
        if absent not in names and (theirs is not None or ours not in _KNOWN):
            raise DataError(
                f"{source}: data.columns: {_flow({ours: theirs})}: no column {absent!r}{meant(absent, names)}; "
                f"its columns are {', '.join(names)}"
            )
    wanted = {ours: columns.get(ours, ours) for ours in _KNOWN}
    there = {ours: theirs for ours, theirs in wanted.items() if theirs is not None and theirs in names}
    fitting = [family for family in _FAMILIES if all(name in there for name in family.needs)]
    if not fitting:
        raise _unrecognised(dataset, source, there)
    named = [family for family in fitting if any(columns.get(name) for name in family.needs)]
    family = [*named, *fitting][0]
    read = {ours: there[ours] for ours in (*family.needs, *family.may) if ours in there}
    if family.needs == ("completions",) and "instruction" in names and not {"prompt", "instruction"} & columns.keys():
        read.setdefault("prompt", "instruction")  # UltraFeedback's name
    return _of_ratings(read)


def _of_ratings(read: dict[str, str]) -> dict[str, str]:
    """Of columns that say the same in several ways, the one that counts."""
    if all(name in read for name in PAIR_SCORES):
        read.pop("margin", None)
    else:
        read = {ours: theirs for ours, theirs in read.items() if ours not in PAIR_SCORES}
    for name in [name for name in RATINGS if name in read][1:]:
        del read[name]
    return read


def _check_needs(layout: Layout, read: dict[str, str], first: dict[str, Any], source: str, names: list[str]) -> None:
    for ours in layout.needs:
        if ours not in read:
            raise DataError(
                f"{source}: no column {ours!r}{meant(ours, names)}; its columns are {', '.join(names)}; "
                f"name yours in the recipe: data.columns: {{{ours}: ...}}"
            )
    if layout.group is RATED.group and not _is_rated(first["completions"]):
        raise DataError(
            f"{source}: nothing says which of its completions are better; its columns are {', '.join(names)}; name "
            "what does in the recipe: data.columns: {scores: ...}, or ranks (1 is best), or labels (true, false)"
        )


def _unrecognised(dataset: Dataset, source: str, there: Mapping[str, str]) -> DataError:
    """The refusal of columns that no layout has, by the layout that lacks least."""
    names = dataset.column_names

    def lacks(family: _Family) -> float:
        return sum(
            (0.6 if meant(name, names) else 1.0) / len(family.needs) for name in family.needs if name not in there
        )

    family = min(_FAMILIES, key=lacks)
    absent = next(name for name in family.needs if name not in there)
    nested = _nested_rows(dataset)
    advice = (
        f"its rows stand inside {nested!r}: write them at the top, one object per line"
        if nested
        else f"name yours in the recipe: data.columns: {family.example}"
    )
    return DataError(
        f"{source}: no column {absent!r}{meant(absent, names)}; its columns are {', '.join(names)}; {advice} "
        f"(the nearest layout is {family.says})"
    )


def _nested_rows(dataset: Dataset) -> str | None:
    """The column whose values are lists of rows, as in a JSON file {"data": [...]}."""
    for name, feature in dataset.features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(inner, dict) and {"chosen", "rejected", "completions", "completion"} & inner.keys():
            return str(name)
    return None


def layout_of(columns: Collection[str], first: Mapping[str, Any]) -> Layout:
    """The layout of rows with the columns that `group_columns` leaves, of which this is the first."""
    return foreign_layout(columns, first) or own_layout(columns, first)


def _foreign(dataset: Dataset, columns: Mapping[str, str | None]) -> Layout | None:
    """The layout of another tool, unless the recipe names columns for one of ours."""
    if any(columns.values()) or not set(columns) <= set(dataset.column_names):
        return None
    there = [name for name in dataset.column_names if name in FOREIGN_COLUMNS and name not in columns]
    if not there:
        return None
    try:
        return foreign_layout(there, dataset.select_columns(there)[0])
    except UnicodeDecodeError:
        return None


def _refuse_loss(
    dataset: Dataset,
    source: str,
    columns: Mapping[str, str | None],
    read: Mapping[str, str],
    layout: Layout,
    *,
    answers_only: bool,
) -> None:
    """
    `DataError` where a column that is not read holds text of the prompt that what is read does not hold.
    `answers_only`: the completions are not whole conversations, so that without a prompt column nothing but what
    both sides happen to share would be the prompt.
    """
    rows = dataset.select(range(0, len(dataset), max(1, len(dataset) // _SAMPLE)))
    known = {*read.values(), *columns}
    others = [name for name, feature in dataset.features.items() if name not in known and not _is_media(feature)]
    kept = ["\0".join(_texts(prompt)) for prompt in _prompts(rows, read, layout)]
    lost = {name: values for name in others if _lacks(values := _decoded(rows, name, source), kept)}
    bare = answers_only and "prompt" not in read and "prompt" not in columns
    if bare and (prompts := [name for name, values in lost.items() if _could_be_prompt(name, values)]):
        likely = min(prompts, key=lambda name: (name.lower() in _PART_NAMES, name.lower() not in _PROMPT_NAMES))
        raise DataError(
            f"{source}: no column 'prompt', and what chosen and rejected share does not hold the text of "
            f"{', '.join(map(repr, prompts))}, which would be lost; write data.columns: {_flow({'prompt': likely})} "
            "to name the prompt, or {prompt: null} if it is what chosen and rejected share"
        )
    if layout.messages and (others := [name for name in lost if name.lower() in ("prompt", *_PROMPT_NAMES)]):
        raise DataError(
            f"{source}: the prompt, made of column {layout.shows!r}, does not hold the text of column {others[0]!r}, "
            f"which would be lost; leave it out with data.columns: {_flow({**columns, **dict.fromkeys(others)})}"
        )
    if parts := [name for name in lost if name.lower() in _PART_NAMES]:
        raise DataError(
            f"{source}: the prompt does not hold the text of column {parts[0]!r}, which would be lost; put it into the "
            "prompt (messages: with the role system), or leave it out with data.columns: "
            f"{_flow({**columns, **dict.fromkeys(parts)})}"
        )


def _is_media(feature: Any) -> bool:
    """Pictures, sound and the like, which would be decoded: they hold no text, alone or in lists."""
    single = getattr(feature, "feature", feature)
    return hasattr(single, "decode_example") and type(single).__name__ != "Json"


def _decoded(rows: Dataset, name: str, source: str) -> list[Any]:
    try:
        return list(rows[name])
    except UnicodeDecodeError as error:
        raise DataError(f"{source}, column {name!r}: not UTF-8 ({error.reason}); convert the file") from error


def _prompts(rows: Dataset, read: Mapping[str, str], layout: Layout) -> Iterator[Any]:
    """The prompts as they are read."""
    if layout.messages:
        return (layout.group(row).prompt for row in rows.select_columns(list(read.values())))
    if "prompt" in read:
        return iter(rows[read["prompt"]])
    return (extract_prompt(*sides)[0] for sides in zip(rows[read["chosen"]], rows[read["rejected"]], strict=True))


def _lacks(values: list[Any], kept: list[str]) -> bool:
    """Whether some text of a column is not in what is kept of its row."""
    return any(text.strip() not in held for value, held in zip(values, kept, strict=True) for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value: itself, those of a list, those of the fields of an object."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _could_be_prompt(name: str, values: list[Any]) -> bool:
    """By its name, or because it is running text or messages that differ from row to row: no id, label or source."""
    if _IDENTIFIER.fullmatch(name):
        return False
    known = name.lower()
    if known in (*_PROMPT_NAMES, *_PART_NAMES) or nearest(known, ["prompt"], likeness=0.8):
        return True
    if any(isinstance(value, list) and value and _is_message(value[0]) for value in values):
        return True
    said = [value for value in values if isinstance(value, str) and value.strip()]
    running = [value for value in said if not value.isascii() or re.search(r"[^\W\d_]\s+[^\W\d_]", value)]
    different = len(set(running))
    return 2 * len(running) > len(said) and (different == len(said) or different > max(4, len(said) / 10))


def _is_message(value: Any) -> bool:
    """A message as we read it, or as ShareGPT writes it."""
    return isinstance(value, dict) and bool({"role", "from"} & value.keys())


def _opens_with_answer(row: dict[str, Any]) -> bool:
    opening = row["chosen"][:1]
    return bool(opening) and isinstance(opening[0], dict) and opening[0].get("role") == "assistant"


def _flow(columns: Mapping[str, str | None]) -> str:
    """A mapping as YAML on one line."""
    return "{" + ", ".join(f"{ours}: {'null' if theirs is None else theirs}" for ours, theirs in columns.items()) + "}"


def _without_text_prompt(dataset: Dataset, first: dict[str, Any], source: str) -> Dataset:
    if _opens_with_answer(first):
        raise DataError(
            f"{source}, row 0: column 'prompt' is text and 'chosen' holds only the answer's messages; "
            "write the prompt as messages too: [{role: user, content: ...}]"
        )
    return dataset.remove_columns("prompt")


class _WrongRow(NamedTuple):
    row: int
    message: str
    """With the source, the row and the column."""


def _wrong_rows(rows: Dataset, layout: Layout, conversational: bool, source: str) -> Iterator[_WrongRow]:
    """The values, by row and column, that their columns cannot hold. Raises `DataError` for what is no text at all."""
    if layout is not PAIR:
        yield from _wrong_groups(rows, layout, conversational, source)
        return
    for column in ("prompt", "chosen", "rejected"):
        if column in rows.column_names:
            yield from _wrong_values(rows, column, conversational, source)
    if numbers := [name for name in (*PAIR_SCORES, "margin", "weight") if name in rows.column_names]:
        for number, row in enumerate(rows.select_columns(numbers)):
            try:
                pair_numbers(row)
            except WrongValue as wrong:
                advice = f"or leave the column out with data.columns: {{{wrong.column}: null}}"
                yield _WrongRow(number, f"{source}, row {number}, {wrong}, {advice}")


def _wrong_groups(rows: Dataset, layout: Layout, conversational: bool, source: str) -> Iterator[_WrongRow]:
    texts = rows.select_columns([name for name in rows.column_names if name not in EXTRAS])
    number = 0
    for table in texts.with_format("arrow").iter(batch_size=_BATCH):
        for column in texts.column_names:
            _check_encoding(table[column].combine_chunks(), f"{source}, row {{}}, column {column!r}", number)
        columns = texts[number : number + len(table)]
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            try:
                group = layout.group(row)
            except WrongValue as wrong:
                yield _WrongRow(number, f"{source}, row {number}, {wrong}")
                number += 1
                continue
            for place, value in (("prompt", group.prompt), *zip(group.places, group.completions, strict=True)):
                if what := _wrong(value, conversational, layout.shows):
                    yield _WrongRow(number, f"{source}, row {number}, column {place!r}: {what}")
            number += 1


def _wrong_values(dataset: Dataset, column: str, conversational: bool, source: str) -> Iterator[_WrongRow]:
    values = dataset.select_columns([column])
    typed = isinstance(dataset.features[column], Value)
    for first, table in enumerate(values.with_format("arrow").iter(batch_size=_BATCH)):
        array = table[column].combine_chunks()
        first *= _BATCH
        _check_encoding(array, f"{source}, row {{}}, column {column!r}", first)
        if _holds_messages(array) if conversational else typed and _holds_text(array):
            continue
        for row, value in enumerate(values[first : first + _BATCH][column], start=first):
            if wrong := _wrong(value, conversational, "chosen"):
                yield _WrongRow(row, f"{source}, row {row}, column {column!r}: {wrong}")


_BATCH = 4096


def _check_encoding(array: pa.Array, where: str, first: int) -> None:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        for row in range(len(array)):
            try:
                array.take([row]).validate(full=True)
            except pa.ArrowInvalid:
                raise DataError(f"{where.format(first + row)}: not UTF-8; convert the file") from error
        raise


def _holds_text(array: pa.Array) -> bool:
    return bool((pa.types.is_string(array.type) or pa.types.is_large_string(array.type)) and not array.null_count)


def _holds_messages(array: pa.Array) -> bool:
    """Whether Arrow alone shows that every value is a list of objects with a role and a content column."""
    if array.null_count or not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        return False
    messages = array.flatten()
    if not pa.types.is_struct(messages.type) or messages.null_count:
        return False
    fields = {field.name for field in messages.type}
    return {"role", "content"} <= fields and _holds_text(messages.field("role"))


def _wrong_first(value: Any) -> str | None:
    """What is wrong with the first value of the column that says what all others must be."""
    if value is None or isinstance(value, str | list):
        return None
    if isinstance(value, dict):
        keys = ", ".join(map(str, value))
        return f"an object ({keys}), not text or a list of messages; write [{{role: assistant, content: ...}}]"
    return f"the value {value!r}, not text; write it in quotes (of a .csv full of numbers, make a .jsonl)"


def _wrong(value: Any, conversational: bool, shows: str) -> str | None:
    """What is wrong with a prompt or completion, if anything; `shows` is the column that says what all must be."""
    if value is None:
        return "missing or null; remove the row or fill it"
    if not conversational:
        return None if isinstance(value, str) else f"{kind(value)}, where {shows} of row 0 holds text"
    if not isinstance(value, list):
        return f"{kind(value)}, where {shows} of row 0 holds messages"
    for message in value:
        if not isinstance(message, dict):
            return f"a list of {kind(message)}, not of messages with role and content"
        if not isinstance(message.get("role"), str):
            keys = ", ".join(key for key, entry in message.items() if entry is not None)
            hint = "; rename from and value to role and content" if "from" in message else ""
            return f"a message without a role (its keys: {keys or 'none'}){hint}"
    return None


def _is_rated(completions: Any) -> bool:
    """Whether completions are objects that hold their own rating; an empty list may be."""
    return isinstance(completions, list) and all(isinstance(one, dict) and "role" not in one for one in completions)
