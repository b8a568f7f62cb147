"""
Which tokens of a rendered conversation count: all of a completion but what tools said, or what the assistant said
alone (`data.score: assistant`).

    tools      what a tool said is found by rendering something else in its place: whatever else the template writes
               stays as it is. A token that holds any of it does not count
    tagged     a template with generation tags says itself what the assistant generates. A token that holds any of it
               counts, as in transformers
    by turns   other templates render the conversation up to a turn and up to its end; between the two stands what the
               assistant said, with the end of its turn and without its header. The end must be where the whole
               conversation has it, token by token; the header may differ, and then ends where the prompt would, by
               the longest shared prefix
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from fpo.errors import DataError
from fpo.stage1_cache.texts import ChatTemplate

TOOL_ROLES = ("tool", "ipython", "function")
# In place of what a tool said: private-use characters, which no data should hold.
_SENTINEL = "\ue000tool\ue001"

Message = dict[str, Any]


class Masks:
    """Says for the completions of one dataset which tokens count."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: PreTrainedTokenizerBase,
        *,
        assistant: bool,
        turns: Sequence[int | None] | None = None,
    ) -> None:
        """
        assistant  only what the assistant says counts
        turns      and of that only these turns, first and last, counted from 1 over the assistant's messages of a
                   completion; a last of None has no end
        """
        self._template, self._tokenizer, self._assistant = template, tokenizer, assistant
        first, last = turns or (1, None)
        self._first, self._last = first or 1, last

    def of(
        self, prompt: list[Message], completion: list[Message], text: str, row: Mapping[str, Any], number: int
    ) -> bytearray | None:
        """
        1 for every token of `text` (prompt and completion, rendered) that counts, 0 for others; the prompt's own say
        nothing. None where all count. Raises `DataError` where that cannot be said exactly.
        """
        if not self._assistant:
            if all(message["role"] not in TOOL_ROLES for message in completion):
                return None
            return self._without_tools(prompt, completion, text, row, number)
        counts = self._turns(completion)
        if self._template.has_tags(row, number):
            return self._tagged(prompt, completion, counts, text, row, number)
        if all(counts):
            return None
        return self._by_turns(prompt, completion, counts, text, row, number)

    def _turns(self, completion: list[Message]) -> list[bool]:
        """Whether each message is a turn of the assistant that is asked for."""
        counts, turn = [], 0
        for message in completion:
            turn += message["role"] == "assistant"
            asked = self._first <= turn <= (self._last or turn)
            counts.append(message["role"] == "assistant" and asked)
        return counts

    def _without_tools(
        self, prompt: list[Message], completion: list[Message], text: str, row: Mapping[str, Any], number: int
    ) -> bytearray:
        conversation = prompt + completion
        spans = []
        for place, message in enumerate(conversation):
            if place < len(prompt) or message["role"] not in TOOL_ROLES or message.get("content") is None:
                continue
            other = [*conversation[:place], {**message, "content": _SENTINEL}, *conversation[place + 1 :]]
            rendered = self._template.render(other, row, number, opened=False)
            if _SENTINEL not in rendered:
                continue
            before, after = rendered.split(_SENTINEL, 1)
            fits = len(before) + len(after) <= len(text) and text.startswith(before) and text.endswith(after)
            if not fits or _SENTINEL in after:
                raise DataError(
                    f"row {number}: the chat template does not render what a tool says (message {place}) in one place "
                    "of its own, so that it cannot be left out of what counts; set another data.chat_template"
                )
            spans.append((len(before), len(text) - len(after)))
        return self._tokens(text, spans, inside=0, number=number)

    def _tagged(
        self,
        prompt: list[Message],
        completion: list[Message],
        counts: list[bool],
        text: str,
        row: Mapping[str, Any],
        number: int,
    ) -> bytearray:
        spans = self._template.generated(prompt + completion, row, number)
        said = [message["role"] == "assistant" for message in prompt + completion]
        if sum(counts) < sum(said[len(prompt) :]):
            if len(spans) != sum(said):
                raise DataError(
                    f"row {number}: data.turns: the chat template marks {len(spans)} pieces as generated, the "
                    f"conversation has {sum(said)} turns of the assistant; use a template that marks each turn once"
                )
            asked = [True] * sum(said[: len(prompt)]) + [
                count for count, own in zip(counts, said[len(prompt) :], strict=True) if own
            ]
            spans = [span for span, wanted in zip(spans, asked, strict=True) if wanted]
        return self._tokens(text, spans, inside=1, number=number)

    def _by_turns(
        self,
        prompt: list[Message],
        completion: list[Message],
        counts: list[bool],
        text: str,
        row: Mapping[str, Any],
        number: int,
    ) -> bytearray:
        ids = self._encode(text)
        mask = bytearray(len(ids))

        def tokens(messages: list[Message], *, opened: bool) -> list[int]:
            return self._encode(self._template.render(messages, row, number, opened=opened))

        for place, wanted in enumerate(counts):
            if not wanted:
                continue
            before = prompt + completion[:place]
            start, end = 0, len(ids)
            if place > 0:
                closed = self._end(tokens(before, opened=False), ids, before, number)
                start = max(closed, shared_prefix(tokens(before, opened=True), ids))
            if place < len(completion) - 1:
                upto = [*before, completion[place]]
                end = self._end(tokens(upto, opened=False), ids, upto, number)
            mask[start:end] = b"\1" * (end - start)
        return mask

    def _end(self, tokens: list[int], ids: list[int], messages: list[Message], number: int) -> int:
        """Where these messages end in the whole conversation, in tokens."""
        if ids[: len(tokens)] != tokens:
            raise DataError(
                f"row {number}: the chat template renders the first {len(messages)} messages otherwise where more "
                "follow, so what counts by data.score: assistant cannot be told apart; set data.chat_template to one "
                "with {% generation %} tags (TRL has such training templates), or to one that leaves past turns alone"
            )
        return len(tokens)

    def _tokens(self, text: str, spans: Sequence[tuple[int, int]], *, inside: int, number: int) -> bytearray:
        """The value `inside` for the tokens that hold a character of these spans, the other one for all others."""
        if not self._tokenizer.is_fast:
            raise DataError(
                f"row {number}: the tokenizer {self._tokenizer.name_or_path!r} does not say where in a text its tokens "
                "stand (it has no tokenizer.json), which masks need; set data.tokenizer to a fast one"
            )
        places = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        mask = bytearray([1 - inside]) * len(places["offset_mapping"])
        for token, (start, end) in enumerate(places["offset_mapping"]):
            if any(start < last and first < end for first, last in spans):
                mask[token] = inside
        return mask

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def shared_prefix(ids: list[int], others: list[int]) -> int:
    """How many first tokens two sequences share."""
    if others[: len(ids)] == ids:  # nearly always, and compared in C
        return len(ids)
    return next(i for i, (one, other) in enumerate(zip([*ids, -1], [*others, -2], strict=False)) if one != other)
