"""
Means of many features and how far chance reaches: Student's t without tables, and Benjamini-Hochberg.

Dimension key:  F features
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

CONFIDENCE = 0.95
"""Of every interval."""


def normal_score(t: Float[np.ndarray, " F"], df: int) -> Float[np.ndarray, " F"]:
    """
    The normal deviate of the same probability as Student's t of `df` degrees of freedom, to 0.2 % from 10 of them on:

        z = sign(t) (8 df + 1) / (8 df + 3) sqrt( df log(1 + t^2 / df) )

    Wallace 1959, https://doi.org/10.1214/aoms/1177706090.
    """
    return np.asarray(np.sign(t) * (8 * df + 1) / (8 * df + 3) * np.sqrt(df * np.log1p(t**2 / df)))


def t_quantile(df: int) -> float:
    """How many standard errors a two-sided interval of `CONFIDENCE` reaches: `normal_score` the other way round."""
    z = float(torch.special.ndtri(torch.tensor((1 + CONFIDENCE) / 2, dtype=torch.float64)))
    return float(np.sqrt(df * np.expm1((z * (8 * df + 3) / (8 * df + 1)) ** 2 / df)))


def two_sided(z: Float[np.ndarray, " F"]) -> Float[np.ndarray, " F"]:
    """Probability of a normal deviate at least so far from 0 on either side."""
    return np.asarray(torch.special.erfc(torch.from_numpy(np.abs(z) / np.sqrt(2))).numpy())


def false_discovery(p: Float[np.ndarray, " F"]) -> Float[np.ndarray, " F"]:
    """
    Adjusted p: the smallest rate of false discoveries at which each would be one, the smallest of p_j m / j over all
    that stand no better, of m sorted ones (Benjamini and Hochberg 1995). NaN is no test, and stays.
    """
    adjusted = np.full_like(p, np.nan)
    tests = np.flatnonzero(~np.isnan(p))
    order = tests[np.argsort(p[tests], kind="stable")]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted
