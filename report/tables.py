"""Tables: for terminals as wide as what stands in them, for pages to be sorted and filtered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fpo.report.markup import element
from fpo.report.words import Format, escaped, is_number, plain, said

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table, by the key that its values have in the rows."""

    key: str
    label: str = ""
    """Its heading; else the key."""
    format: Format = ""
    """`+.3f`, `.1%`, `,` or a function; by default four digits, whole numbers with commas."""
    interval: tuple[str, str] | None = None
    """Keys of the lower and the upper end that stand behind the value."""
    link: str | None = None
    """Key of an address that the value links to: http(s), or #anchor within the page."""
    about: str = ""
    """What it is, where the heading does not say it."""

    @property
    def heading(self) -> str:
        return self.label or self.key

    def text(self, row: Row) -> str:
        """The value, and the interval where the row has one."""
        value = plain(said(row.get(self.key), self.format))
        ends = self.ends(row)
        return f"{value} {ends}" if ends else value

    def ends(self, row: Row) -> str:
        """The interval in words; empty where there is none."""
        if self.interval is None or any(row.get(key) is None for key in self.interval):
            return ""
        low, high = (said(row[key], self.format) for key in self.interval)
        return plain(f"[{low}, {high}]")


@dataclass(frozen=True)
class Table:
    """Rows under headings."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    text_rows: int | None = None
    """How many rows a terminal gets; a page has them all."""
    series: str | None = None
    """Key whose value names what a row is of: a run, which is highlighted together with its marks."""

    def text(self, width: int | None = None) -> str:
        """The table for a terminal; what is wider goes on below, each row under its first cell again."""
        rows = self.rows[: self.text_rows]
        cells = [self._aligned(column, rows) for column in self.columns]
        blocks = [
            "\n".join("  ".join(line).rstrip() for line in zip(*block, strict=True)) for block in _blocks(cells, width)
        ]
        left_out = len(self.rows) - len(rows)
        return "\n\n".join(blocks) + (f"\nand {left_out:,} more" if left_out else "")

    def html(self) -> str:
        """The table for a page."""
        head = element("tr", *(_heading(column, self._numeric(column)) for column in self.columns))
        inside = [element("caption", escaped(self.title)), element("thead", head), "\n"]
        rows = element("tbody", "\n", *(self._html_row(row) + "\n" for row in self.rows))
        return element("div", element("table", *inside, rows), class_="table")

    def _html_row(self, row: Row) -> str:
        series = None if self.series is None else row[self.series]
        return element("tr", *(_cell(column, row) for column in self.columns), data_series=series)

    def _aligned(self, column: Column, rows: Sequence[Row]) -> list[str]:
        """Numbers to the right, the rest to the left; of values with intervals both are."""
        cells = [plain(column.heading), *(column.text(row) for row in rows)]
        width = max(map(len, cells))
        return [cell.rjust(width) if self._numeric(column) else cell.ljust(width) for cell in cells]

    def _numeric(self, column: Column) -> bool:
        values = [row.get(column.key) for row in self.rows]
        return any(map(is_number, values)) and all(value is None or is_number(value) for value in values)


def _blocks(columns: Sequence[list[str]], width: int | None) -> list[list[list[str]]]:
    """Columns in as many blocks as keep within the width, where there is one."""
    blocks = [list(columns[:1])]
    for column in columns[1:]:
        taken = sum(2 + len(own[0]) for own in blocks[-1]) + len(column[0])
        if width is not None and taken > width and len(blocks[-1]) > 1:
            blocks.append([columns[0]])
        blocks[-1].append(column)
    return blocks


def _heading(column: Column, numeric: bool) -> str:
    button = element("button", escaped(column.heading), type="button", title=column.about or None)
    return element("th", button, scope="col", class_=None if numeric else "words")


def _cell(column: Column, row: Row) -> str:
    """The words of a value, with the value itself where they are not just that: what sorts and is copied."""
    value = row.get(column.key)
    number, words, ends = is_number(value), said(value, column.format), column.ends(row)
    shown = _linked(escaped(words), row.get(column.link) if column.link else None)
    small = f" {element('small', escaped(ends))}" if ends else ""
    exact = str(value) if number and words != "-" and (ends or words != str(value)) else None
    return element("td", shown, small, class_=None if number or value is None else "words", data_v=exact)


def _linked(words: str, address: object) -> str:
    """Only to the web or within the page; anything else that calls itself an address stays words."""
    if not isinstance(address, str) or not address.startswith(("https://", "http://", "#")):
        return words
    return element("a", words, href=address)
