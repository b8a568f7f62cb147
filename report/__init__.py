"""
Figures, tables and pages. Knows numbers and words; no models, no stores, no recipes.

A report is a Page: `.text()` for a terminal, `.save(path)` for one HTML file. A figure alone is a file of SVG.
"""

from fpo.report.figures import Bar, Bars, Bins, Figure, Histogram, Line, Point, Scatter, Series
from fpo.report.page import Item, Page, Section
from fpo.report.passages import Pair, Passage, Passages
from fpo.report.standalone import save_figure, standalone
from fpo.report.tables import Column, Table

__all__ = [
    "Bar",
    "Bars",
    "Bins",
    "Column",
    "Figure",
    "Histogram",
    "Item",
    "Line",
    "Page",
    "Pair",
    "Passage",
    "Passages",
    "Point",
    "Scatter",
    "Section",
    "Series",
    "Table",
    "save_figure",
    "standalone",
]
