"""Axes: what range they show, where their ticks are and how those are written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

MINUS = "\N{MINUS SIGN}"
TINY = 1e-290  # of what is smaller no tenth is a float of full precision
ROOM = 0.04
"""Of the range, on both sides of what is drawn."""


class Axis(NamedTuple):
    """A range of values laid out from one place of the drawing to another."""

    low: float
    high: float
    start: float
    end: float
    step: float
    """Between ticks."""

    def place(self, value: float) -> float:
        """Where a value stands in the drawing."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [number * self.step for number in range(first, last + 1)]

    def written(self, tick: float) -> str:
        """With as many digits as tell one tick from the next."""
        largest = max(abs(self.low), abs(self.high))
        if self.step >= 1e9 or self.step < 1e-4:
            return f"{tick:.3g}"
        for size, letter in ((1e6, "M"), (1e3, "k")):
            if largest >= 10 * size and tick:
                return f"{tick / size:g}{letter}".replace("-", MINUS)
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        return f"{round(tick, digits) + 0.0:.{digits}f}".replace("-", MINUS)


def axis(values: Iterable[float | None], start: float, end: float, most: int, with_zero: bool = False) -> Axis:
    """
    An axis that shows all of these.

    start, end  places in the drawing
    most        ticks, about
    with_zero   0 belongs to what is shown, as under bars
    """
    seen = [value for value in values if value is not None and math.isfinite(value)] or [0.0]
    low, high = (min([*seen, 0.0]), max([*seen, 0.0])) if with_zero else (min(seen), max(seen))
    if high - low < TINY:
        half = (abs(low) if abs(low) > TINY else 1) / 2
        low, high = low - half, high + half
    room = ROOM * (high - low)
    low = low if with_zero and low == 0 else low - room
    high = high if with_zero and high == 0 else high + room
    return Axis(low, high, start, end, nice_step((high - low) / most))


def nice_step(least: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
