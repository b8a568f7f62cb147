"""
Prompt sets: what a model is asked, in the layouts of the benchmarks that are judged elsewhere and of preference data.

    messages      a conversation that ends with the user's turn
    prompt        the same, or text
    instruction   text (AlpacaEval)
    turns         the user's turns one after the other, as text or {"content": text} (MT-Bench, Arena-Hard v0.1)

Text is a user's message where the tokenizer has a chat template, as judges mean it; `as_text` takes it as it stands, as
preference data of text does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fpo.errors import DataError
from fpo.stage1_cache.read import read_rows
from fpo.stage1_cache.texts import ChatTemplate

Message = dict[str, Any]


class Prompt(NamedTuple):
    """A row of a prompt set."""

    turns: tuple[list[Message] | str, ...]
    """What is said before each completion: messages, or text. All but the first go on behind what the model said."""
    row: dict[str, Any]
    """As it was read."""


def read_prompts(source: str, split: str, *, as_text: bool) -> list[Prompt]:
    """
    The prompts of a file, folder or hub id, in its order.

    as_text  text is the whole prompt rather than a user's message
    Raises DataError naming the row that is no prompt, and as `stage1_cache.read.read_rows`.
    """
    prompts = []
    for number, row in enumerate(read_rows(source, split)):
        try:
            prompts.append(Prompt(turns_of(row, as_text), row))
        except ValueError as error:
            raise DataError(f"{source}, row {number}: {error}") from None
    return prompts


def turns_of(row: dict[str, Any], as_text: bool) -> tuple[list[Message] | str, ...]:
    """What a row asks, turn by turn; ValueError where it asks nothing."""
    readers: dict[str, Callable[[Any], Sequence[list[Message] | str]]] = {
        "messages": lambda value: [_conversation(value)],
        "turns": lambda value: [_said(turn, as_text) for turn in value],
        "prompt": lambda value: [_said(value, as_text) if isinstance(value, str) else _conversation(value)],
        "instruction": lambda value: [_said(value, as_text)],
    }
    for name, reader in readers.items():
        if row.get(name):
            turns = tuple(reader(row[name]))
            if as_text and len(turns) > 1:
                raise ValueError("several turns need messages; leave out --text")
            return turns
    raise ValueError(f"none of {', '.join(readers)} says what is asked; its columns are {', '.join(row)}")


def _said(turn: Any, as_text: bool) -> list[Message] | str:
    text = turn.get("content") if isinstance(turn, dict) else turn
    if not isinstance(text, str) or not text:
        raise ValueError(f"a turn is text, not {turn!r}")
    return text if as_text else [{"role": "user", "content": text}]


def _conversation(value: Any) -> list[Message]:
    messages = [{name: part for name, part in message.items() if part is not None} for message in value]
    if not messages or messages[-1].get("role") not in ("user", "tool"):
        raise ValueError("its messages do not end with the user's turn, so there is nothing to answer")
    return messages


class Encoder:
    """Turns what was said into token ids, as the pairs of training were: by the chat template, or as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: str | None = None) -> None:
        """today: ISO date that a chat template gets which asks for one"""
        self.tokenizer = tokenizer
        self.template = None if tokenizer.chat_template is None else ChatTemplate(tokenizer, None, today)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """DataError where messages are asked of a tokenizer without a chat template."""
        if self.template is None and any(not isinstance(prompt.turns[0], str) for prompt in prompts):
            raise DataError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no chat template, so nobody can speak in turns; "
                "--text takes prompts as the text that they are"
            )

    def tokens(self, said: list[Message] | str, number: int) -> list[int]:
        """Of the prompt with this number, up to where the model goes on. Raises DataError where a template refuses."""
        if isinstance(said, str):
            ids: list[int] = self.tokenizer(said)["input_ids"]
            # Some tokenizers end every text; in training that token stands behind the completion.
            ends = self.tokenizer.eos_token is not None and ids[-1:] == [self.tokenizer.eos_token_id]
            return ids[:-1] if ends and not said.endswith(self.tokenizer.eos_token) else ids
        assert self.template is not None  # see `check`
        text = self.template.render(said, {}, number, opened=True)
        templated: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return templated
