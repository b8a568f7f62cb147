"""
Pairs to token ids, exactly as TRL 1.16's `DPOTrainer` and its collator: a cache built here and a run of TRL
see the same tokens. `texts` says what gets encoded, `drops` what becomes of each row; here is the rest of
the rules:

    special    text is encoded with the tokenizer's own special tokens, rendered messages without
    boundary   the prompt is the longest token prefix that the encoded prompt shares with both sequences:
               a token that merges across the boundary belongs to the completions
    max_length cuts the end of prompt + completion; a prompt that leaves no room for a completion is dropped
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from fpo.errors import DataError, ModelError
from fpo.progress import progress_bar
from fpo.scoring import template_text
from fpo.stage1_cache.columns import is_conversational
from fpo.stage1_cache.drops import DropReport
from fpo.stage1_cache.texts import ChatTemplate, extract_prompt, with_end_token

TOKENISE_RULES = "trl-1.16/2"
"""Names these rules in a memo key; the number after the slash moves when our reading of them changes."""

# What decides the ids besides the weights; config.json because its model_type may pick the tokenizer's class.
_TOKENIZER_FILES = [
    "*token*.json",
    "*vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "config.json",
]


@dataclass(frozen=True)
class TokenisedPairs:
    """P pairs as token ids: part 3p is pair p's prompt, 3p+1 its chosen, 3p+2 its rejected completion."""

    pair_id: npt.NDArray[np.uint64]
    """(P,) row in the dataset, ascending."""
    input_ids: npt.NDArray[np.uint32]
    """(T,) the parts back to back; a prompt is held once."""
    splits: npt.NDArray[np.uint64]
    """(3P+1,) where each part starts, and T."""
    drops: DropReport

    def __len__(self) -> int:
        return len(self.pair_id)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(P, 3) tokens of prompt, chosen, rejected."""
        starts = self.splits.astype(np.int64)
        return (starts[1:] - starts[:-1]).reshape(-1, 3)

    @property
    def n_completions(self) -> npt.NDArray[np.uint32]:
        """(P,) two each."""
        return np.full(len(self), 2, np.uint32)


def tokenise(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    chat_template: str | None = None,
    today: str | None = None,
    batch_size: int = 256,
) -> TokenisedPairs:
    """
    Token ids of the pairs of `read_pairs`, in the dataset's order.

    `max_length`: in tokens of prompt + completion, None never cuts. `chat_template`: a Jinja template or the
    path of one, in place of the tokenizer's own; `today`: the ISO date that a template gets which asks for it.
    Raises `DataError` without a chat template for messages or an end token for text, for a template that is no
    Jinja, where the template refuses a row, and where no pair is left; `RecipeError` for one that lacks its date.
    """
    if len(dataset) == 0:
        raise DataError("no pairs to tokenise: the dataset has 0 rows; ask for a split that has some")
    if conversational := is_conversational(dataset[0]):
        template = ChatTemplate(tokenizer, _template(tokenizer, chat_template), today)
    elif tokenizer.eos_token is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end token (eos_token), with which completions of text "
            "must end; set one in its tokenizer_config.json, or another data.tokenizer"
        )

    pairs = _Builder(max_length, tokenizer.bos_token_id)
    with progress_bar(len(dataset), "pairs", "tokenise") as progress:
        for batch in _batches(dataset, batch_size):
            kept: list[tuple[int, list[str]]] = []
            texts: list[str] = []
            for number, row in batch:
                sides, notes = _sides(row)
                if conversational and not sides[0]:
                    pairs.report.drop("no_shared_prompt", number)
                    continue
                kept.append((number, notes))
                texts += (
                    template.rendered(sides, row, number)
                    if conversational
                    else with_end_token(*sides, tokenizer.eos_token)
                )
            encoded = _encode(tokenizer, texts, add_special_tokens=not conversational)
            for index, (number, notes) in enumerate(kept):
                pairs.add(number, notes, *encoded[3 * index : 3 * index + 3])
            progress.update(len(batch))
    return pairs.result()


def tokenizer_identity(path: str, *, revision: str | None = None, chat_template: str | None = None) -> dict[str, Any]:
    """
    What of the tokenizer decides the token ids, in JSON types: sha256 of its files (its chat template is one
    of them, or in one) and of the `chat_template` in place of it, versions of the libraries that read them.

    `path`: a folder, or a hub id, of which only the tokenizer's files are fetched. Raises `ModelError`.
    """
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=_TOKENIZER_FILES))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"tokenizer {path!r}: no such folder, nor reached on the hub ({reason})") from error
    files = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)})
    if not files:
        raise ModelError(f"tokenizer {path!r}: none of its files in {folder}; expected tokenizer.json or its like")
    return {
        "files": {file.relative_to(folder).as_posix(): _sha256(file.read_bytes()) for file in files},
        "chat_template": None if chat_template is None else _sha256(template_text(chat_template).encode()),
        "versions": {name: version(name) for name in ("tokenizers", "transformers")},
    }


class _Builder:
    """Parts of pairs appended to typed buffers: 4 bytes a token, however many pairs."""

    def __init__(self, max_length: int | None, bos: int | None) -> None:
        self.max_length, self.bos = max_length, bos
        self.report = DropReport()
        self.pair_id, self.splits = array("Q"), array("Q", [0])
        self.input_ids = array("I")

    def add(
        self, row: int, notes: list[str], alone: list[int], with_chosen: list[int], with_rejected: list[int]
    ) -> None:
        """Keep or drop a row, given the encoded prompt, prompt + chosen and prompt + rejected."""
        shared = min(_shared_prefix(alone, with_chosen), _shared_prefix(alone, with_rejected))
        chosen = with_chosen[shared : self.max_length]
        rejected = with_rejected[shared : self.max_length]
        if self.max_length is not None and shared >= self.max_length:
            return self.report.drop("prompt_fills_max_length", row)
        if not chosen or not rejected:
            return self.report.drop("empty_completion", row)
        if shared == 0 and min(len(chosen), len(rejected)) == 1:
            return self.report.drop("no_scored_token", row)
        self.report.keep(shared)
        self.pair_id.append(row)
        for part in (alone[:shared], chosen, rejected):
            self.input_ids.extend(part)
            self.splits.append(len(self.input_ids))
        holds = {
            "chosen_truncated": shared + len(chosen) < len(with_chosen),
            "rejected_truncated": shared + len(rejected) < len(with_rejected),
            "prompt_tail_moved": shared < len(alone),
            "identical": chosen == rejected,
            "bos_doubled": self.bos is not None and alone[:shared][:2] == [self.bos, self.bos],
        }
        for what in (*notes, *(name for name in holds if holds[name])):
            self.report.note(what, row)
        return None

    def result(self) -> TokenisedPairs:
        if not self.report.kept:
            advice = "; raise data.max_length" if "prompt_fills_max_length" in self.report.dropped else ""
            total, *reasons = self.report.lines()
            raise DataError("\n".join([f"no pair is left to score: {total}{advice}", *reasons]))
        return TokenisedPairs(
            pair_id=np.frombuffer(self.pair_id, np.uint64),
            input_ids=np.frombuffer(self.input_ids, np.uint32),
            splits=np.frombuffer(self.splits, np.uint64),
            drops=self.report,
        )


def _batches(dataset: Dataset, batch_size: int) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Rows with their numbers, `batch_size` at a time."""
    for first in range(0, len(dataset), batch_size):
        columns = dataset[first : first + batch_size]
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        yield list(enumerate(rows, start=first))


def _sides(row: dict[str, Any]) -> tuple[tuple[Any, Any, Any], list[str]]:
    """Prompt, chosen and rejected of a row, and what is to be noted about them."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is None:
        shorter = min(len(chosen), len(rejected))
        begins = len(chosen) != len(rejected) and chosen[:shorter] == rejected[:shorter]
        sides = extract_prompt(chosen, rejected)
        notes = ["one_begins_other"] if begins else []
        return sides, [*notes, *_if_silent(sides)]
    size = len(prompt)
    repeated = size > 0 and chosen[:size] == prompt == rejected[:size]
    notes = ["prompt_repeated"] if repeated else []
    return (prompt, chosen, rejected), [*notes, *_if_silent((prompt, chosen, rejected))]


def _if_silent(sides: tuple[Any, Any, Any]) -> list[str]:
    """The note on a pair whose chosen or rejected says nothing."""

    def says_something(side: Any) -> bool:
        if isinstance(side, str):
            return bool(side.strip())
        return any(value for message in side for name, value in message.items() if name != "role")

    return [] if all(map(says_something, sides[1:])) else ["empty_side"]


def _template(tokenizer: PreTrainedTokenizerBase, override: str | None) -> str | None:
    if override is not None:
        return template_text(override)
    if tokenizer.chat_template is None:
        raise DataError(
            f"the pairs are messages and the tokenizer {tokenizer.name_or_path!r} has no chat template; "
            "set data.chat_template (a Jinja file or its text), data.tokenizer to an instruction-tuned model's, or use "
            "pairs of plain text"
        )
    return None


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose warns of texts beyond the model's length; they are cut after this, once the boundary is known.
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return list(encoded["input_ids"])


def _shared_prefix(ids: list[int], others: list[int]) -> int:
    """How many first tokens two sequences share."""
    if others[: len(ids)] == ids:  # nearly always, and compared in C
        return len(ids)
    return next(i for i, (one, other) in enumerate(zip([*ids, -1], [*others, -2], strict=False)) if one != other)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
