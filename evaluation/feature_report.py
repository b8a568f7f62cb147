"""
What `fpo features CACHE` says: gaps, what they come to, parts of the data, pairs to look at. A report is numbers and
words that JSON can hold; whatever shows them, in a terminal or on a page, shows these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from fpo.errors import CacheMissing
from fpo.evaluation.breakdown import Part, topics
from fpo.evaluation.examples import Example, ExampleReader
from fpo.evaluation.gaps import MIN_PROMPTS, Gaps, feature_gaps
from fpo.evaluation.labels import Names
from fpo.evaluation.pairs import PAIRING, Pairs, Progress, read_gaps
from fpo.evaluation.prediction import (
    Predictions,
    common_features,
    feature_design,
    length_design,
    predictions,
    sampled_pairs,
)
from fpo.evaluation.top_pairs import TopPairs
from fpo.recipe import Recipe
from fpo.store import Cache, Spec, covers, look_at_columns

RATE = 0.05
"""Of false discoveries among those that a report calls so."""
PART_TOP = 3
"""Features of a part that are shown on each side besides those of all pairs."""

Lean = Literal["chosen", "rejected"]


class FeatureRow(NamedTuple):
    """One feature over all pairs; see `gaps` for what the numbers are."""

    feature: int
    label: str | None
    link: str | None
    leans: Lean
    gap: float
    low: float
    high: float
    d: float | None
    z: float | None
    p: float | None
    adjusted_p: float | None
    halves: tuple[float, float]
    sign_holds: bool
    fires_chosen: float
    fires_rejected: float
    chosen: float
    rejected: float
    """Mean activations, of which the gap is the difference."""
    pairs: int
    prompts: int
    equal_length: float
    equal_length_low: float
    equal_length_high: float
    cut: float


class PartFeature(NamedTuple):
    """One feature over the pairs of a part."""

    feature: int
    gap: float
    low: float
    high: float
    d: float | None
    adjusted_p: float | None
    top: bool
    """Whether it is among the surest of this part."""


class PartRow(NamedTuple):
    """Some of the pairs, and the features that were looked at in them."""

    kind: str
    name: str
    label: str | None
    link: str | None
    share: float
    pairs: int
    prompts: int
    discoveries: int
    features: tuple[PartFeature, ...]


class FeatureReport(NamedTuple):
    """One column of features of a cache."""

    cache: str
    manifest: str
    hookpoint: str
    sae: str | None
    """What its maker called it."""
    d_sae: int
    top_k: int | str
    pairing: str
    pairs: int
    prompts: int
    tests: int
    min_prompts: int
    rate: float
    leaning_chosen: int
    leaning_rejected: int
    """Discoveries at this rate, by side."""
    chosen_tokens: float
    rejected_tokens: float
    """Mean lengths."""
    lost_share: tuple[float, float]
    """Of chosen and rejected: the share of the squared activations that the top k left out, in the mean."""
    lost_any: tuple[float, float]
    """The share of completions of which it left out anything."""
    prediction: Predictions
    features: tuple[FeatureRow, ...]
    """Chosen-leaning ones, the surest first, then those that lean to the rejected side."""
    parts: tuple[PartRow, ...]
    examples: dict[int, list[Example]]
    """By feature."""
    notes: tuple[str, ...]
    """What is not there, and how to get it."""

    def facts(self) -> dict[str, Any]:
        """The report in JSON types."""
        found: dict[str, Any] = _plain(self)
        return found


class Question(NamedTuple):
    """What is asked of each column of features."""

    top: int
    """Features of each side."""
    examples: int = 0
    """Pairs of each of them; needs a recipe."""
    recipe: Recipe | None = None
    """Whose reference and tokenizer show the pairs."""
    sources: Sequence[Part] = ()
    note: str | None = None
    """What to say of it."""


def feature_columns(cache: Cache, hookpoint: str | None = None) -> list[Spec]:
    """
    The columns of features of completions, at this hookpoint or at all; of two of one SAE the fuller one.

    Raises CacheMissing where there is none.
    """
    held = [column.spec for column in cache.held_columns() if column.spec["kind"] == "features"]
    fullest = [spec for spec in held if not any(other != spec and covers(other, spec) for other in held)]
    found = [spec for spec in fullest if hookpoint in (None, spec["hookpoint"])]
    if not found:
        if not held:
            raise CacheMissing(
                f"cache {cache.key[:12]} has no features; add them with: fpo cache RECIPE, whose `features` name an SAE"
            )
        there = ", ".join(sorted({spec["hookpoint"] for spec in held}))
        raise CacheMissing(f"cache {cache.key[:12]} has no features at {hookpoint}; it has them at {there}")
    return found


def sae_name(cache: Cache, spec: Spec) -> str | None:
    """What the maker of a column called its SAE: for people, since only the digest of its weights binds."""
    inputs = [column.extent.inputs for column in look_at_columns(cache.folder, cache.key) if column.spec == spec]
    name = inputs[0].get("sae") if inputs else None
    return name if isinstance(name, str) else None


def reads(cache: Cache, spec: Spec) -> int:
    """How many groups are read for a report, pairs apart: as `scored` counts them."""
    with_topics = _prompt_column(cache, spec) is not None
    return cache.n_groups * (2 + 2 * with_topics)


def feature_report(
    cache: Cache,
    spec: Spec,
    pairs: Pairs,
    question: Question,
    names: Names,
    scored: Progress = lambda groups: None,
) -> FeatureReport:
    """
    All that the pairs of a cache say about the features of one column.

    pairs   `read_pairs` of the cache
    scored  is told of each group that is read
    """
    reader = None
    if question.recipe is not None and question.examples:
        reader = ExampleReader(question.recipe, cache, spec)
    prompts = _prompt_column(cache, spec)
    cache.read_columns([spec] if prompts is None else [spec, prompts])
    d_sae = int(spec["d_sae"])
    parts = [] if prompts is None else topics(cache, 1, d_sae, pairs, scored)
    parts += question.sources
    cache.read_columns([spec])
    gaps, *of_parts = feature_gaps(cache, 0, d_sae, [pairs, *(pairs.among(part.rows) for part in parts)], scored)
    shown = _surest(gaps, question.top)
    tops = TopPairs(pairs, shown, np.sign(gaps.gap.z[shown]).astype(np.int64), question.examples)
    rows, common = sampled_pairs(pairs), common_features(gaps.n_fired)
    design = feature_design(tops.watching(read_gaps(cache, 0, pairs, scored=scored)), pairs, rows, common)
    found = gaps.discoveries(RATE)
    tokens = pairs.weight @ pairs.tokens
    return FeatureReport(
        cache=cache.key,
        manifest=cache.digest,
        hookpoint=spec["hookpoint"],
        sae=sae_name(cache, spec),
        d_sae=d_sae,
        top_k=spec["top_k"],
        pairing=PAIRING,
        pairs=gaps.n_pairs,
        prompts=gaps.n_prompts,
        tests=gaps.n_tests,
        min_prompts=MIN_PROMPTS,
        rate=RATE,
        leaning_chosen=int((gaps.gap.value[found] > 0).sum()),
        leaning_rejected=int((gaps.gap.value[found] < 0).sum()),
        chosen_tokens=float(tokens[0]),
        rejected_tokens=float(tokens[1]),
        lost_share=gaps.lost_share,
        lost_any=gaps.lost_any,
        prediction=predictions(design, length_design(pairs, rows)),
        features=tuple(_row(gaps, feature, names) for feature in shown.tolist()),
        parts=tuple(_part(part, own, pairs, shown, names) for part, own in zip(parts, of_parts, strict=True)),
        examples={} if reader is None else reader.examples(pairs, tops.found()),
        notes=tuple(note for note in (question.note, names.note) if note),
    )


def _prompt_column(cache: Cache, spec: Spec) -> Spec | None:
    """The column of the same SAE's features of the prompts, where the cache has it."""
    held = [column.spec for column in cache.held_columns() if column.spec["kind"] == "prompt_features"]
    return next((one for one in held if {**one, "kind": "features", "top_k": 0} == {**spec, "top_k": 0}), None)


def _surest(gaps: Gaps, top: int) -> Int[np.ndarray, " n"]:
    """Those of the largest z that were tested: so many that lean to the chosen side, then to the rejected one."""
    z = np.where(gaps.tested, gaps.gap.z, 0.0)
    order = np.argsort(-z, kind="stable")
    chosen, rejected = order[z[order] > 0][:top], order[z[order] < 0][::-1][:top]
    return np.concatenate([chosen, rejected])


def _row(gaps: Gaps, feature: int, names: Names) -> FeatureRow:
    gap, level = gaps.gap, gaps.equal_length
    value, reach = float(gap.value[feature]), float(gap.reach[feature])
    at_equal, its_reach = float(level.value[feature]), float(level.reach[feature])
    return FeatureRow(
        feature=feature,
        label=names.label(feature),
        link=names.link(feature),
        leans="chosen" if value > 0 else "rejected",
        gap=value,
        low=value - reach,
        high=value + reach,
        d=_known(gaps.effect[feature]),
        z=_known(gap.z[feature]),
        p=_known(gaps.p[feature]),
        adjusted_p=_known(gaps.adjusted[feature]),
        halves=(float(gaps.halves[0, feature]), float(gaps.halves[1, feature])),
        sign_holds=bool(gaps.sign_holds[feature]),
        fires_chosen=float(gaps.fires[0, feature]),
        fires_rejected=float(gaps.fires[1, feature]),
        chosen=float(gaps.acts[0, feature]),
        rejected=float(gaps.acts[1, feature]),
        pairs=int(gaps.n_fired[feature]),
        prompts=int(gaps.n_prompts_fired[feature]),
        equal_length=at_equal,
        equal_length_low=at_equal - its_reach,
        equal_length_high=at_equal + its_reach,
        cut=float(gaps.cut[feature]),
    )


def _part(part: Part, gaps: Gaps, pairs: Pairs, shown: Int[np.ndarray, " n"], names: Names) -> PartRow:
    own = set(_surest(gaps, PART_TOP).tolist())
    features = [*shown.tolist(), *sorted(own - set(shown.tolist()))]
    topic = int(part.name) if part.kind == "topic" else None
    return PartRow(
        kind=part.kind,
        name=part.name,
        label=None if topic is None else names.label(topic),
        link=None if topic is None else names.link(topic),
        share=float(pairs.weight[part.rows].sum()),
        pairs=gaps.n_pairs,
        prompts=gaps.n_prompts,
        discoveries=len(gaps.discoveries(RATE)),
        features=tuple(
            PartFeature(
                feature=feature,
                gap=float(gaps.gap.value[feature]),
                low=float(gaps.gap.value[feature] - gaps.gap.reach[feature]),
                high=float(gaps.gap.value[feature] + gaps.gap.reach[feature]),
                d=_known(gaps.effect[feature]),
                adjusted_p=_known(gaps.adjusted[feature]),
                top=feature in own,
            )
            for feature in features
        ),
    )


def _known(value: float) -> float | None:
    """JSON knows no infinity and nothing that is no number."""
    return float(value) if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Named tuples as objects, tuples as lists."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
