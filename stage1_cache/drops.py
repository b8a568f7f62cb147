"""
What became of the rows: kept, dropped for a reason, or kept with something that deserves a look; and of the
columns. Nothing is lost in silence: `kept` plus the counts of `dropped` is `read`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

DROPPED = {
    "prompt_fills_max_length": "the prompt alone fills max_length",
    "no_shared_prompt": "there is no prompt turn: an empty prompt, or no first turn that both sides share",
    "empty_completion": "a completion has no token of its own",
    "no_scored_token": "no prompt and a completion of one token, which nothing precedes",
    "nothing_counts": "no token of a completion counts: it is cut away, or data.turns leaves it out",
    "no_completion": "its list of completions is empty",
    "bad_row": "a value that its column cannot hold, or messages that the chat template refuses",
    "no_pair": "it has one completion, and data.transform makes pairs",
    "tie": "its scores are equal, and data.transform goes by them",
    "near": "its scores are nearer than data.transform.min_margin",
    "duplicate": "an earlier row has the same prompt and completions",
}
"""
Why a row is left out, or a completion of a row that keeps others. TRL drops the first, stops at the second, trains on
the next two without a signal; the last five only where the recipe asks for it.
"""

NOTED = {
    "chosen_truncated": "chosen is cut at max_length",
    "rejected_truncated": "rejected is cut at max_length",
    "truncated": "a completion is cut at max_length",
    "prompt_tail_moved": "the prompt's end merges with a completion's beginning, or is rendered otherwise there: it "
    "counts as the completion's, as in TRL, and does no harm",
    "empty_side": "a completion says nothing: its end token alone is scored",
    "repeated": "the same tokens as an earlier pair",
    "identical": "chosen and rejected are the same tokens: their margin is always 0",
    "alike": "two completions are the same tokens",
    "score_against": "chosen has a lower score than rejected",
    "tied": "chosen and rejected have the same score",
    "one_begins_other": "one side begins the other: the implicit prompt ends just before the shorter side",
    "prompt_repeated": "all completions repeat the explicit prompt, which is then there twice",
    "bos_doubled": "the prompt begins with two BOS tokens, of the text or template and of the tokenizer",
}
"""What is counted in rows that are kept, as TRL keeps them."""

EXAMPLES = 5
PARTS = ("prompt", "chosen", "rejected", "completion")
"""Of a row, whose lengths are measured."""
BINS = 24
"""Of a histogram."""
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass
class Finding:
    """How many rows, and the first few of them (their number in the dataset, from 0)."""

    count: int = 0
    rows: list[int] = field(default_factory=list)

    def add(self, row: int) -> None:
        self.count += 1
        if len(self.rows) < EXAMPLES:
            self.rows.append(row)

    @property
    def examples(self) -> str:
        """The rows, for people."""
        return ", ".join(map(str, self.rows)) + (", ..." if self.count > len(self.rows) else "")


@dataclass
class Spread:
    """How a number is spread over rows or completions. Numbers are text, since a manifest holds no floats."""

    quantiles: list[str]
    """At `QUANTILES`."""
    edges: list[str]
    """Of the bins, which are equally wide."""
    counts: list[int]

    @staticmethod
    def of(values: npt.NDArray[Any], most: float | None = None) -> Spread | None:
        """None where there are no numbers; NaN is none. The bins end at `most` and begin at 0, or are as values are."""
        known = values.astype(np.float64)
        known = known[~np.isnan(known)]
        if not len(known):
            return None
        counts, edges = np.histogram(known, bins=BINS, range=None if most is None else (0, most))
        return Spread(_spelled(np.quantile(known, QUANTILES, method="nearest")), _spelled(edges), counts.tolist())

    def line(self) -> str:
        """For people."""
        least, low, middle, high, most = (f"{float(value):,.4g}" for value in self.quantiles)
        return f"{least} to {most} (nine in ten {low} to {high}, the median {middle})"


@dataclass
class DropReport:
    """Counts with examples, by the keys of `DROPPED` and `NOTED`; reasons that never occurred are absent."""

    unit: str = "pairs"
    """What a row is called."""
    read: int = 0
    kept: int = 0
    completions: int = 0
    """Of all rows that are kept."""
    dropped: dict[str, Finding] = field(default_factory=dict)
    left_out: dict[str, Finding] = field(default_factory=dict)
    """Completions that are missing in rows that are kept."""
    noted: dict[str, Finding] = field(default_factory=dict)
    prompt_column: str | None = None
    """The dataset's name of the prompt; None where it is implicit."""
    prompt_tokens: int = 0
    """Of all rows that are kept."""
    unused_columns: list[str] = field(default_factory=list)
    spreads: dict[str, Spread] = field(default_factory=dict)
    """Of what is kept: by what is measured."""

    def drop(self, reason: str, row: int) -> None:
        assert reason in DROPPED
        self.read += 1
        self.dropped.setdefault(reason, Finding()).add(row)

    def leave_out(self, reason: str, row: int) -> None:
        """Count a completion that its row goes on without."""
        assert reason in DROPPED
        self.left_out.setdefault(reason, Finding()).add(row)

    def keep(self, prompt_tokens: int, completions: int) -> None:
        self.read += 1
        self.kept += 1
        self.completions += completions
        self.prompt_tokens += prompt_tokens

    def note(self, what: str, row: int) -> None:
        assert what in NOTED
        self.noted.setdefault(what, Finding()).add(row)

    def of_columns(self, prompt: str | None, unused: Iterable[str]) -> None:
        """Say which column the prompts are read from, if any, and which nothing is read from."""
        self.prompt_column, self.unused_columns = prompt, list(unused)

    def as_dict(self) -> dict[str, Any]:
        """The report in JSON types."""
        return asdict(self)

    @staticmethod
    def from_dict(facts: dict[str, Any]) -> DropReport:
        """The report that `as_dict` wrote."""
        findings = {
            part: {key: Finding(**finding) for key, finding in facts[part].items()}
            for part in ("dropped", "left_out", "noted")
        }
        spreads = {name: Spread(**spread) for name, spread in facts["spreads"].items()}
        return DropReport(**{**facts, **findings, "spreads": spreads})

    def prompt_line(self) -> str:
        """Where the prompts come from, how long they are, and which columns nothing is read from."""
        where = f"column {self.prompt_column}" if self.prompt_column else "implicit (what chosen and rejected share)"
        mean = self.prompt_tokens / max(self.kept, 1)
        unused = f"; columns not used: {', '.join(self.unused_columns)}" if self.unused_columns else ""
        return f"{where}, {mean:.{0 if mean >= 10 else 1}f} tokens on average{unused}"

    def lengths(self) -> dict[str, Spread]:
        """Of tokens, by the part of a row."""
        return {part: self.spreads[f"{part} tokens"] for part in PARTS if f"{part} tokens" in self.spreads}

    def lines(self) -> list[str]:
        """The report for people: the total, then one line per reason to drop or to leave out, and per thing noted."""
        size = f" with {self.completions:,} completions" if self.unit == "groups" else ""
        found = [
            f"  {fate} {finding.count:,}: {meaning} (row {finding.examples})"
            for fate, finding, meaning in self.findings()
        ]
        return [f"{self.kept:,} of {self.read:,} {self.unit} kept{size}", *found]

    def findings(self) -> Iterator[tuple[str, Finding, str]]:
        """What became of rows, how many, and why: of all that occurred, in the order of `DROPPED` and `NOTED`."""
        parts = (("dropped", self.dropped, DROPPED), ("left out", self.left_out, DROPPED), ("noted", self.noted, NOTED))
        for fate, found, meanings in parts:
            yield from ((fate, found[key], meaning) for key, meaning in meanings.items() if key in found)


def _spelled(values: npt.NDArray[np.float64]) -> list[str]:
    return [f"{value:.6g}" for value in values]
