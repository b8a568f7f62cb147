"""
`fpo judge`: what a reward model says of generations, and which of two models it prefers, prompt by prompt.

Dimension key:  N generations   R rows of a batch
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from fpo.errors import DataError, ModelError
from fpo.evaluation.estimates import Mean, clustered_mean
from fpo.evaluation.prompts import Message, turns_of
from fpo.progress import progress_bar
from fpo.scoring import load_tokenizer, model_folder
from fpo.scoring.configs import one_line

ALIKE = 0.1
"""Two completions are alike in length where they differ by no more than this share of the longer one."""


class Judged(NamedTuple):
    """Generations of one model in the order of their prompts, as `fpo generate` writes them, with their rewards."""

    name: str
    rows: list[dict[str, Any]]
    rewards: Float[np.ndarray, " N"]

    @property
    def prompts(self) -> np.ndarray:
        """Which prompt each answers."""
        return np.array([row["row"] for row in self.rows])

    @property
    def tokens(self) -> np.ndarray:
        """How long each is, all turns together."""
        return np.array([sum(row["tokens"]) for row in self.rows])

    @property
    def reward(self) -> Mean:
        return clustered_mean(self.rewards, self.prompts)

    @property
    def length(self) -> Mean:
        return clustered_mean(self.tokens.astype(np.float64), self.prompts)


class WinRate(NamedTuple):
    """How often the first model's completion has the larger reward; a tie is half a win."""

    where: str
    n: int
    rate: Mean


def read_generations(file: Path) -> list[dict[str, Any]]:
    """Rows of `fpo generate --format jsonl`. Raises DataError."""
    try:
        with file.open(encoding="utf-8") as lines:  # str.splitlines would also part at a U+2028 that a model wrote
            rows = [json.loads(line) for line in lines]
        whole = all({"row", "sample", "completions", "tokens"} <= row.keys() for row in rows)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{file}: {one_line(error)}; judge what fpo generate --format jsonl wrote") from None
    if not rows or not whole:
        raise DataError(f"{file}: no generations; judge what fpo generate --format jsonl wrote")
    return rows


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier with one label, which is the reward."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    @classmethod
    def of(cls, name: str, dtype: str, batch_size: int) -> RewardModel:
        """From a folder or the hub. Raises ModelError where it is no reward model."""
        folder = model_folder(name)
        tokenizer = load_tokenizer(str(folder), None)
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            raise ModelError(f"reward model {name}: {one_line(error)}") from None
        labels = model.config.num_labels
        if labels != 1:
            raise ModelError(f"reward model {name}: {labels} labels; a reward model has one, whose logit is the reward")
        if absent := sorted(loading["missing_keys"]):
            raise ModelError(f"reward model {name}: its files lack {absent[0]}: is it a language model?")
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return cls(model, tokenizer, batch_size)

    def rewards(self, rows: Sequence[dict[str, Any]], *, as_text: bool) -> Float[np.ndarray, " N"]:
        """
        Of what each row's prompt and completions say together.

        as_text  as in `read_prompts`
        Raises DataError where messages are judged by a model without a chat template, or a row is too long for it.
        """
        ids = [self._tokens(row, as_text) for row in rows]
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        found = np.zeros(len(ids))
        with progress_bar(len(ids), "completions", "judge") as bar:
            for batch in _batches(order, self.batch_size):
                found[batch] = self._forward([ids[row] for row in batch])
                bar.update(len(batch))
        return found

    @torch.no_grad()
    def _forward(self, rows: list[list[int]]) -> Float[np.ndarray, " R"]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.model.config.pad_token_id)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        logits = self.model(input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device)).logits
        rewards: np.ndarray = logits[:, 0].double().cpu().numpy()
        return rewards

    def _tokens(self, row: dict[str, Any], as_text: bool) -> list[int]:
        turns = turns_of(row, as_text)
        if isinstance(turns[0], str):
            ids: list[int] = self.tokenizer(turns[0] + row["completions"][0])["input_ids"]
            return ids
        if self.tokenizer.chat_template is None:
            raise DataError("the reward model's tokenizer has no chat template; --text judges prompts as text")
        said: list[Message] = []
        for turn, completion in zip(turns, row["completions"], strict=True):
            assert not isinstance(turn, str)
            said += [*turn, {"role": "assistant", "content": completion}]
        text = self.tokenizer.apply_chat_template(said, tokenize=False)
        templated: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return templated


def win_rates(first: Judged, second: Judged) -> list[WinRate]:
    """
    Over all prompts, and where the first model's completion is shorter, alike in length and longer: a model that wins
    only where it says more has won by saying more. Raises DataError where the two answer other prompts.
    """
    if [(row["row"], row["sample"]) for row in first.rows] != [(row["row"], row["sample"]) for row in second.rows]:
        raise DataError(f"{first.name} and {second.name} answer other prompts, or not as often; generate both alike")
    wins = (first.rewards > second.rewards) + 0.5 * (first.rewards == second.rewards)
    lengths, others = first.tokens, second.tokens
    alike = np.abs(lengths - others) <= ALIKE * np.maximum(lengths, others)
    parts = {
        "all": np.ones(len(wins), dtype=bool),
        "shorter": ~alike & (lengths < others),
        "alike in length": alike,
        "longer": ~alike & (lengths > others),
    }
    return [
        WinRate(name, int(part.sum()), clustered_mean(wins[part], first.prompts[part]).clipped(0.0, 1.0))
        for name, part in parts.items()
    ]


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))
