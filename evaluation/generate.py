"""
`fpo generate`: what a model writes to a prompt set, batch by batch. Rows are appended as they are finished; a run that
was killed goes on behind them.

    {"row": 7, "sample": 0, "completions": ["...", "..."], "tokens": [31, 20], "ended": [true, true]}
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from fpo.errors import RunError
from fpo.evaluation.prompts import Encoder, Message, Prompt
from fpo.evaluation.sampling import Engine, Sampling, check_room, uniforms
from fpo.progress import progress_bar


class Generation(NamedTuple):
    """A row: what a model wrote to a prompt, a completion for each of its turns."""

    row: int
    """Its place in the prompt set."""
    sample: int
    completions: list[str]
    """Without special tokens."""
    tokens: list[int]
    """How many each is, with the one that ends it."""
    ended: list[bool]
    """Whether it ended rather than being cut at the longest length."""


def generate(
    prompts: Sequence[Prompt],
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    part: Path,
    *,
    samples: int = 1,
    batch_size: int = 16,
    room: int | None = None,
    facts: dict[str, Any] | None = None,
    today: str | None = None,
) -> list[Generation]:
    """
    Every prompt's completions, in order.

    part     where finished rows are kept; removed by whoever has made use of the result
    samples  completions of each prompt
    room     positions that the model has, None where it names no limit
    today    ISO date that a chat template gets which asks for one
    facts    of the model and the prompts: what a part must have been written with to be gone on with
    Raises DataError where a prompt leaves no room for a token, RunError where the part is of something else.
    """
    encoder = Encoder(tokenizer, today)
    encoder.check(prompts)
    firsts = [encoder.tokens(prompt.turns[0], number) for number, prompt in enumerate(prompts)]
    check_room(firsts, sampling, room)
    header = {**asdict(sampling), "samples": samples, "prompts": _digest(prompts, firsts), **(facts or {})}
    done = _finished(part, header)
    wanted = [(number, sample) for number in range(len(prompts)) for sample in range(samples)]
    # The longest first: what does not fit in memory shows at once.
    order = sorted(wanted, key=lambda one: -len(firsts[one[0]]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # One that was torn is asked whole again: among other rows its padding, and so its rounding, would be another.
    left = [rows for rows in batches if any(one not in done for one in rows)]
    before = len(wanted) - sum(map(len, left))
    started, written = time.monotonic(), 0
    bar = progress_bar(len(wanted), "completions", "generate", initial=before)
    with part.open("a", encoding="utf-8") as file, bar:
        for rows in left:
            for row in _batch(rows, prompts, firsts, engine, encoder, sampling, room):
                file.write(json.dumps(row._asdict(), ensure_ascii=False) + "\n")
                done[row.row, row.sample] = row
                written += sum(row.tokens)
            file.flush()
            os.fsync(file.fileno())
            bar.set_postfix_str(f"{written / (time.monotonic() - started):,.0f} tokens/s")
            bar.update(len(rows))
    return [done[one] for one in wanted]


def _batch(
    rows: Sequence[tuple[int, int]],
    prompts: Sequence[Prompt],
    firsts: Sequence[list[int]],
    engine: Engine,
    encoder: Encoder,
    sampling: Sampling,
    room: int | None,
) -> Iterator[Generation]:
    """Turn by turn; a prompt of fewer turns is done earlier."""
    found = [Generation(number, sample, [], [], []) for number, sample in rows]
    said: list[list[Message]] = [[] for _ in rows]
    for turn in range(max(len(prompts[number].turns) for number, _ in rows)):
        here = [place for place, (number, _) in enumerate(rows) if len(prompts[number].turns) > turn]
        asked = []
        for place in here:
            now = prompts[rows[place][0]].turns[turn]
            if isinstance(now, str):
                asked.append(firsts[rows[place][0]])
                continue
            said[place] += now
            asked.append(encoder.tokens(said[place], rows[place][0]))
        if turn:
            check_room(asked, sampling, room)
        numbers = [uniforms(sampling.seed, *rows[place], turn, sampling.max_new_tokens) for place in here]
        for place, written in zip(here, engine(asked, np.stack(numbers), sampling), strict=True):
            text = encoder.tokenizer.decode(written.tokens, skip_special_tokens=True)
            said[place].append({"role": "assistant", "content": text})
            row = found[place]
            row.completions.append(text)
            row.tokens.append(len(written.tokens))
            row.ended.append(written.ended)
    yield from found


def _digest(prompts: Sequence[Prompt], firsts: Sequence[list[int]]) -> str:
    """Of what is asked, turn by turn, and of the tokens that the tokenizer makes of it."""
    digest = hashlib.sha256()
    for prompt, ids in zip(prompts, firsts, strict=True):
        digest.update(json.dumps([prompt.turns, ids], default=str).encode() + b"\n")
    return f"{len(prompts)}, sha256 {digest.hexdigest()[:16]}"


def _finished(part: Path, header: dict[str, Any]) -> dict[tuple[int, int], Generation]:
    """The rows of an earlier start, which must have been asked for the same; a torn last line is taken off."""
    if not part.exists():
        part.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return {}
    text = part.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    lines = [json.loads(line) for line in whole.splitlines()]
    if not lines:
        part.unlink()
        return _finished(part, header)
    before = lines[0]
    changed = [name for name in header if before.get(name) != header[name]]
    if changed:
        name = changed[0]
        raise RunError(
            f"{part}: begun with {name} {before.get(name)!r}, now it is {header[name]!r}; go on with what it was begun "
            "with, or remove it"
        )
    if len(whole) < len(text):
        os.truncate(part, len(whole))
    rows = [Generation(**line) for line in lines[1:]]
    return {(row.row, row.sample): row for row in rows}
