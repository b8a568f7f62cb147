"""Figures, drawn as SVG: lines, points with error bars, histograms and bars. Colours are the page's (page.css)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fpo.report.axes import Axis, axis
from fpo.report.drawing import (
    BAR,
    BOTTOM,
    HEIGHT,
    LONG,
    NAMES,
    RIGHT,
    SHORT,
    TOP,
    WIDTH,
    Mark,
    axis_label,
    band,
    box,
    columns,
    curve,
    dot,
    drawing,
    error_bar,
    frame,
    guide,
    marked,
    shortened,
    words,
    x_axis,
    y_axis,
)
from fpo.report.tables import Column, Table
from fpo.report.words import plain, said

COLOURS = 8
"""In page.css; further series repeat them, dashed."""

Palette = Mapping[str, int]
"""Number of each series on a page: its colour is the same in all figures."""


@dataclass(frozen=True)
class Series:
    """One line, and the band around it where `low` and `high` are given."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclass(frozen=True)
class Line:
    """Curves, such as a metric by step for each run."""

    title: str
    x: str
    y: str
    series: Sequence[Series]

    @property
    def series_names(self) -> list[str]:
        return [one.name for one in self.series]

    def table(self) -> Table:
        """A row for each x, a column for each series."""
        places = sorted({x for one in self.series for x in one.x})
        values = [dict(zip(one.x, one.y, strict=True)) for one in self.series]
        rows = [{"x": x, **{str(i): own.get(x) for i, own in enumerate(values)}} for x in places]
        columns = [Column("x", self.x), *(Column(str(i), one.name, ".6g") for i, one in enumerate(self.series))]
        return Table(self.title, columns, rows)

    def svg(self, palette: Palette | None = None) -> str:
        x = x_axis(value for one in self.series for value in one.x)
        y = y_axis(value for one in self.series for value in (*one.y, *one.low, *one.high))
        marks = [self._mark(one, x, y, palette) for one in self.series]
        return drawing(self.title, HEIGHT, frame(x, y, self.x, self.y), *marks)

    def _mark(self, one: Series, x: Axis, y: Axis, palette: Palette | None) -> str:
        last = next((value for value in reversed(one.y) if value is not None), None)
        mark = Mark(one.name, colour(one.name, self.series_names, palette), f"{one.name}: {said(last)} at the end")
        around = band(x, y, one.x, one.low, one.high) if one.low and one.high else ""
        return marked(mark, around, *curve(x, y, one.x, one.y))


@dataclass(frozen=True)
class Point:
    """One mark, with error bars where ends are given."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    """Ends along y."""
    x_low: float | None = None
    x_high: float | None = None
    series: str | None = None
    """What it is coloured as; else it is one of many."""


@dataclass(frozen=True)
class Scatter:
    """Points, such as drift over gap for each feature."""

    title: str
    x: str
    y: str
    points: Sequence[Point]
    trend: tuple[float, float] | None = None
    """Intercept and slope of a line through them."""
    diagonal: bool = False
    """Whether y = x is drawn, too."""

    @property
    def series_names(self) -> list[str]:
        return list(dict.fromkeys(point.series for point in self.points if point.series is not None))

    def table(self) -> Table:
        ends = {
            "low": f"{self.y}, low",
            "high": f"{self.y}, high",
            "x_low": f"{self.x}, low",
            "x_high": f"{self.x}, high",
        }
        rows = [vars(point) for point in self.points]
        given = [Column(key, label) for key, label in ends.items() if any(row[key] is not None for row in rows)]
        columns = [Column("name", " "), Column("x", self.x), Column("y", self.y), *given]
        return Table(self.title, columns, rows, series="series")

    def svg(self, palette: Palette | None = None) -> str:
        x = x_axis(value for point in self.points for value in (point.x, point.x_low, point.x_high))
        y = y_axis(value for point in self.points for value in (point.y, point.low, point.high))
        guides = [guide(x, y, 0, 1, "diagonal")] if self.diagonal else []
        guides += [guide(x, y, *self.trend, "trend")] if self.trend else []
        marks = [self._mark(point, x, y, palette) for point in self.points]
        return drawing(self.title, HEIGHT, frame(x, y, self.x, self.y), *guides, *marks)

    def _mark(self, point: Point, x: Axis, y: Axis, palette: Palette | None) -> str:
        says = f"{point.name}: {self.x} {said(point.x)}, {self.y} {said(point.y)}"
        left, top = x.place(point.x), y.place(point.y)
        shapes = [dot(left, top)]
        if point.low is not None and point.high is not None:
            shapes.insert(0, error_bar(left, y.place(point.low), left, y.place(point.high)))
        if point.x_low is not None and point.x_high is not None:
            shapes.insert(0, error_bar(x.place(point.x_low), top, x.place(point.x_high), top))
        return marked(Mark(point.series, colour(point.series, self.series_names, palette), says), *shapes)


@dataclass(frozen=True)
class Bins:
    """Counts between edges, of which there is one more."""

    name: str
    edges: Sequence[float]
    counts: Sequence[float]


@dataclass(frozen=True)
class Histogram:
    """How values are spread, for one or several sides over another."""

    title: str
    x: str
    bins: Sequence[Bins]
    y: str = "count"

    @property
    def series_names(self) -> list[str]:
        return [one.name for one in self.bins]

    def table(self) -> Table:
        rows = [
            {"name": one.name, "from": low, "to": high, "count": count}
            for one in self.bins
            for (low, high), count in zip(pairwise(one.edges), one.counts, strict=True)
        ]
        columns = [Column("name", " "), Column("from"), Column("to"), Column("count", self.y)]
        return Table(self.title, columns, rows, series="name")

    def svg(self, palette: Palette | None = None) -> str:
        x = x_axis(edge for one in self.bins for edge in one.edges)
        y = y_axis((count for one in self.bins for count in one.counts), with_zero=True)
        marks = [
            self._mark(one.name, low, high, count, x, y, palette)
            for one in self.bins
            for (low, high), count in zip(pairwise(one.edges), one.counts, strict=True)
        ]
        return drawing(self.title, HEIGHT, frame(x, y, self.x, self.y), *marks)

    def _mark(self, name: str, low: float, high: float, count: float, x: Axis, y: Axis, palette: Palette | None) -> str:
        mark = Mark(
            name, colour(name, self.series_names, palette), f"{name}, {said(low)} to {said(high)}: {said(count)}"
        )
        return marked(mark, box(x.place(low), y.place(count), x.place(high), y.place(0)))


@dataclass(frozen=True)
class Bar:
    """One value by its name, with an interval where ends are given."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    series: str | None = None


@dataclass(frozen=True)
class Bars:
    """Values beneath each other, so that their names can be long."""

    title: str
    x: str
    bars: Sequence[Bar]

    @property
    def series_names(self) -> list[str]:
        return list(dict.fromkeys(bar.series for bar in self.bars if bar.series is not None))

    def table(self) -> Table:
        columns = [Column("name", " "), Column("value", self.x, interval=("low", "high"))]
        return Table(self.title, columns, [vars(bar) for bar in self.bars], series="series")

    def svg(self, palette: Palette | None = None) -> str:
        height = BAR * (1 + self.names_above)
        bottom = TOP + height * len(self.bars)
        values = [value for bar in self.bars for value in (bar.value, bar.low, bar.high)]
        x = axis(values, RIGHT if self.names_above else NAMES, WIDTH - RIGHT, 7, with_zero=True)
        marks = [self._mark(bar, x, TOP + height * row, palette) for row, bar in enumerate(self.bars)]
        return drawing(self.title, bottom + BOTTOM, *columns(x, TOP, bottom), axis_label(self.x, x, bottom), *marks)

    @property
    def names_above(self) -> bool:
        """Whether one is too long to stand before its bar."""
        return any(len(plain(bar.name)) > SHORT for bar in self.bars)

    def _mark(self, bar: Bar, x: Axis, top: float, palette: Palette | None) -> str:
        if self.names_above:
            name = words(shortened(bar.name, LONG), x.start + 4, top + BAR - 5, "start")
            top += BAR
        else:
            name = words(bar.name, NAMES - 8, top + BAR / 2 + 4, "end")
        left, right = sorted((x.place(0), x.place(bar.value)))
        shapes = [name, box(left, top + 3, right, top + BAR - 3)]
        if bar.low is not None and bar.high is not None:
            shapes.append(error_bar(x.place(bar.low), top + BAR / 2, x.place(bar.high), top + BAR / 2))
        mark = Mark(bar.series, colour(bar.series, self.series_names, palette), f"{bar.name}: {said(bar.value)}")
        return marked(mark, *shapes)


Figure = Line | Scatter | Histogram | Bars


def colour(series: str | None, names: Sequence[str], palette: Palette | None) -> str:
    """The classes of a mark: its colour, and its dashes where colours come round again."""
    number = 0 if series is None else (palette or {name: i for i, name in enumerate(names)})[series]
    return f"mark c{number % COLOURS} d{number // COLOURS % 3}"
