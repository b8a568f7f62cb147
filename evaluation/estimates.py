"""Means of what was observed, and how far chance reaches where observations share a prompt."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from fpo.evaluation.significance import t_quantile

FEWEST = 10
"""Independent observations from which on an interval is told."""


class Mean(NamedTuple):
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def clipped(self, low: float, high: float) -> Mean:
        """The interval within what the mean can be."""
        return Mean(self.value, max(self.low, low), min(self.high, high))


def clustered_mean(values: Float[np.ndarray, " N"], clusters: Shaped[np.ndarray, " N"]) -> Mean:
    """
    Of N observations, of which those of one cluster may depend on each other: of C clusters

        se^2 = C / (C - 1) sum over clusters of ( sum over a cluster of (value - mean) / N )^2

    Liang and Zeger 1986, https://doi.org/10.1093/biomet/73.1.13, and Student's t of C - 1 degrees of freedom. The
    interval is NaN below FEWEST clusters, the mean, too, where there is none.
    """
    if len(values) == 0:
        return Mean(np.nan, np.nan, np.nan)
    mean = float(values.mean())
    _, place = np.unique(clusters, return_inverse=True)
    count = int(place.max()) + 1
    if count < FEWEST:
        return Mean(mean, np.nan, np.nan)
    sums = np.bincount(place, values - mean, minlength=count) / len(values)
    reach = t_quantile(count - 1) * float(np.sqrt(count / (count - 1) * (sums**2).sum()))
    return Mean(mean, mean - reach, mean + reach)
