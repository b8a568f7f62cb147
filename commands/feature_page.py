"""Feature reports as a page: the gaps in tables and figures, the pairs token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fpo.commands.feature_lines import report_facts
from fpo.report import Bar, Bars, Column, Item, Page, Pair, Passage, Passages, Point, Scatter, Section, Table

if TYPE_CHECKING:
    from fpo.evaluation import FeatureReport
    from fpo.evaluation.examples import Passage as Stretch
    from fpo.evaluation.feature_report import FeatureRow

FEATURES = (
    Column("feature", format="d", link="pairs at", about="its pairs, where some are shown"),
    Column("label", "name", link="link"),
    Column("leans", "leans to"),
    Column("gap", format="+.3g", interval=("low", "high"), about="mean activation of chosen minus rejected"),
    Column("d", format="+.2f", about="gap by the standard deviation of the pairs' gaps"),
    Column("z", format="+.1f", about="gap by its error, as a normal deviate"),
    Column("adjusted_p", "adj. p", ".1e", about="Benjamini-Hochberg over all features that are tested"),
    Column("sign_holds", "halves agree", about="whether both halves of the prompts lean the same way"),
    Column(
        "equal_length",
        "at equal length",
        "+.3g",
        ("equal_length_low", "equal_length_high"),
        about="the gap of a pair whose sides are as long",
    ),
    Column("fires_chosen", "in chosen", ".1%", about="share of the pairs whose chosen completion has it"),
    Column("fires_rejected", "in rejected", ".1%", about="share of the pairs whose rejected completion has it"),
    Column("pairs", format=",", about="pairs of which either side has it"),
    Column("cut", format=".2g", about="how far the gap is at most from that of what the top k left out, too"),
)
PARTS = (
    Column("kind"),
    Column("part", link="part link"),
    Column("share", format=".1%"),
    Column("feature", format="d"),
    Column("label", "name"),
    Column("gap", format="+.3g", interval=("low", "high")),
    Column("d", format="+.2f"),
    Column("adjusted_p", "adj. p", ".1e", about="Benjamini-Hochberg over the features tested in this part"),
    Column("whole", "d of all pairs", "+.2f", about="of features that are among the surest of all pairs"),
)
TOLD = (
    Column("name", "from"),
    Column("auc", "AUC", ".3f", ("auc low", "auc high")),
    Column("accuracy", format=".3f", interval=("accuracy low", "accuracy high")),
)


def features_page(reports: Sequence[FeatureReport]) -> Page:
    """A column of features after the other."""
    first = reports[0]
    several = len(reports) > 1
    sections = [section for report in reports for section in _sections(report, f" at {report.hookpoint}" * several)]
    lead = f"What separates chosen from rejected completions in {first.pairs:,} pairs, as features of an SAE see it."
    return Page(f"Features of cache {first.cache[:12]}", lead, sections, [report.facts() for report in reports])


def _sections(report: FeatureReport, where: str) -> list[Section]:
    facts = Table("", [Column("what", " "), Column("said", " ")], [_fact(*fact) for fact in report_facts(report)])
    items: list[Item] = [facts, *report.notes]
    sections = [Section(f"What was asked{where}", "", items), _told(report, where), _leaning(report, where)]
    if report.parts:
        text = (
            "Topics are features of the prompt, sources what the data calls them. "
            "Beside the surest features of all pairs stand those of each part."
        )
        sections.append(
            Section(f"Parts of the pairs{where}", text, [Table("", _columns(PARTS, report), _part_rows(report))])
        )
    if report.examples:
        text = (
            "The pairs of the largest gaps, each of another prompt. A token is as warm as the feature is active on it; "
            "means are over all tokens that count."
        )
        shown = [_passages(report, row) for row in report.features if report.examples.get(row.feature)]
        sections.append(Section(f"Pairs{where}", text, shown))
    return sections


def _told(report: FeatureReport, where: str) -> Section:
    prediction = report.prediction
    named = {"length": prediction.length, "features": prediction.features, "both": prediction.both}
    rows = [
        {"name": name, **_share("auc", own.auc._asdict()), **_share("accuracy", own.accuracy._asdict())}
        for name, own in named.items()
    ]
    bars = [Bar(name, own.auc.value, own.auc.low, own.auc.high) for name, own in named.items()]
    text = (
        f"Logistic regression on {prediction.n_features:,} features, on length, and on both; "
        f"{prediction.n_pairs:,} pairs, held out by prompt. 0.5 is chance."
    )
    return Section(
        f"How well the preference is told{where}", text, [Bars("Held-out AUC", "AUC", bars), Table("", TOLD, rows)]
    )


def _leaning(report: FeatureReport, where: str) -> Section:
    points = [
        Point(
            _name(row.feature, row.label),
            row.gap,
            row.equal_length,
            row.equal_length_low,
            row.equal_length_high,
            row.low,
            row.high,
            f"leans to {row.leans}",
        )
        for row in report.features
    ]
    shown = {feature for feature, own in report.examples.items() if own}
    rows = [
        {**row._asdict(), "pairs at": f"#{_anchor(report, row.feature)}" if row.feature in shown else None}
        for row in report.features
    ]
    figure = Scatter("Gap, and what is left of it at equal length", "gap", "at equal length", points, diagonal=True)
    text = f"The surest of {report.tests:,} that fire for {report.min_prompts} prompts or more, with 95 % intervals."
    items: list[Item] = (
        [figure, Table("", _columns(FEATURES, report), rows)] if points else ["None fires often enough."]
    )
    return Section(f"Features that lean{where}", text, items)


def _columns(columns: Sequence[Column], report: FeatureReport) -> list[Column]:
    """Those for which there is anything: names, links to pages, and pairs."""
    named = any(row.label or row.link for row in report.features)
    return [column for column in columns if named or column.key != "label"]


def _part_rows(report: FeatureReport) -> list[dict[str, Any]]:
    """A row for each part and feature."""
    whole = {row.feature: row for row in report.features}
    return [
        {
            **one._asdict(),
            "kind": part.kind,
            "part": part.name if part.label is None else f"{part.name} {part.label}",
            "part link": part.link,
            "share": part.share,
            "label": whole[one.feature].label if one.feature in whole else None,
            "whole": whole[one.feature].d if one.feature in whole else None,
        }
        for part in report.parts
        for one in part.features
        if one.adjusted_p is not None
    ]


def _passages(report: FeatureReport, row: FeatureRow) -> Passages:
    pairs = [
        Pair(
            one.prompt,
            _passage(one.chosen, one.chosen_cached),
            _passage(one.rejected, one.rejected_cached),
            f"group {one.group_id}",
        )
        for one in report.examples[row.feature]
    ]
    return Passages(f"{_name(row.feature, row.label)}, leans to {row.leans}", pairs, _anchor(report, row.feature))


def _passage(stretch: Stretch, cached: float) -> Passage:
    kept = "" if cached or not stretch.act else ", which the top k left out"
    place = "" if len(stretch.tokens) == stretch.of else f", from token {stretch.start} of {stretch.of}"
    return Passage(stretch.tokens, stretch.heat, f"mean {stretch.act:.3g}{kept}{place}")


def _name(feature: int, label: str | None) -> str:
    return f"{feature}" if label is None else f"{feature} {label}"


def _anchor(report: FeatureReport, feature: int) -> str:
    return f"pairs-{report.hookpoint}-{feature}"


def _fact(what: str, said: str) -> dict[str, str]:
    return {"what": what, "said": said}


def _share(name: str, share: Mapping[str, float]) -> dict[str, float]:
    return {name: share["value"], f"{name} low": share["low"], f"{name} high": share["high"]}
