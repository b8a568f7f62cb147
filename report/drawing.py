"""What figures are made of: frames with ticks, and marks that say what they are when pointed at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from fpo.report.axes import Axis, axis
from fpo.report.markup import element
from fpo.report.words import escaped, plain

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 72, 16, 12, 50
"""Margins, where ticks and labels stand."""
BAR = 22
"""Height of a bar."""
NAMES, SHORT = 160, 17
"""Width for the names of bars where they stand before them, and the characters that fit."""
LONG = 52
"""Characters of a name that stands above its bar, on a line of its own."""
MARKED = 15
"""Points of a line up to which each gets a mark."""


class Mark(NamedTuple):
    """What a mark is of, how it is coloured and what it says."""

    series: str | None
    class_: str
    says: str


def x_axis(values: Iterable[float | None]) -> Axis:
    return axis(values, LEFT, WIDTH - RIGHT, 8)


def y_axis(values: Iterable[float | None], with_zero: bool = False) -> Axis:
    return axis(values, HEIGHT - BOTTOM, TOP, 7, with_zero)


def drawing(title: str, height: float, *marks: str) -> str:
    """The whole picture; a reader of screens hears its title, and then the table."""
    return element("svg", *marks, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=title)


def frame(x: Axis, y: Axis, x_label: str, y_label: str) -> str:
    """Ticks, a line at zero where it is within, and what the axes are."""
    rows = [
        rule(x.start, y.place(tick), x.end, y.place(tick), "zero" if tick == 0 else "grid")
        + words(y.written(tick), x.start - 8, y.place(tick) + 4, "end")
        for tick in y.ticks()
    ]
    middle = (y.start + y.end) / 2
    label = words(y_label, 15, middle, "middle", "label", turned=True) if y_label else ""
    return element("g", *rows, *columns(x, y.end, y.start), label, axis_label(x_label, x, y.start), class_="frame")


def columns(x: Axis, top: float, bottom: float) -> list[str]:
    """The ticks of a horizontal axis."""
    return [
        rule(x.place(tick), top, x.place(tick), bottom, "zero" if tick == 0 else "grid")
        + words(x.written(tick), x.place(tick), bottom + 18, "middle")
        for tick in x.ticks()
    ]


def axis_label(label: str, x: Axis, bottom: float) -> str:
    return words(label, (x.start + x.end) / 2, bottom + 40, "middle", "label")


def rule(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def words(text: str, x: float, y: float, anchor: str, class_: str | None = None, turned: bool = False) -> str:
    turn = f"rotate(-90 {x:g} {y:g})" if turned else None
    return element("text", escaped(text), x=x, y=y, text_anchor=anchor, class_=class_, transform=turn)


def guide(x: Axis, y: Axis, intercept: float, slope: float, kind: str) -> str:
    """A straight line through all of the frame, as far as it stays within."""
    ends = [x.low, x.high, *((level - intercept) / slope for level in (y.low, y.high) if slope)]
    within = [value for value in ends if x.low <= value <= x.high and _within(y, intercept + slope * value)]
    if not within:
        return ""
    first, last = min(within), max(within)
    return rule(
        *(x.place(first), y.place(intercept + slope * first)), x.place(last), y.place(intercept + slope * last), kind
    )


def marked(mark: Mark, *shapes: str) -> str:
    """Shapes that are one mark."""
    return element("g", element("title", escaped(mark.says)), *shapes, class_=mark.class_, data_series=mark.series)


def dot(x: float, y: float) -> str:
    return element("circle", cx=x, cy=y, r=4)


def curve(x: Axis, y: Axis, places: Sequence[float], values: Sequence[float | None]) -> list[str]:
    """A line, broken where there is no value; with a mark at each of a few."""
    pieces = list(_pieces(x, y, places, values))
    lines = [element("path", d="M" + "L".join(map(_at, piece)), class_="curve") for piece in pieces if len(piece) > 1]
    few = len(places) <= MARKED
    return lines + [dot(*point) for piece in pieces for point in piece if few or len(piece) == 1]


def band(x: Axis, y: Axis, places: Sequence[float], low: Sequence[float | None], high: Sequence[float | None]) -> str:
    """What lies between two lines."""
    known = [(at, a, b) for at, a, b in zip(places, low, high, strict=True) if a is not None and b is not None]
    there = [(x.place(at), y.place(a)) for at, a, _ in known]
    back = [(x.place(at), y.place(b)) for at, _, b in reversed(known)]
    return element("path", d="M" + "L".join(map(_at, [*there, *back])) + "Z", class_="band") if known else ""


def error_bar(x1: float, y1: float, x2: float, y2: float) -> str:
    return rule(x1, y1, x2, y2, "error")


def box(left: float, top: float, right: float, bottom: float) -> str:
    return element("rect", x=left, y=top, width=max(right - left, 0.0), height=max(bottom - top, 0.0))


def shortened(name: str, most: int) -> str:
    """As much of a name as there is room for."""
    text = plain(name)
    return text if len(text) <= most else text[: most - 1] + "…"


def _within(of: Axis, value: float) -> bool:
    return of.low - 1e-9 * (of.high - of.low) <= value <= of.high + 1e-9 * (of.high - of.low)


def _pieces(
    x: Axis, y: Axis, places: Sequence[float], values: Sequence[float | None]
) -> Iterator[list[tuple[float, float]]]:
    pairs = zip(places, values, strict=True)
    for known, piece in groupby(pairs, key=lambda pair: pair[1] is not None):
        if known:
            yield [(x.place(at), y.place(value)) for at, value in piece if value is not None]


def _at(point: tuple[float, float]) -> str:
    return f"{point[0]:.1f} {point[1]:.1f}"
