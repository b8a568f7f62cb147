"""Pairs side by side, each token as warm as a feature is active on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fpo.report.markup import element
from fpo.report.words import escaped, plain

SHOWN_FROM = 0.05
"""Of the largest activation: below, a token stays cold."""


@dataclass(frozen=True)
class Passage:
    """A stretch of text."""

    tokens: Sequence[str]
    heat: Sequence[float]
    """On each token, 0 or more; a last one may be missing."""
    note: str = ""
    """What stands above it, such as `mean 0.31, from token 12 of 80`."""

    @property
    def hottest(self) -> float:
        return max(self.heat, default=0.0)

    def spans(self) -> list[str | tuple[str, float]]:
        """The text in few pieces: what is cold as it is, what is warm with its heat to three digits."""
        pieces: list[str | tuple[str, float]] = []
        heats = [*self.heat, *[0.0] * (len(self.tokens) - len(self.heat))]
        for token, heat in zip(self.tokens, heats, strict=True):
            if heat:
                pieces.append((token, float(f"{heat:.3g}")))
            elif pieces and isinstance(pieces[-1], str):
                pieces[-1] += token
            else:
                pieces.append(token)
        return pieces

    def text(self, hottest: float) -> str:
        """For a terminal: what is warm in angle quotes."""
        return "".join(plain(span) if isinstance(span, str) else _marked(*span, hottest) for span in self.spans())


@dataclass(frozen=True)
class Pair:
    """A prompt and what was preferred to what."""

    prompt: str
    chosen: Passage
    rejected: Passage
    note: str = ""


@dataclass(frozen=True)
class Passages:
    """Pairs that one feature tells apart. They are drawn from their JSON when they are opened."""

    title: str
    pairs: Sequence[Pair]
    anchor: str | None = None
    """What links to `#anchor` lead to."""

    def text(self) -> str:
        """For a terminal."""
        lines = [plain(self.title)]
        for pair in self.pairs:
            hottest = max(pair.chosen.hottest, pair.rejected.hottest)
            lines += ["", f"  prompt    {plain(pair.prompt)}"]
            for name, passage in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                note = f"  ({plain(passage.note)})" if passage.note else ""
                lines.append(f"  {name:<10}{passage.text(hottest)}{note}")
        return "\n".join(lines)

    def html(self) -> str:
        """For a page: the JSON, folded up."""
        data = element("script", script_json([_facts(pair) for pair in self.pairs]), type="application/json")
        summary = element("summary", escaped(self.title))
        return element("details", summary, data, class_="passages", id=self.anchor)


def script_json(value: object) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _facts(pair: Pair) -> dict[str, object]:
    """Short, for there may be thousands: of each side its note and then its spans."""
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    return {
        "prompt": pair.prompt,
        **({"note": pair.note} if pair.note else {}),
        **{name: [side.note, *side.spans()] for name, side in sides.items()},
    }


def _marked(token: str, heat: float, hottest: float) -> str:
    if heat < SHOWN_FROM * hottest:
        return plain(token)
    bare = token.lstrip(" ")
    return f"{' ' * (len(token) - len(bare))}«{plain(bare)}»"
