"""
The three texts of a pair that get encoded, by the rules of TRL 1.16's `DPOTrainer`: the prompt, the prompt
with chosen, the prompt with rejected.

    text       the end token is appended to a completion that does not end with it
    messages   the chat template renders the prompt with a generation prompt, the other two without
    implicit   without a prompt column, the prompt is what chosen and rejected share
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from fpo.errors import DataError, FpoError, RecipeError

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


class ChatTemplate:
    """What renders messages: `text`, or the tokenizer's own template where that is None."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None, today: str | None) -> None:
        """
        today  ISO date that a template gets which asks for one; None where the recipe says none
        Raises `DataError` for a template that is no Jinja.
        """
        self._tokenizer, self._text = tokenizer, text
        self._today = None if today is None else datetime.fromisoformat(today)
        own = tokenizer.chat_template
        texts = [text] if text is not None else own.values() if isinstance(own, dict) else [own]
        self._compiled = [_compiled(one) for one in texts]

    def rendered(
        self, sides: Sequence[list[dict[str, Any]]], row: Mapping[str, Any], number: int
    ) -> tuple[str, str, str]:
        """
        The texts to encode of a pair of messages, special tokens included. `sides`: prompt, chosen, rejected;
        `row` may hold `tools` and `chat_template_kwargs`. Raises `DataError` where the template refuses the
        messages, `RecipeError` where it asks for a date and has none.
        """
        prompt, chosen, rejected = sides
        arguments = {
            "chat_template": self._text,
            "tools": _tools(row, number),
            **_template_arguments(row, number),
        }
        render = self._tokenizer.apply_chat_template
        try:
            with self._own_date(arguments["chat_template"]):
                return (
                    render(prompt, tokenize=False, add_generation_prompt=True, **arguments),
                    render(prompt + chosen, tokenize=False, **arguments),
                    render(prompt + rejected, tokenize=False, **arguments),
                )
        except FpoError:
            raise
        except Exception as error:  # a template is a stranger's program: 1/0, endless recursion, any type of error
            roles = " ".join(message["role"] for message in prompt + chosen)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(
                f"row {number}: the chat template refuses its messages ({roles}): {reason}; "
                "repair or remove the row, or set another chat template"
            ) from error

    @contextmanager
    def _own_date(self, text: str | None) -> Iterator[None]:
        """
        While open, the date that templates get is ours, also the one that a row brings. transformers renders with the
        templates that it compiled before, whose own names go before those of its environment, where `strftime_now` is
        the wall clock.
        """
        templates = self._compiled if text is None else [*self._compiled, _compiled(text)]
        for template in templates:
            template.globals["strftime_now"] = self._strftime_now
        try:
            yield
        finally:
            for template in templates:
                template.globals.pop("strftime_now", None)

    def _strftime_now(self, form: str) -> str:
        if self._today is None:
            raise RecipeError(
                "data.today: the chat template asks for the date, and tokens must not change overnight; "
                f"set the date that it shall get, such as {date.today().isoformat()}"
            )
        return self._today.strftime(form)


def _compiled(template: str) -> Template:
    """The template as transformers compiles and keeps it. Raises `DataError` for what is no Jinja."""
    try:
        compiled: Template = _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        raise DataError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}; mend it") from None
    except (TemplateError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the chat template cannot be compiled: {reason}; set another one") from None
    return compiled


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
