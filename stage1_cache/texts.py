"""
The three texts of a pair that get encoded, by the rules of TRL 1.16's `DPOTrainer`: the prompt, the prompt
with chosen, the prompt with rejected.

    text       the end token is appended to a completion that does not end with it
    messages   the chat template renders the prompt with a generation prompt, the other two without
    implicit   without a prompt column, the prompt is what chosen and rejected share
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from errors import DataError

# Arguments of apply_chat_template that are no variables of the template. TRL passes its own
# add_generation_prompt, tokenize and return_dict and stops at a second one; the others act on the tokens,
# which this module does not make.
_NOT_FOR_THE_TEMPLATE = frozenset(
    {
        "add_generation_prompt",
        "continue_final_message",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)


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


def with_end_token(prompt: str, chosen: str, rejected: str, eos: str) -> tuple[str, str, str]:
    """The texts to encode of a pair of strings."""
    ended = [side if side.endswith(eos) else side + eos for side in (chosen, rejected)]
    return prompt, prompt + ended[0], prompt + ended[1]


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    sides: Sequence[list[dict[str, Any]]],
    row: Mapping[str, Any],
    number: int,
) -> tuple[str, str, str]:
    """
    The texts to encode of a pair of messages, special tokens included. `sides`: prompt, chosen, rejected;
    `row` may hold `tools` and `chat_template_kwargs`. Raises `DataError` where the template refuses the
    messages.
    """
    prompt, chosen, rejected = sides
    arguments = {
        "chat_template": chat_template,
        "tools": _tools(row, number),
        **_template_arguments(row, number),
    }
    try:
        return (
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **arguments),
            tokenizer.apply_chat_template(prompt + chosen, tokenize=False, **arguments),
            tokenizer.apply_chat_template(prompt + rejected, tokenize=False, **arguments),
        )
    except (TemplateError, TypeError, ValueError) as error:
        roles = " ".join(message["role"] for message in prompt + chosen)
        raise DataError(
            f"row {number}: the chat template refuses its messages ({roles}): {error}; "
            "repair or remove the row, or set another chat template"
        ) from error


def _tools(row: Mapping[str, Any], number: int) -> Any:
    tools = row.get("tools")
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools)
    except json.JSONDecodeError as error:
        raise DataError(f"row {number}, column 'tools': text that is no JSON ({error})") from error


def _template_arguments(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    arguments = row.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise DataError(f"row {number}, column 'chat_template_kwargs': {type(arguments).__name__}, not an object")
    if wrong := sorted(_NOT_FOR_THE_TEMPLATE & arguments.keys()):
        raise DataError(
            f"row {number}, column 'chat_template_kwargs': {wrong[0]!r} is no variable of a chat template; remove it"
        )
    return arguments
