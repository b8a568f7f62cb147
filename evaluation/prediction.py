"""
How well the preference can be told from features at all, from length alone, and from both: logistic regression on the
differences of a pair's two sides, held against pairs of prompts that it has not seen.

The score of a pair is linear in the differences without an intercept, so that exchanging the sides turns its sign. Of a
pair with score s in its own order, the exchanged one has -s: over both orders of all pairs

    AUC = mean over pairs i, j of [s_i + s_j > 0] + [s_i + s_j = 0] / 2

An AUC of which pairs of one prompt stand in two folds is optimistic: what a prompt's completions share then tells their
label. Its error is that of a U-statistic, 2 (h_i - AUC) of pair i with h_i its own mean over j, added up by prompt:
DeLong et al. 1988, https://doi.org/10.2307/2531595, for clusters Obuchowski 1997, https://doi.org/10.2307/2533958.
It takes what was fitted as given. Where features say nothing that is too little: two pairs that test each other enter
twice, which doubles the variance (of 400 pairs with noise alone 83 % of the intervals held 0.5).

Dimension key:  P pairs   K columns   E entries
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from fpo.evaluation.pairs import Pairs, ShardGaps
from fpo.evaluation.significance import t_quantile

FOLDS = 5
MOST_PAIRS = 20_000
MOST_FEATURES = 4_096
"""More pairs are sampled by prompt, of more features those that fire most often are taken: seconds, not hours."""

MOST_DENSE = 2**25
"""Elements of a matrix that is held dense: 256 MiB."""

PENALTIES = (1.0, 10.0, 100.0, 1000.0)
"""Of L2, for columns of root mean square 1 and the sum of the losses; one is chosen inside each training part."""

Product = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class Design(NamedTuple):
    """Sparse differences of pairs, and what each pair counts."""

    row: Int[np.ndarray, " E"]
    column: Int[np.ndarray, " E"]
    value: Float[np.ndarray, " E"]
    weight: Float[np.ndarray, " P"]
    """Mean 1."""
    prompt: Int[np.ndarray, " P"]
    n_columns: int

    def times(self, w: Float[np.ndarray, " K"]) -> Float[np.ndarray, " P"]:
        """The score of every pair."""
        return np.bincount(self.row, self.value * w[self.column], minlength=len(self.weight))

    def transposed_times(self, r: Float[np.ndarray, " P"]) -> Float[np.ndarray, " K"]:
        return np.bincount(self.column, self.value * r[self.row], minlength=self.n_columns)

    def products(self) -> tuple[Product, Product]:
        """`times` and `transposed_times` for many calls: by a dense matrix, where there is little that is zero."""
        size = len(self.weight) * self.n_columns
        if size > MOST_DENSE or 16 * len(self.row) < size:
            return self.times, self.transposed_times
        dense = np.zeros((len(self.weight), self.n_columns))
        dense[self.row, self.column] = self.value
        return (lambda w: np.asarray(dense @ w)), (lambda r: np.asarray(r @ dense))

    def take(self, rows: Bool[np.ndarray, " P"]) -> Design:
        """These pairs alone."""
        renumbered = np.cumsum(rows) - 1
        kept = rows[self.row]
        return Design(
            renumbered[self.row[kept]],
            self.column[kept],
            self.value[kept],
            self.weight[rows],
            self.prompt[rows],
            self.n_columns,
        )

    def scaled(self) -> Design:
        """Columns of root mean square 1, as far as they are not 0."""
        squares = np.bincount(self.column, self.weight[self.row] * self.value**2, minlength=self.n_columns)
        rms = np.sqrt(squares / max(len(self.weight), 1))
        return self._replace(value=self.value / np.where(rms > 0, rms, 1)[self.column])

    def beside(self, other: Design) -> Design:
        """The columns of both."""
        row, value = np.concatenate([self.row, other.row]), np.concatenate([self.value, other.value])
        column = np.concatenate([self.column, other.column + self.n_columns])
        return self._replace(row=row, column=column, value=value, n_columns=self.n_columns + other.n_columns)


class Share(NamedTuple):
    """A probability with its interval."""

    value: float
    low: float
    high: float


class Prediction(NamedTuple):
    """How well held-out preferences are told."""

    auc: Share
    accuracy: Share
    """Share of the pairs whose chosen side has the larger score; equal ones count half."""


class Predictions(NamedTuple):
    """The same pairs and folds, three times."""

    n_pairs: int
    n_features: int
    length: Prediction
    """From the difference of the log lengths."""
    features: Prediction
    both: Prediction


def sampled_pairs(pairs: Pairs, most: int = MOST_PAIRS) -> Int[np.ndarray, " P"]:
    """The pairs of whole prompts, the first by digest: at most so many, or those of one prompt."""
    order = np.argsort(pairs.prompt, kind="stable")
    if len(order) <= most:
        return np.sort(order)
    # Prompts are numbered by digest, which has nothing to do with what they say or where they stand.
    last = max(int(pairs.prompt[order[most]]), 1)
    return np.flatnonzero(pairs.prompt < last)


def common_features(n_fired: Int[np.ndarray, " F"], most: int = MOST_FEATURES) -> Int[np.ndarray, " K"]:
    """Those that fire in most pairs, ascending."""
    return np.sort(np.argsort(-n_fired, kind="stable")[: min(most, int((n_fired > 0).sum()))])


def feature_design(
    shards: Iterable[ShardGaps], pairs: Pairs, rows: Int[np.ndarray, " P"], features: Int[np.ndarray, " K"]
) -> Design:
    """The gaps of these features in these pairs."""
    parts = [
        (np.searchsorted(rows, shard.pair[kept]), np.searchsorted(features, shard.features[shard.place[kept]]), gap)
        for shard in shards
        for kept in [np.isin(shard.pair, rows) & np.isin(shard.features, features)[shard.place]]
        for gap in [shard.gap[kept]]
    ]
    row, column, value = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return _design(row, column, value, pairs, rows, len(features))


def length_design(pairs: Pairs, rows: Int[np.ndarray, " P"]) -> Design:
    """The difference of the log lengths of these pairs."""
    places = np.arange(len(rows))
    return _design(places, np.zeros_like(places), pairs.length_gap[rows], pairs, rows, 1)


def predictions(features: Design, length: Design) -> Predictions:
    """Cross-validated by prompt, `FOLDS` times."""
    folds = fold_of(features.prompt)
    n_features = features.n_columns
    found = [predicted(design, folds) for design in (length, features, features.beside(length))]
    return Predictions(len(features.weight), n_features, *found)


def fold_of(prompt: Int[np.ndarray, " P"], n: int = FOLDS) -> Int[np.ndarray, " P"]:
    """Which fold tests each pair: all pairs of a prompt the same one, prompts in turn."""
    return np.unique(prompt, return_inverse=True)[1] % n


def predicted(design: Design, folds: Int[np.ndarray, " P"]) -> Prediction:
    """How well each fold's preferences are told by what was fitted to the others."""
    scores = np.zeros(len(design.weight))
    scaled = design.scaled()
    for fold in np.unique(folds).tolist():
        train, test = scaled.take(folds != fold), scaled.take(folds == fold)
        scores[folds == fold] = test.times(_fitted(train))
    return Prediction(auc(scores, design.weight, design.prompt), accuracy(scores, design.weight, design.prompt))


def auc(scores: Float[np.ndarray, " P"], weight: Float[np.ndarray, " P"], prompt: Int[np.ndarray, " P"]) -> Share:
    """Area under the curve over both orders of every pair, with its interval by prompt."""
    order = np.argsort(scores, kind="stable")
    below = np.concatenate([[0.0], np.cumsum(weight[order])])
    ranked = scores[order]
    larger = below[-1] - below[np.searchsorted(ranked, -scores, side="right")]
    equal = below[np.searchsorted(ranked, -scores, side="right")] - below[np.searchsorted(ranked, -scores, side="left")]
    own = (larger + equal / 2) / below[-1]
    return _share(own, 2.0, weight, prompt)


def accuracy(scores: Float[np.ndarray, " P"], weight: Float[np.ndarray, " P"], prompt: Int[np.ndarray, " P"]) -> Share:
    """Share of the pairs with a score above 0, those at 0 count half."""
    return _share((np.sign(scores) + 1) / 2, 1.0, weight, prompt)


def fit(
    design: Design, penalty: float, start: Float[np.ndarray, " K"] | None = None, tolerance: float = 1e-3
) -> Float[np.ndarray, " K"]:
    """
    The w of the least sum of weight * -log sigmoid(score) + penalty |w|^2 / 2. The loss is convex: L-BFGS finds it from
    anywhere, to a largest gradient of `tolerance` per root of the pairs.
    """
    if design.n_columns == 0:
        return np.zeros(0)
    w = torch.zeros(design.n_columns, dtype=torch.float64) if start is None else torch.from_numpy(start.copy())
    optimiser = torch.optim.LBFGS(
        [w],
        max_iter=200,
        tolerance_grad=tolerance * float(np.sqrt(len(design.weight))),
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    times, transposed_times = design.products()

    def loss() -> float:
        at = w.numpy()
        scores = times(at)
        wrong = -np.exp(-np.logaddexp(0.0, scores)) * design.weight
        w.grad = torch.from_numpy(transposed_times(wrong) + penalty * at)
        return float(design.weight @ np.logaddexp(0.0, -scores) + penalty * (at @ at) / 2)

    optimiser.step(loss)
    return np.asarray(w.numpy())


def _fitted(train: Design) -> Float[np.ndarray, " K"]:
    """Fitted with the penalty that tells a part of the training prompts best after learning from the others."""
    inner = fold_of(train.prompt) == 0
    if train.n_columns == 1 or inner.all():
        return fit(train, PENALTIES[0])
    learn, check = train.take(~inner), train.take(inner)
    w, tried = None, []
    for penalty in sorted(PENALTIES, reverse=True):
        w = fit(learn, penalty, w)
        tried.append((float(check.weight @ np.logaddexp(0.0, -check.times(w))), penalty, w))
    _, best, start = min(tried, key=lambda one: one[0])
    return fit(train, best, start)


def _share(
    own: Float[np.ndarray, " P"], reach: float, weight: Float[np.ndarray, " P"], prompt: Int[np.ndarray, " P"]
) -> Share:
    """The mean of what each pair adds, with an interval of errors that go together within a prompt, inside 0 to 1."""
    total = weight.sum()
    mean = float(own @ weight / total)
    of_prompts = np.bincount(np.unique(prompt, return_inverse=True)[1], reach * weight * (own - mean) / total)
    n = len(of_prompts)
    error = float(np.sqrt((of_prompts @ of_prompts) * n / max(n - 1, 1)))
    half = t_quantile(max(n - 1, 1)) * error
    return Share(mean, max(mean - half, 0.0), min(mean + half, 1.0))


def _design(
    row: Int[np.ndarray, " E"],
    column: Int[np.ndarray, " E"],
    value: Float[np.ndarray, " E"],
    pairs: Pairs,
    rows: Int[np.ndarray, " P"],
    n_columns: int,
) -> Design:
    weight = pairs.weight[rows]
    return Design(row, column, value, weight / weight.mean(), pairs.prompt[rows], n_columns)
