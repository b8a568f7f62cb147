"""How two things that were observed together go together."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from fpo.evaluation.estimates import FEWEST, Mean


def pearson(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], n: int | None = None) -> Mean:
    """Linear correlation, its interval by Fisher's z: se 1 / sqrt(n - 3) of `n` independent observations, or all."""
    return _interval(_correlation(x, y), len(x) if n is None else n, variance=1.0)


def spearman(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], n: int | None = None) -> Mean:
    """
    Rank correlation, ties sharing their ranks' mean; se sqrt((1 + r^2 / 2) / (n - 3)), Bonett and Wright 2000,
    https://doi.org/10.1007/BF02294183.
    """
    found = _correlation(ranks(x), ranks(y))
    return _interval(found, len(x) if n is None else n, variance=1 + found**2 / 2)


def ranks(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """From 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: np.ndarray = (last - (counts - 1) / 2)[place]
    return shared


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """NaN where one of them never differs."""
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 0 else math.nan


def _interval(r: float, n: int, variance: float) -> Mean:
    if math.isnan(r) or n < FEWEST or abs(r) >= 1:
        return Mean(r, math.nan, math.nan)
    reach = 1.959964 * math.sqrt(variance / (n - 3))
    return Mean(r, math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach))
