"""Figures: where ticks and marks stand, and that the table under each has its numbers."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_pages import HOSTILE

from fpo.report import Bar, Bars, Bins, Histogram, Line, Point, Scatter, Series
from fpo.report.axes import MINUS, axis, nice_step

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False)


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_an_axis_shows_all_values_and_has_a_few_ticks(values):
    one = axis(values, 0, 100, 7)
    assert all(-1e-6 <= one.place(value) <= 100 + 1e-6 for value in values)
    assert 1 <= len(one.ticks()) <= 8
    assert len({one.written(tick) for tick in one.ticks()}) == len(one.ticks())


@pytest.mark.parametrize(("least", "step"), [(0.13, 0.2), (0.2, 0.2), (0.21, 0.5), (51, 100), (1, 1)])
def test_ticks_are_one_two_or_five_apart(least, step):
    assert nice_step(least) == pytest.approx(step)


def test_ticks_are_written_as_people_write_them():
    assert [axis([-1, 1], 0, 1, 4).written(tick) for tick in axis([-1, 1], 0, 1, 4).ticks()] == [f"{MINUS}1", "0", "1"]
    thousands = axis([0, 50_000], 0, 1, 5)
    assert [thousands.written(tick) for tick in thousands.ticks()] == ["0", "20k", "40k"]


LINE = Line("loss", "step", "nats", [Series("a", [1, 2, 3], [0.5, None, 0.3]), Series("b", [2], [0.4], [0.3], [0.6])])
SCATTER = Scatter("gap", "gap", "drift", [Point("f1", 1.0, 2.0, 1.5, 2.5), Point(HOSTILE, 3.0, 4.0)], (1.0, 1.0), True)
HISTOGRAM = Histogram("acts", "activation", [Bins("chosen", [0, 1, 2], [3, 5]), Bins("rejected", [0, 1, 2], [1, 0])])
BARS = Bars("d", "effect", [Bar("one", 0.5, 0.4, 0.6), Bar("two", -0.5)])
ALL = [LINE, SCATTER, HISTOGRAM, BARS]


@pytest.mark.parametrize("figure", ALL, ids=lambda figure: type(figure).__name__)
def test_a_drawing_is_sound_xml_with_a_name_and_a_title_per_mark(figure):
    drawn = ElementTree.fromstring(figure.svg())
    assert (drawn.get("role"), drawn.get("aria-label")) == ("img", figure.title)
    marks = [one for one in drawn.iter("g") if (one.get("class") or "").startswith("mark")]
    assert len(marks) == {"Line": 2, "Scatter": 2, "Histogram": 4, "Bars": 2}[type(figure).__name__]
    assert all(mark[0].tag == "title" and mark[0].text for mark in marks)


def test_a_line_breaks_where_a_value_is_missing_and_its_table_says_so():
    """1 and 3 stand alone, so they are marks and no line."""
    assert LINE.svg().count("<circle") == 3
    assert 'class="curve"' not in LINE.svg()
    assert LINE.table().text() == "step    a    b\n   1  0.5    -\n   2    -  0.4\n   3  0.3    -"


def test_points_bars_and_bins_are_in_their_tables():
    assert [row["y"] for row in SCATTER.table().rows] == [2.0, 4.0]
    assert [column.heading for column in SCATTER.table().columns][3:] == ["drift, low", "drift, high"]
    assert "0.5 [0.4, 0.6]" in BARS.table().text()
    assert [row["count"] for row in HISTOGRAM.table().rows] == [3, 5, 1, 0]


def test_bars_begin_at_zero():
    """Both are half a unit long, to either side of the line at 0."""
    boxes = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', BARS.svg())
    (left, width), (other_left, other_width) = [tuple(map(float, box)) for box in boxes]
    assert width == pytest.approx(other_width, abs=0.11)
    assert left == pytest.approx(other_left + other_width, abs=0.11)
    zero = re.search(r'<line x1="([\d.]+)"[^>]*class="zero"', BARS.svg())
    assert zero is not None
    assert left == float(zero[1])


def test_a_trend_is_drawn_as_far_as_it_stays_within():
    """y = 1 + x passes through both points, so its line has their places in the drawing on it."""
    drawn = SCATTER.svg()
    x1, y1, x2, y2 = map(float, re.findall(r'"(-?[\d.]+)"', re.search(r'<line ([^>]*)class="trend"', drawn)[1]))
    for cx, cy in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn):
        assert y1 + (y2 - y1) * (float(cx) - x1) / (x2 - x1) == pytest.approx(float(cy), abs=0.2)


def test_long_names_stand_above_their_bars():
    short, long = Bars("b", "x", [Bar("a", 1)]), Bars("b", "x", [Bar("a name of many words", 1)])
    assert 'text-anchor="end">a</text>' in short.svg()
    assert 'text-anchor="start">a name of many words</text>' in long.svg()


def test_nothing_to_draw_is_an_empty_frame():
    for empty in (Line("l", "x", "y", []), Scatter("s", "x", "y", []), Histogram("h", "x", []), Bars("b", "x", [])):
        ElementTree.fromstring(empty.svg())
        assert empty.table().rows == []
