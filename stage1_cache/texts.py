"""
The texts of a group that get encoded, by the rules of TRL 1.16's `DPOTrainer` and `KTOTrainer`: the prompt, and the
prompt with each completion.

    text       the end token is appended to a completion that does not end with it
    messages   the chat template renders the prompt with a generation prompt, the others without
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from fpo.errors import DataError, FpoError, RecipeError
from fpo.stage1_cache.read import Group

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
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


def with_end_token(prompt: str, completions: Sequence[str], eos: str) -> list[str]:
    """The texts to encode of a group of text: the prompt, then the prompt with each completion."""
    return [prompt, *(prompt + (one if one.endswith(eos) else one + eos) for one in completions)]


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

    def rendered(self, group: Group, row: Mapping[str, Any], number: int) -> list[str]:
        """
        The texts to encode of a group of messages, special tokens included: the prompt, then the prompt with each
        completion. `row` may hold `tools` and `chat_template_kwargs`. Raises `DataError` where the template refuses
        the messages, `RecipeError` where it asks for a date and has none.
        """
        prompt = group.prompt
        arguments = self._arguments(row, number)
        render = self._tokenizer.apply_chat_template
        conversation = prompt
        try:
            with self._own_date(arguments["chat_template"]):
                texts = [render(prompt, tokenize=False, add_generation_prompt=True, **arguments)]
                for completion in group.completions:
                    conversation = prompt + completion
                    texts.append(render(conversation, tokenize=False, **arguments))
        except Exception as error:  # a template is a stranger's program: 1/0, endless recursion, any type of error
            raise _refused(error, conversation, number) from error
        return texts

    def render(self, messages: list[dict[str, Any]], row: Mapping[str, Any], number: int, *, opened: bool) -> str:
        """The text of a conversation; `opened` for an answer of the assistant, by the generation prompt."""
        arguments = self._arguments(row, number)
        try:
            with self._own_date(arguments["chat_template"]):
                text: str = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=opened, **arguments
                )
        except Exception as error:
            raise _refused(error, messages, number) from error
        return text

    def has_tags(self, row: Mapping[str, Any], number: int) -> bool:
        """Whether the template says itself what the assistant generates: {% generation %} ... {% endgeneration %}."""
        arguments = self._arguments(row, number)
        text = self._tokenizer.get_chat_template(arguments["chat_template"], arguments["tools"])
        return _GENERATION_TAG.search(text) is not None

    def generated(self, messages: list[dict[str, Any]], row: Mapping[str, Any], number: int) -> list[tuple[int, int]]:
        """What stands between generation tags: where each piece starts and ends in `render(messages)`."""
        arguments = self._arguments(row, number)
        text = self._tokenizer.get_chat_template(arguments.pop("chat_template"), arguments["tools"])
        given = [{name: value for name, value in message.items() if value is not None} for message in messages]
        try:
            with self._own_date(text):
                _, spans = render_jinja_template(
                    conversations=[given],
                    chat_template=text,
                    return_assistant_tokens_mask=True,
                    **{**self._tokenizer.special_tokens_map, **arguments},
                )
        except Exception as error:
            raise _refused(error, messages, number) from error
        return list(spans[0])

    def _arguments(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        return {"chat_template": self._text, "tools": _tools(row, number), **_template_arguments(row, number)}

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


def _refused(error: Exception, messages: list[dict[str, Any]], number: int) -> FpoError:
    if isinstance(error, FpoError):
        return error
    roles = " ".join(message["role"] for message in messages)
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return DataError(
        f"row {number}: the chat template refuses its messages ({roles}): {reason}; "
        "repair or remove the row, or set another chat template"
    )


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
