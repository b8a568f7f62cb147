"""
A report on one page: a single file of HTML that asks nobody for anything, works from a disk, on a phone and on paper,
and holds its data once more as JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from fpo.errors import RunError
from fpo.report.figures import Figure, Palette, colour
from fpo.report.markup import element
from fpo.report.passages import Passages, script_json
from fpo.report.tables import Table
from fpo.report.words import escaped, plain

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""What a browser lets the page do (https://www.w3.org/TR/CSP3/): show itself and run its own script."""

Item = str | Table | Figure | Passages
"""A string is a paragraph."""


@dataclass(frozen=True)
class Section:
    """What stands under one heading."""

    title: str
    text: str = ""
    """What is seen here, in a sentence or two."""
    items: Sequence[Item] = ()


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    lead: str
    """What there is to know in a sentence or two."""
    sections: Sequence[Section]
    data: Any = field(default_factory=dict)
    """All numbers, in JSON types; what Passages show is with them already."""

    def text(self) -> str:
        """For a terminal: all but the figures, whose numbers `--json` has."""
        parts = [plain(self.title), plain(self.lead)]
        for section in self.sections:
            shown = [_text(item) for item in section.items if not isinstance(item, Figure)]
            if shown:
                parts += [plain(section.title).upper(), plain(section.text), *shown]
        return "\n\n".join(filter(None, parts))

    def html(self) -> str:
        """The file."""
        counts = self._series()
        palette = {name: number for number, name in enumerate(counts)}
        shared = [name for name, figures in counts.items() if figures > 1]
        head = [
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            '<meta name="color-scheme" content="light dark">',
            element("title", escaped(self.title)),
            element("style", _asset("page.css")),
        ]
        body = [
            element("header", element("h1", escaped(self.title)), element("p", escaped(self.lead), class_="lead")),
            _legend(palette, shared, "nav") if shared else "",
            element("main", *(_section(section, palette, shared) for section in self.sections)),
            element("script", script_json(self.data), type="application/json", id="data"),
            element("script", _asset("page.js")),
        ]
        inside = element("head", "\n".join(["", *head, ""])) + "\n" + element("body", "\n".join(["", *body, ""]))
        return f"<!doctype html>\n{element('html', inside, lang='en')}\n"

    def save(self, path: Path) -> None:
        """Write the file. Raises RunError where it cannot be written."""
        try:
            path.write_text(self.html(), encoding="utf-8")
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror})") from None

    def _series(self) -> Counter[str]:
        """What figures tell apart by colour, as it comes, and in how many of them."""
        figures = [item for section in self.sections for item in section.items if isinstance(item, Figure)]
        return Counter(name for figure in figures for name in figure.series_names)


def _text(item: str | Table | Passages) -> str:
    return plain(item) if isinstance(item, str) else item.text()


def _section(section: Section, palette: Palette, shared: Sequence[str]) -> str:
    text = element("p", escaped(section.text)) if section.text else ""
    items = [_item(item, palette, shared) for item in section.items]
    return element("section", element("h2", escaped(section.title)), text, *items) + "\n"


def _item(item: Item, palette: Palette, shared: Sequence[str]) -> str:
    if isinstance(item, str):
        return element("p", escaped(item))
    if isinstance(item, Figure):
        return _figure(item, palette, shared)
    return item.html()


def _figure(figure: Figure, palette: Palette, shared: Sequence[str]) -> str:
    """The picture, what its colours mean where the page has not said it, and the numbers under it."""
    names = figure.series_names
    legend = "" if len(names) < 2 or set(names) <= set(shared) else _legend(palette, names)
    numbers = element("details", element("summary", "Numbers"), figure.table().html())
    return element("figure", element("figcaption", escaped(figure.title)), legend, figure.svg(palette), numbers) + "\n"


def _legend(palette: Palette, names: Sequence[str], tag: str = "div") -> str:
    """Buttons that bring one of them to the front."""
    buttons = [
        element("button", escaped(name), type="button", class_=colour(name, names, palette), data_series=name)
        for name in names
    ]
    return element(tag, *buttons, class_="legend", aria_label="what the colours are")


def _asset(name: str) -> str:
    return (files("fpo.report") / name).read_text(encoding="utf-8")
