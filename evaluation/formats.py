"""
Generations in the files that judges read.

    jsonl         ours: a line per completion, with the prompt's own row
    alpaca-eval   AlpacaEval 2's model outputs, one JSON list, merged by `instruction`, the prompt's own text
    arena-hard    Arena-Hard's model answers, v2.0's rows, which v0.1 has been rewritten to
    mt-bench      FastChat's model answers to MT-Bench
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from fpo.errors import DataError
from fpo.evaluation.generate import Generation
from fpo.evaluation.prompts import Prompt

Counts = Callable[[str], int]
"""How many tokens a text has."""


def file_of(
    format: str, prompts: Sequence[Prompt], rows: Sequence[Generation], name: str, made: float, count: Counts
) -> str:
    """
    What stands in the file of one of FORMATS.

    name   of the model, as leaderboards will show it
    made   seconds since 1970
    count  see `token_counter`
    Raises DataError where the prompts lack what the format needs.
    """
    lines = [FORMATS[format](prompts[row.row], row, name, made, count) for row in rows]
    if format == "alpaca-eval":
        return json.dumps(lines, ensure_ascii=False, indent=2) + "\n"
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def check_format(format: str, prompts: Sequence[Prompt], samples: int) -> None:
    """DataError where a file of this format cannot hold so many completions of each prompt: told before any is made."""
    if samples > 1 and format != "jsonl":
        raise DataError(f"--samples {samples}: {format} holds one completion of each prompt; jsonl holds several")
    for number, prompt in enumerate(prompts):
        turns = len(prompt.turns)
        FORMATS[format](prompt, Generation(number, 0, [""] * turns, [0] * turns, [True] * turns), "", 0.0, len)


def token_counter(format: str) -> Counts:
    """
    Arena-Hard's style control compares lengths in tiktoken's gpt-4o tokens, so no other count will do; the other
    formats hold none. Raises DataError where tiktoken or its vocabulary is not at hand.
    """
    if format != "arena-hard":
        return len
    try:
        encoding = import_module("tiktoken").encoding_for_model("gpt-4o")
    except ImportError:
        raise DataError("--format arena-hard: token_len is counted by tiktoken: pip install tiktoken") from None
    except OSError as error:  # requests' errors are
        raise DataError(
            f"--format arena-hard: tiktoken cannot get its gpt-4o vocabulary ({type(error).__name__}); fetch it once "
            "with a network, into $TIKTOKEN_CACHE_DIR"
        ) from None
    return lambda text: len(encoding.encode(text, disallowed_special=()))


def _ours(prompt: Prompt, row: Generation, name: str, made: float, count: Counts) -> dict[str, Any]:
    return {**prompt.row, **row._asdict(), "generator": name}


def _alpaca_eval(prompt: Prompt, row: Generation, name: str, made: float, count: Counts) -> dict[str, Any]:
    dataset = {"dataset": prompt.row["dataset"]} if "dataset" in prompt.row else {}
    return {
        **dataset,
        "instruction": _field(prompt, row, "alpaca-eval", "instruction"),
        "output": _only(row),
        "generator": name,
    }


def _arena_hard(prompt: Prompt, row: Generation, name: str, made: float, count: Counts) -> dict[str, Any]:
    uid = prompt.row.get("uid") or _field(prompt, row, "arena-hard", "question_id")
    asked = prompt.turns[0]
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    answer = _only(row)
    return {
        "uid": uid,
        "ans_id": _identity(name, uid, answer),
        "model": name,
        "messages": [*messages, {"role": "assistant", "content": {"answer": answer}}],
        "tstamp": made,
        "metadata": {"token_len": count(answer), **_markdown(answer)},
    }


def _mt_bench(prompt: Prompt, row: Generation, name: str, made: float, count: Counts) -> dict[str, Any]:
    question = _field(prompt, row, "mt-bench", "question_id")
    return {
        "question_id": question,
        "answer_id": _identity(name, question, *row.completions),
        "model_id": name,
        "choices": [{"index": 0, "turns": row.completions}],
        "tstamp": made,
    }


FORMATS: dict[str, Callable[[Prompt, Generation, str, float, Counts], dict[str, Any]]] = {
    "jsonl": _ours,
    "alpaca-eval": _alpaca_eval,
    "arena-hard": _arena_hard,
    "mt-bench": _mt_bench,
}


def _field(prompt: Prompt, row: Generation, format: str, name: str) -> Any:
    if name not in prompt.row:
        raise DataError(
            f"--format {format}: row {row.row} has no {name}, by which the judge finds its question; take the "
            "benchmark's own file of questions"
        )
    return prompt.row[name]


def _only(row: Generation) -> str:
    if len(row.completions) > 1:
        raise DataError(f"row {row.row} has {len(row.completions)} turns; mt-bench and jsonl alone hold several")
    return row.completions[0]


def _identity(*parts: Any) -> str:
    """Of an answer; the same answer has the same one."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:22]


def _markdown(text: str) -> dict[str, dict[str, int]]:
    """What Arena-Hard's style control counts, outside of blocks of code."""
    for block in re.findall("```([^`]*)```", text):
        text = text.replace(block, "")

    def found(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "header_count": {f"h{level}": found(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": found(r"^\s*\d+\.\s"), "unordered": found(r"^\s*[-*+]\s")},
        "bold_count": {"**": found(r"\*\*[^*\n]+\*\*"), "__": found(r"__[^_\n]+__")},
    }
