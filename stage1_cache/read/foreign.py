"""
Layouts of other tools, whose rows become conversations.

    sharegpt    conversations | messages, chosen, rejected      ShareGPT, LLaMA-Factory, axolotl's chat_template
    openai      input, preferred_output, non_preferred_output   OpenAI's preference fine-tuning
    alpaca      instruction, input, history, chosen, rejected   LLaMA-Factory; also output: [better, worse]
    argilla     instruction, chosen_response, rejected_response
    with system system, prompt | question | input, chosen, rejected: axolotl's chatml.prompt_pairs, intel, icr, ultra
    spoken      question | instruction beside answers in messages; chosen and rejected of from and value
    kto         conversations | messages | instruction and output, kto_tag: LLaMA-Factory

Chosen and rejected are messages, or the text of the assistant's answer. `from` and `value` are read as role and
content. A transcript, as hh-rlhf writes it, is text with its speakers in it: `data.as_messages` splits it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from fpo.stage1_cache.read.layouts import (
    PAIR,
    PAIR_SCORES,
    Group,
    Layout,
    WrongValue,
    extract_prompt,
    kind,
    pair_group,
    unpaired_group,
)

_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
    "function_call": "function_call",
}
"""What `from` says, as a role."""
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SCORES = (*PAIR_SCORES, "margin")
_SIDES = ("chosen", "rejected")
_RESPONSES = ("chosen_response", "rejected_response")

Row = Mapping[str, Any]


def foreign_layout(columns: Collection[str], first: Row) -> Layout | None:
    """The layout of another tool that rows with these columns have, of which this is the first; None for our own."""
    for layout, fits in _FOREIGN:
        if all(name in columns for name in layout.needs) and fits(first):
            return layout
    return None


def is_transcript(first: Row) -> bool:
    """Whether a row of text holds a conversation as hh-rlhf writes it."""
    text = f"{first.get('prompt') or ''}{first['chosen']}"
    return text.startswith("\n\nHuman:") and "\n\nAssistant:" in text


def _answered(row: Row, column: str, places: Sequence[str] = _SIDES) -> Group:
    """One column asks, in text or messages, and two answer."""
    prompt = _asked(row, _messages(row[column], column, "user"), column)
    return _pair(row, prompt, [row[place] for place in places], places)


def _openai(row: Row) -> Group:
    given = row["input"]
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise WrongValue("input", f"{kind(given)}, not an object with a list of messages")
    places = ("preferred_output", "non_preferred_output")
    prompt = _asked(row, _messages(given["messages"], "input.messages", "user"), "input.messages")
    group = _pair(row, prompt, [row[place] for place in places], places)
    return group._replace(extras={"tools": given["tools"]}) if given.get("tools") else group


def _alpaca(row: Row) -> Group:
    return _pair(row, _instructed(row), [row[side] for side in _SIDES])


def _alpaca_ranked(row: Row) -> Group:
    output = row["output"]
    if not isinstance(output, list) or len(output) != 2:
        raise WrongValue("output", f"{kind(output)}, not a list of the better and the worse answer")
    return _pair(row, _instructed(row), output, ("output[0]", "output[1]"))


def _conversations(row: Row) -> Group:
    """Chosen and rejected are messages: answers to a prompt of messages, or whole conversations that begin alike."""
    sides = [_messages(row[side], side, "assistant") for side in _SIDES]
    if isinstance(row.get("prompt"), list):
        prompt = _messages(row["prompt"], "prompt", "user")
    else:
        prompt, *sides = extract_prompt(*sides)
    return pair_group(row, _told(row, prompt), sides, _SIDES)


def _kto_sharegpt(row: Row, column: str) -> Group:
    said = _messages(row[column], column, "user")
    if not said or said[-1]["role"] != "assistant":
        raise WrongValue(column, "it does not end with an answer of the assistant")
    return unpaired_group(row, _told(row, said[:-1]), said[-1:], "kto_tag")


def _kto_alpaca(row: Row) -> Group:
    return unpaired_group(row, _instructed(row), _messages(row["output"], "output", "assistant"), "kto_tag")


def _transcripts(row: Row) -> Group:
    chosen, rejected = (_split(f"{row.get('prompt') or ''}{row[side]}", side) for side in _SIDES)
    prompt, *completions = extract_prompt(chosen, rejected)
    return pair_group(row, prompt, completions, _SIDES)


def _pair(row: Row, prompt: list[Any], sides: Sequence[Any], places: Sequence[str] = _SIDES) -> Group:
    said = [_messages(side, place, "assistant") for side, place in zip(sides, places, strict=True)]
    return pair_group(row, prompt, said, places)


def _instructed(row: Row) -> list[dict[str, Any]]:
    """Alpaca's prompt: what was said before, then the instruction and behind a line break its input."""
    past: list[dict[str, Any]] = []
    if not isinstance(row.get("history") or [], list):
        raise WrongValue("history", f"{kind(row['history'])}, not a list of questions and answers")
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise WrongValue("history", f"{kind(turn)}, not a question and its answer")
        past += [*_messages(turn[0], "history", "user"), *_messages(turn[1], "history", "assistant")]
    if row["instruction"] is None:
        raise WrongValue("instruction", "missing or null; remove the row or fill it")
    asked = [row[name] for name in ("instruction", "input") if row.get(name)]
    if wrong := next((name for name in ("instruction", "input") if not isinstance(row.get(name) or "", str)), None):
        raise WrongValue(wrong, f"{kind(row[wrong])}, not text")
    return _told(row, [*past, {"role": "user", "content": "\n".join(asked)}])


def _asked(row: Row, messages: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """A prompt, which is answered next, with its system prompt."""
    if messages and messages[-1].get("role") == "assistant":
        raise WrongValue(column, "it ends with the assistant's turn, which the completions are; remove that turn")
    return _told(row, messages)


def _told(row: Row, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages behind what the column `system` says, where they do not say it themselves."""
    system = row.get("system")
    if not isinstance(system or "", str):
        raise WrongValue("system", f"{kind(system)}, not text")
    if not system:
        return messages
    if messages and messages[0].get("role") == "system":
        if messages[0].get("content") != system:
            raise WrongValue("system", "not what the messages have as their own system prompt; leave one of them out")
        return messages
    return [{"role": "system", "content": system}, *messages]


def _messages(value: Any, column: str, speaker: str) -> list[dict[str, Any]]:
    """Text of the speaker, a message or a list of them, as messages."""
    if isinstance(value, str):
        return [{"role": speaker, "content": value}]
    if isinstance(value, dict):
        return [_message(value, column)]
    if isinstance(value, list):
        return [_message(one, column) for one in value]
    raise WrongValue(column, f"{kind(value)}, neither text nor messages; remove the row or fill it")


def _message(value: Any, column: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WrongValue(column, f"{kind(value)}, where a message is expected")
    if isinstance(value.get("role"), str):
        return {**value, "content": _joined(value["content"], column)} if "content" in value else value
    said_by, said = value.get("from"), value.get("value")
    if said_by not in _ROLES or not isinstance(said, str):
        raise WrongValue(column, f"a message from {said_by!r} that says {kind(said)}; known are {', '.join(_ROLES)}")
    if _ROLES[said_by] == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(said, column)}
    return {"role": _ROLES[said_by], "content": said}


def _joined(content: Any, column: str) -> Any:
    """Parts of text as one text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            told = part.get("type") if isinstance(part, dict) else kind(part)
            raise WrongValue(column, f"a part of a message that is no text ({told})")
    return "".join(part["text"] for part in content)


def _calls(said: str, column: str) -> list[dict[str, Any]]:
    """LLaMA-Factory writes what is called as JSON: one object with name and arguments, or a list of them."""
    try:
        calls = json.loads(said)
    except json.JSONDecodeError as error:
        raise WrongValue(column, f"a function_call that is no JSON ({error})") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise WrongValue(column, "a function_call without a name")
    return [{"type": "function", "function": call} for call in calls]


def _split(text: str, column: str) -> list[dict[str, Any]]:
    """A transcript as messages."""
    before, *pieces = _TURN.split(text)
    turns = [
        {"role": _SPEAKERS[speaker], "content": said.strip()}
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if before.strip() or not turns or turns[-1]["role"] != "assistant":
        raise WrongValue(column, "no transcript that begins with Human: and ends with Assistant:, as in the first row")
    return turns


def _is_text(*names: str) -> Callable[[Row], bool]:
    return lambda first: all(isinstance(first[name], str) and first[name].strip() for name in names)


def _holds_its_system(first: Row) -> bool:
    """Whether the prompt of text says what the column `system` says: then nothing is missing in it."""
    return first["system"] in first.get("prompt", "")


def _are_conversations(first: Row) -> bool:
    """Whether chosen and rejected are messages that lack a system prompt, or that are written as from and value."""
    chosen, system = first["chosen"], first.get("system")
    if isinstance(chosen, dict) and isinstance(first.get("prompt"), list):
        return isinstance(chosen.get("role"), str) or chosen.get("from") in _ROLES
    if not (isinstance(chosen, list) and chosen and isinstance(chosen[0], dict)):
        return False
    if "from" in chosen[0] and not chosen[0].get("role"):
        return not isinstance(first.get("prompt"), str) or _ROLES.get(chosen[0]["from"]) != "assistant"
    opening = first["prompt"] if isinstance(first.get("prompt"), list) else chosen
    lacks = bool(opening) and isinstance(opening[0], dict) and opening[0].get("role") != "system"
    return isinstance(system, str) and bool(system.strip()) and lacks


def _asks_in_text(first: Row, column: str) -> bool:
    """Whether this column of text asks what a message of the assistant, or a list that opens with one, answers."""
    chosen = first["chosen"]
    opening = chosen[0] if isinstance(chosen, list) and chosen else chosen
    if not isinstance(opening, dict) or not isinstance(first[column], str):
        return False
    if column == "prompt" and isinstance(chosen, list) and "role" in opening:
        return False  # TRL reads it, and wants its prompt in messages, too
    return "assistant" in (opening.get("role"), _ROLES.get(opening.get("from", "")))


def _opens_with(first: Row, column: str) -> bool:
    """Whether this column holds the conversation and the sides their answers; UltraFeedback's are whole ones."""
    chosen = first["chosen"]
    answers = isinstance(chosen, dict) or (isinstance(chosen, str) and bool(chosen))
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], dict):
        answers = "assistant" in (chosen[0].get("role"), _ROLES.get(chosen[0].get("from", "")))
    return "prompt" not in first and isinstance(first[column], list | str) and bool(first[column]) and answers


def _foreign(group: Callable[[Row], Group], needs: Sequence[str], *may: str, unit: str = "pairs") -> Layout:
    paired = unit == "pairs"
    return Layout(
        needs=tuple(needs),
        may=(*may, *(_SCORES if paired else ())),
        group=group,
        shows=needs[0],
        unit=unit,
        whole=paired,
        messages=True,
    )


def _always(first: Row) -> bool:
    return True


_FOREIGN: tuple[tuple[Layout, Callable[[Row], bool]], ...] = (
    (_foreign(_openai, ("input", "preferred_output", "non_preferred_output")), _always),
    *(
        (_foreign(partial(_answered, column=column), (column, *_SIDES), "system"), partial(_opens_with, column=column))
        for column in ("conversations", "messages")
    ),
    *(
        (
            _foreign(partial(_answered, column=column, places=_RESPONSES), (column, *_RESPONSES), "system"),
            _is_text(column, *_RESPONSES),
        )
        for column in ("instruction", "prompt")
    ),
    (
        _foreign(_alpaca, ("instruction", *_SIDES), "input", "system", "history"),
        lambda first: "prompt" not in first and _is_text("instruction", *_SIDES)(first),
    ),
    (
        _foreign(_alpaca_ranked, ("instruction", "output"), "input", "system", "history"),
        lambda first: isinstance(first["output"], list),
    ),
    *(
        (
            _foreign(partial(_answered, column=column), (column, "system", *_SIDES)),
            _is_text(column, *_SIDES),
        )
        for column in ("question", "input")
    ),
    (
        _foreign(partial(_answered, column="prompt"), ("prompt", "system", *_SIDES)),
        lambda first: _is_text("prompt", "system", *_SIDES)(first) and not _holds_its_system(first),
    ),
    *(
        (
            _foreign(partial(_answered, column=column), (column, *_SIDES), "system"),
            partial(_asks_in_text, column=column),
        )
        for column in ("prompt", "question", "instruction")
    ),
    (_foreign(_conversations, _SIDES, "prompt", "system"), _are_conversations),
    *(
        (_foreign(partial(_kto_sharegpt, column=column), (column, "kto_tag"), "system", unit="completions"), _always)
        for column in ("conversations", "messages")
    ),
    (
        _foreign(_kto_alpaca, ("instruction", "output", "kto_tag"), "input", "system", "history", unit="completions"),
        _is_text("instruction", "output"),
    ),
)
"""In the order in which a dataset that fits several is read."""

FOREIGN_COLUMNS = frozenset(name for layout, _ in _FOREIGN for name in layout.columns)
"""All that any of them reads."""

TRANSCRIPTS = Layout(
    needs=PAIR.needs, may=PAIR.may, group=_transcripts, shows="chosen", unit="pairs", whole=True, messages=True
)
