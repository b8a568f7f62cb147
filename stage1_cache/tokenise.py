"""
Groups to token ids, exactly as TRL 1.16's `DPOTrainer`, `KTOTrainer` and their collators: a cache built here and a run
of TRL see the same tokens. `texts` says what gets encoded, `masks` what of it counts, `drops` what becomes of each row;
here is the rest of the rules:

    special    text is encoded with the tokenizer's own special tokens, rendered messages without
    boundary   the prompt is the longest token prefix that the encoded prompt shares with all sequences of its group:
               a token that merges across the boundary belongs to the completions
    max_length cuts the end of prompt + completion; a prompt that leaves no room for a completion is dropped
    left out   a completion without a token that counts is left out, and its group is what it would be without it;
               a pair is dropped with it
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from fpo.errors import DataError, ModelError
from fpo.progress import progress_bar
from fpo.recipe import Transform
from fpo.scoring import template_text
from fpo.stage1_cache.ahead import one_ahead
from fpo.stage1_cache.drops import DROPPED, DropReport, Spread
from fpo.stage1_cache.masks import Masks, shared_prefix
from fpo.stage1_cache.read import (
    PAIR,
    TRANSCRIPTS,
    Group,
    Layout,
    WrongValue,
    as_conversation,
    is_transcript,
    layout_of,
)
from fpo.stage1_cache.texts import ChatTemplate, with_end_token
from fpo.stage1_cache.transforms import Transforms
from fpo.store.format.groups import segment_lengths
from fpo.store.format.ragged import I64, starts_of

TOKENISE_RULES = "trl-1.16/4"
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


ARRAYS: dict[str, type[np.generic]] = {
    "group_id": np.uint64,
    "n_completions": np.uint32,
    "input_ids": np.uint32,
    "splits": np.uint64,
    "score_mask": np.uint8,
    "score": np.float32,
    "weight": np.float32,
}
"""The arrays of `TokenisedGroups`."""


@dataclass(frozen=True)
class TokenisedGroups:
    """G groups with K completions as token ids, each prompt followed by its completions."""

    group_id: npt.NDArray[np.uint64]
    """(G,) row in the dataset, ascending."""
    n_completions: npt.NDArray[np.uint32]
    """(G,)"""
    input_ids: npt.NDArray[np.uint32]
    """(T,) prompts and completions back to back; a prompt is held once."""
    splits: npt.NDArray[np.uint64]
    """(G+K+1,) where each of them starts, and T."""
    score_mask: npt.NDArray[np.uint8] | None
    """(C,) 0 where a scored token does not count; None where all do."""
    score: npt.NDArray[np.float32]
    """(K,) higher is better; NaN where the data says nothing."""
    weight: npt.NDArray[np.float32]
    """(G,)"""
    drops: DropReport

    @staticmethod
    def of(arrays: dict[str, Any], drops: DropReport) -> TokenisedGroups:
        """From `ARRAYS`, of which the mask may be missing."""
        return TokenisedGroups(**{"score_mask": None, **arrays}, drops=drops)

    def __len__(self) -> int:
        return len(self.group_id)

    @property
    def lengths_of_prompts(self) -> npt.NDArray[np.int64]:
        """(G,) tokens."""
        return self._lengths[0]

    @property
    def lengths_of_completions(self) -> npt.NDArray[np.int64]:
        """(K,) tokens, also those that are not scored."""
        return self._lengths[1]

    def spreads(self) -> dict[str, Spread]:
        """How long prompts and completions are, in tokens, and how far the scores of a group are apart."""
        prompts, completions = self._lengths
        firsts = starts_of(self.n_completions)[:-1]
        if self.drops.unit == "pairs":
            measured = {f"{side} tokens": completions[firsts + n] for n, side in enumerate(("chosen", "rejected"))}
        else:
            measured = {"completion tokens": completions}
        longest = float(completions.max())
        found = {name: Spread.of(values, longest) for name, values in measured.items()}
        found["prompt tokens"] = Spread.of(prompts)
        most, least = (extreme.reduceat(self.score, firsts) for extreme in (np.maximum, np.minimum))
        found["score margin"] = Spread.of((most - least)[self.n_completions > 1])
        return {name: spread for name, spread in found.items() if spread is not None}

    @property
    def _lengths(self) -> tuple[I64, I64]:
        """Tokens of every prompt (G,) and of every completion (K,)."""
        return segment_lengths(self.splits, self.n_completions)


class Part(NamedTuple):
    """Rows of `read_groups`: all, or those of one of several sources."""

    dataset: Dataset
    bad: frozenset[int] | None = None
    """Rows that are left out unread, as then are those that the chat template refuses; None refuses them."""
    name: str = ""
    """Put in front of what is wrong with its rows."""
    weight: float = 1.0
    """What the weights of its groups are multiplied by."""
    keep: Callable[[Any], bool] | None = None
    """Whether a group with this prompt (None where it cannot be read) is this split's; None takes all of them."""


def tokenise(
    rows: Dataset | Sequence[Part],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    chat_template: str | None = None,
    today: str | None = None,
    score: str = "completion",
    turns: Sequence[int | None] | None = None,
    as_messages: bool = False,
    transform: Transform | None = None,
    folder: Path | None = None,
    sign_of_life: Callable[[], None] | None = None,
    batch_size: int = 256,
) -> TokenisedGroups:
    """
    Token ids of the groups of `read_groups`, in the dataset's order, part after part; rows are numbered through.

    `max_length`: in tokens of prompt + completion, None never cuts. `chat_template`: a Jinja template or the
    path of one, in place of the tokenizer's own; `today`: the ISO date that a template gets which asks for it.
    `score`, `turns`, `as_messages`, `transform`: as the recipe's `data` has them. `folder`: where the arrays are
    written, a file each, and mapped; None holds them in memory. `sign_of_life` is called after each batch of
    `batch_size` rows.
    Raises `DataError` without a chat template for messages or an end token for text, for a template that is no
    Jinja, where the template refuses a row, where masks need messages or cannot be told exactly, and where nothing
    is left; `RecipeError` for a template that lacks its date.
    """
    parts = [Part(rows)] if isinstance(rows, Dataset) else rows
    groups = _Builder(max_length, tokenizer.bos_token_id, folder)
    transforms = Transforms(transform)
    for part in parts:
        with _naming(part.name):
            reader = _Reader.of(part, tokenizer, chat_template, today, score, turns, as_messages, transforms)
            groups.begin_part(reader.makes, part.weight)
            batches = _batches(part.dataset, batch_size, transforms.copies)
            total = transforms.copies * len(part.dataset)
            with progress_bar(total, reader.makes.unit, "tokenise") as progress:
                # A tokenizer in Rust encodes on threads of its own, without the interpreter's lock.
                for batch, sequences in one_ahead(map(reader.prepared, batches), reader.encoded):
                    groups.add_batch(batch, sequences)
                    progress.update(batch.n_rows)
                    if sign_of_life is not None:
                        sign_of_life()
            groups.end_part(total)
            transforms.forget_rows()
    return groups.result()


@contextmanager
def _naming(part: str) -> Iterator[None]:
    """Puts the part in front of what is wrong with its rows."""
    try:
        yield
    except DataError as error:
        raise (DataError(f"{part}: {error}") if part else error) from None


@dataclass(frozen=True)
class _Reader:
    """How the rows of a part become texts."""

    part: Part
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    as_messages: bool
    """Whether text is read as messages."""
    template: ChatTemplate | None
    """None of text."""
    masks: Masks | None
    transforms: Transforms

    @staticmethod
    def of(
        part: Part,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        today: str | None,
        score: str,
        turns: Sequence[int | None] | None,
        as_messages: bool,
        transforms: Transforms,
    ) -> _Reader:
        """Raises DataError where text or messages lack what they need."""
        dataset = part.dataset
        if len(dataset) == 0:
            raise DataError("no rows to tokenise: the dataset has none; ask for a split that has some")
        first = dataset[0]
        layout = layout_of(dataset.column_names, first)
        if as_messages and layout is PAIR and not layout.holds_messages(first) and is_transcript(first):
            layout, as_messages = TRANSCRIPTS, False
        messages = layout.holds_messages(first)
        if messages and part.name:
            as_messages = False  # of several sources those of text become messages
        _check_kind(messages, score, turns, as_messages)
        template = masks = None
        if messages or as_messages:
            template = ChatTemplate(tokenizer, _template(tokenizer, chat_template), today)
            masks = Masks(template, tokenizer, assistant=score == "assistant", turns=turns)
        elif tokenizer.eos_token is None:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path!r} has no end token (eos_token), with which completions of "
                "text must end; set one in its tokenizer_config.json, or another data.tokenizer"
            )
        return _Reader(part, tokenizer, layout, as_messages, template, masks, transforms)

    @property
    def makes(self) -> Layout:
        """What its groups are."""
        return PAIR if self.transforms.makes_pairs else self.layout

    def prepared(self, rows: list[tuple[int, dict[str, Any]]]) -> _Batch:
        """Rows as groups and their texts; what is none, with the reason."""
        batch = _Batch(len(rows))
        for number, row in rows:
            found = self._group(number, row)
            if isinstance(found, str):
                batch.unusable.append((found, number))
            elif found is not None:
                self._add(batch, number, row, found)
        return batch

    def encoded(self, batch: _Batch) -> list[list[int]]:
        """Token ids of its texts."""
        return _encode(self.tokenizer, batch.texts, add_special_tokens=self.template is None)

    def _group(self, number: int, row: dict[str, Any]) -> Group | str | None:
        """A row's group, why it has none, or None where it is another split's."""
        part, (copy, at) = self.part, divmod(number, len(self.part.dataset))
        if at in (part.bad or ()):
            return "bad_row" if part.keep is None or part.keep(None) else None
        try:
            group = self.layout.group(row)
        except WrongValue as wrong:  # of a transcript, which is looked into here first
            if part.bad is None:
                raise DataError(f"row {number}, {wrong}") from None
            return "bad_row"
        if part.keep is not None and not part.keep(group.prompt):
            return None
        if self.as_messages:
            group = as_conversation(group)
        return _unusable(group, self.template is not None) or self.transforms.of(group, at, copy)

    def _add(self, batch: _Batch, number: int, row: dict[str, Any], group: Group) -> None:
        counted: list[bytearray | None]
        if self.template is None:
            assert self.tokenizer.eos_token is not None
            texts = with_end_token(group.prompt, group.completions, self.tokenizer.eos_token)
            counted = [None] * len(group.completions)
        else:
            assert self.masks is not None
            row = {**row, **group.extras}
            try:
                texts = self.template.rendered(group, row, number)
                sides = zip(group.completions, texts[1:], strict=True)
                counted = [self.masks.of(group.prompt, one, text, row, number) for one, text in sides]
            except DataError:
                if self.part.bad is None:
                    raise
                batch.unusable.append(("bad_row", number))
                return
        batch.kept.append((number, group, counted))
        batch.texts += texts


@dataclass
class _Batch:
    """Rows on their way to token ids."""

    n_rows: int
    unusable: list[tuple[str, int]] = field(default_factory=list)
    """Why and which rows are dropped before anything is encoded."""
    kept: list[tuple[int, Group, list[bytearray | None]]] = field(default_factory=list)
    """Row, group, and which tokens of each completion count (None: all of them)."""
    texts: list[str] = field(default_factory=list)
    """Of the groups that are kept: the prompt, then the prompt with each completion."""


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
    """Groups appended batch by batch to `ARRAYS`, in a folder's files or in memory: 5 bytes a token."""

    def __init__(self, max_length: int | None, bos: int | None, folder: Path | None) -> None:
        self.max_length, self.bos = max_length, bos
        self.report = DropReport(unit="")
        self.whole, self.part_weight, self.rows_before = False, 1.0, 0
        self.folder = folder
        self.memory = {name: bytearray() for name in ARRAYS}
        """Of each array the bytes, where there is no folder."""
        self.n_tokens = 0
        self.masked = False
        """Whether a scored token does not count."""
        self._begin([0])

    def begin_part(self, layout: Layout, weight: float) -> None:
        """What follows are groups of this layout, whose weights are multiplied by this."""
        self.whole, self.part_weight = layout.whole, weight
        self.report.unit = layout.unit if self.report.unit in ("", layout.unit) else "groups"

    def end_part(self, n_rows: int) -> None:
        """Number what follows on behind these rows."""
        self.rows_before += n_rows

    def _begin(self, splits: Sequence[int] = ()) -> None:
        """Empty buffers for the next batch."""
        self.group_id, self.n_completions, self.splits = array("Q"), array("I"), array("Q", splits)
        self.input_ids = array("I")
        self.score, self.weight = array("f"), array("f")
        self.score_mask = bytearray()

    def add_batch(self, batch: _Batch, encoded: list[list[int]]) -> None:
        """Keep or drop these rows, given what their texts became."""
        for reason, number in batch.unusable:
            self.report.drop(reason, self.rows_before + number)
        rest = iter(encoded)
        for number, group, counted in batch.kept:
            alone = next(rest)
            sequences = list(islice(rest, len(group.completions)))
            self.add(self.rows_before + number, group, alone, sequences, counted)
        self._flush()

    def _flush(self) -> None:
        for name, held in self.memory.items():
            if self.folder is None:
                held += getattr(self, name)
            else:
                with (self.folder / name).open("ab") as file:
                    file.write(getattr(self, name))
        self._begin()

    def add(
        self,
        row: int,
        group: Group,
        alone: list[int],
        sequences: list[list[int]],
        masks: Sequence[bytearray | None],
    ) -> None:
        """
        Keep or drop a row, given the encoded prompt, the prompt with each completion, and which tokens of those
        count (None: all of them).
        """
        shares = [shared_prefix(alone, ids) for ids in sequences]
        left = list(range(len(sequences)))
        out: list[str] = []
        while True:
            shared = min([shares[place] for place in left])
            if self.max_length is not None and shared >= self.max_length:
                return self.report.drop("prompt_fills_max_length", row)
            reasons = {place: why for place in left if (why := self._useless(shared, sequences[place], masks[place]))}
            if not reasons:
                break
            out += reasons.values()
            left = [place for place in left if place not in reasons]
            # What is left out may have been what cut the shared prompt short.
            if self.whole or not left:
                return self.report.drop(min(out, key=list(DROPPED).index), row)
        self._append(row, group, alone[:shared], [(place, sequences[place], masks[place]) for place in left])
        for reason in out:
            self.report.leave_out(reason, row)
        self._note(row, group, alone, shared, [sequences[place] for place in left])
        return None

    def _useless(self, shared: int, ids: list[int], mask: bytearray | None) -> str | None:
        """Why a completion behind a prompt of so many tokens cannot be kept, if so."""
        if len(ids) <= shared:
            return "empty_completion"
        if shared == 0 and len(ids[: self.max_length]) == 1:
            return "no_scored_token"
        if mask is not None and 1 not in mask[max(shared, 1) : self.max_length]:
            return "nothing_counts"
        return None

    def _append(
        self, row: int, group: Group, prompt: list[int], left: list[tuple[int, list[int], bytearray | None]]
    ) -> None:
        self.report.keep(len(prompt), len(left))
        self.group_id.append(row)
        self.n_completions.append(len(left))
        self.weight.append(group.weight * self.part_weight)
        self._append_tokens(prompt)
        for place, ids, mask in left:
            self.score.append(group.scores[place])
            kept = ids[len(prompt) : self.max_length]
            self._append_tokens(kept)
            if mask is None:
                self.score_mask += b"\1" * (len(kept) if prompt else len(kept) - 1)
            else:
                counted = mask[len(prompt) or 1 : self.max_length]
                self.masked = self.masked or 0 in counted
                self.score_mask += counted

    def _append_tokens(self, ids: list[int]) -> None:
        self.input_ids.extend(ids)
        self.n_tokens += len(ids)
        self.splits.append(self.n_tokens)

    def _note(self, row: int, group: Group, alone: list[int], shared: int, sequences: list[list[int]]) -> None:
        note = self.report.note
        for place, ids in enumerate(sequences):
            if self.max_length is not None and len(ids) > self.max_length:
                note(("chosen_truncated", "rejected_truncated")[place] if self.whole else "truncated", row)
        for what in group.notes:
            note(what, row)
        if self.whole and group.scores[0] == group.scores[1]:
            note("tied", row)
        if not all(map(_says_something, group.completions)):
            note("empty_side", row)
        if shared < len(alone):
            note("prompt_tail_moved", row)
        if _repeats(sequences, self.max_length):
            note("identical" if self.whole else "alike", row)
        if self.bos is not None and alone[: min(shared, 2)] == [self.bos, self.bos]:
            note("bos_doubled", row)

    def result(self) -> TokenisedGroups:
        if not self.report.kept:
            advice = "; raise data.max_length" if "prompt_fills_max_length" in self.report.dropped else ""
            total, *reasons = self.report.lines()
            unit = self.report.unit.removesuffix("s")
            raise DataError("\n".join([f"no {unit} is left to score: {total}{advice}", *reasons]))
        self._flush()
        names = [name for name in ARRAYS if name != "score_mask" or self.masked]
        if self.folder is None:
            arrays = {name: np.frombuffer(self.memory[name], ARRAYS[name]) for name in names}
        else:
            arrays = {name: mapped(self.folder, name) for name in names}
            if not self.masked:
                (self.folder / "score_mask").unlink()
        return TokenisedGroups.of(arrays, self.report)


def mapped(folder: Path, name: str) -> np.ndarray:
    """One of `ARRAYS` from its file, of which a page is read when it is looked at. Raises OSError, ValueError."""
    return np.asarray(np.memmap(folder / name, ARRAYS[name], mode="r"))


def _batches(dataset: Dataset, batch_size: int, copies: int) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Rows with their numbers, `batch_size` at a time; all of them as often as there are copies, numbered on."""
    for copy in range(copies):
        for first in range(0, len(dataset), batch_size):
            columns = dataset[first : first + batch_size]
            rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
            yield list(enumerate(rows, start=copy * len(dataset) + first))


def _check_kind(messages: bool, score: str, turns: Sequence[int | None] | None, as_messages: bool) -> None:
    """DataError where text or messages are asked for what only the other has."""
    if as_messages and messages:
        raise DataError("data.as_messages: the data holds messages already; leave it out")
    if (score == "assistant" or turns is not None) and not (messages or as_messages):
        raise DataError(
            "data.score: assistant needs messages, and the data holds text, in which nobody can be told apart; "
            "leave it out, or use data of messages"
        )


def _unusable(group: Group, conversational: bool) -> str | None:
    """Why a row cannot even be rendered, if so."""
    if not group.completions:
        return "no_completion"
    return "no_shared_prompt" if conversational and not group.prompt else None


def _says_something(completion: Any) -> bool:
    if isinstance(completion, str):
        return bool(completion.strip())
    return any(value for message in completion for name, value in message.items() if name != "role")


def _repeats(sequences: list[list[int]], max_length: int | None) -> bool:
    """Whether two completions of a group are the same tokens, once cut."""
    if len(sequences) == 2:
        one, other = sequences
        return one[:max_length] == other[:max_length]
    return len({tuple(ids[:max_length]) for ids in sequences}) < len(sequences)


def _template(tokenizer: PreTrainedTokenizerBase, override: str | None) -> str | None:
    if override is not None:
        return template_text(override)
    if tokenizer.chat_template is None:
        raise DataError(
            f"the data holds messages and the tokenizer {tokenizer.name_or_path!r} has no chat template; "
            "set data.chat_template (a Jinja file or its text), data.tokenizer to an instruction-tuned model's, or use "
            "plain text"
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


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
