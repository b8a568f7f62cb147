"""A figure as a file of its own, for pages that show pictures: what its colours mean stands above it."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from fpo.report.drawing import WIDTH, dot, words
from fpo.report.figures import Figure, Scatter, colour
from fpo.report.markup import element
from fpo.report.words import escaped, plain

MARGIN, TITLE, ROW = 16, 40, 20
"""Around everything; height of the title; of a line of the legend."""
SWATCH, LETTER = 22, 6.4
"""Width of a sample of a colour with its space, and about that of a letter of 12 px."""
FONT = 'system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif'


def save_figure(figure: Figure, path: Path) -> None:
    """Write it as SVG, light or dark as its reader's screen is."""
    path.write_text(standalone(figure), encoding="utf-8")


def standalone(figure: Figure) -> str:
    """The picture with its title, its legend, and the part of the page's style that it is drawn with."""
    inner = figure.svg()
    height = float(re.search(r'viewBox="0 0 \d+ ([\d.]+)"', inner)[1])  # type: ignore[index]
    legend, below = _legend(figure)
    top = TITLE + below
    body = re.sub(r"^<svg[^>]*>|</svg>$", "", inner)
    width, whole = WIDTH + 2 * MARGIN, height + top + MARGIN
    return (
        element(
            "svg",
            element("title", escaped(figure.title)),
            element("style", _style()),
            element("path", d=f"M0 0H{width}V{whole:g}H0Z", class_="paper"),
            element("g", words(figure.title, 0, 24, "start", "heading"), legend, transform=f"translate({MARGIN} 0)"),
            element("g", body, transform=f"translate({MARGIN} {top:g})"),
            "\n",
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {width} {whole:g}",
            width=width,
            height=f"{whole:g}",
        )
        + "\n"
    )


def _legend(figure: Figure) -> tuple[str, int]:
    """Samples of the colours with their names, in as many lines as they need; and how high those are."""
    names = figure.series_names
    if len(names) < 2:
        return "", 0
    left, row, shown = 0.0, 0, []
    for name in names:
        taken = SWATCH + LETTER * len(plain(name)) + 14
        if left and left + taken > WIDTH:
            left, row = 0.0, row + 1
        middle = TITLE + ROW * row + 4
        line = element("path", d=f"M{left:.1f} {middle}h16", class_="curve")
        sample = dot(left + 8, middle) if isinstance(figure, Scatter) else line
        label = words(name, left + SWATCH, middle + 4, "start")
        shown.append(element("g", sample, label, class_=colour(name, names, None)))
        left += taken
    return "".join(shown), ROW * (row + 1) + 6


def _style() -> str:
    """Colours and marks of page.css; the rest of it is about pages."""
    css = (files("fpo.report") / "page.css").read_text(encoding="utf-8")
    colours = css[: css.index("/* The page */")].replace("@media screen and", "@media")
    marks = css[css.index("text { fill") : css.index(".legend { display")]
    own = [
        f"text {{ font-family: {FONT}; }}",
        ".heading { fill: var(--ink); font-size: 15px; font-weight: 600; }",
        ".paper { fill: var(--paper); }",
    ]
    return "\n".join(["", colours.strip(), marks.strip(), *own, ""])
