"""
What the columns of a pairs dataset must hold, in TRL's formats: text, or messages (lists of role and
content), the same in every row. Whole columns are checked in Arrow; rows are decoded only where Arrow cannot
tell.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, Value

from errors import DataError

SIDES = ("prompt", "chosen", "rejected")
EXTRAS = ("tools", "chat_template_kwargs")
"""Columns for the chat template, passed on as they are."""


def is_conversational(row: dict[str, Any]) -> bool:
    """Whether the completions are messages, not text; TRL decides it for a whole dataset by its first row."""
    return isinstance(row["chosen"], list)


def pair_columns(dataset: Dataset, source: str) -> Dataset:
    """
    The dataset with only the columns that pairs are made of, every row checked. A prompt of text beside
    completions that are whole conversations (UltraFeedback) is left out: it is implicit in them. Raises
    `DataError`.
    """
    names = dataset.column_names
    for wanted in ("chosen", "rejected"):
        if wanted not in names:
            raise DataError(
                f"{source}: no column {wanted!r}{nearest(wanted, names)}; "
                f"its columns are {', '.join(names)}; rename yours to prompt, chosen, rejected"
            )
    if images := [name for name in ("image", "images") if name in names]:
        raise DataError(f"{source}: column {images[0]!r}: pairs with images are not supported; remove the column")
    if "prompt" not in names and (close := difflib.get_close_matches("prompt", names, n=1)):
        # Without it the prompt would silently be taken as implicit.
        raise DataError(f"{source}: column {close[0]!r} looks like the prompt; rename it to 'prompt' or remove it")
    dataset = dataset.select_columns([name for name in (*SIDES, *EXTRAS) if name in names])
    try:
        first = dataset[0]
    except UnicodeDecodeError as error:
        raise DataError(f"{source}, row 0: not UTF-8 ({error.reason}); convert the file") from error
    conversational = is_conversational(first)
    if conversational and isinstance(first.get("prompt"), str):
        dataset = _without_text_prompt(dataset, first, source)
    for column in SIDES:
        if column in dataset.column_names:
            _check_column(dataset, column, conversational, source)
    return dataset


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint " (did you mean ...?)" with the most similar of the names, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _without_text_prompt(dataset: Dataset, first: dict[str, Any], source: str) -> Dataset:
    opening = first["chosen"][:1]
    if opening and isinstance(opening[0], dict) and opening[0].get("role") == "assistant":
        raise DataError(
            f"{source}, row 0: column 'prompt' is text and 'chosen' holds only the answer's messages; "
            "write the prompt as messages too: [{role: user, content: ...}]"
        )
    return dataset.remove_columns("prompt")


def _check_column(dataset: Dataset, column: str, conversational: bool, source: str) -> None:
    values = dataset.select_columns([column])
    typed = isinstance(dataset.features[column], Value)
    for first, table in enumerate(values.with_format("arrow").iter(batch_size=_BATCH)):
        array = table[column].combine_chunks()
        first *= _BATCH
        _check_encoding(array, f"{source}, row {{}}, column {column!r}", first)
        if _holds_messages(array) if conversational else typed and _holds_text(array):
            continue
        for row, value in enumerate(values[first : first + _BATCH][column], start=first):
            if wrong := _wrong(value, conversational):
                raise DataError(f"{source}, row {row}, column {column!r}: {wrong}")


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


def _wrong(value: Any, conversational: bool) -> str | None:
    """What is wrong with a prompt or completion, if anything."""
    if value is None:
        return "missing or null; remove the row or fill it"
    if not conversational:
        return None if isinstance(value, str) else f"{_kind(value)}, where chosen of row 0 holds text"
    if not isinstance(value, list):
        return f"{_kind(value)}, where chosen of row 0 holds messages"
    for message in value:
        if not isinstance(message, dict):
            return f"a list of {_kind(message)}, not of messages with role and content"
        if not isinstance(message.get("role"), str):
            keys = ", ".join(key for key, entry in message.items() if entry is not None)
            hint = "; rename from and value to role and content" if "from" in message else ""
            return f"a message without a role (its keys: {keys or 'none'}){hint}"
    return None


def _kind(value: Any) -> str:
    return {str: "text", list: "a list", dict: "an object", type(None): "null"}.get(type(value), repr(value)[:40])
