"""Elements of HTML and SVG: whatever stands in an attribute or between tags is escaped here."""

from __future__ import annotations

from fpo.report.words import escaped


def element(name: str, *inside: str, **attributes: object) -> str:
    """
    `<name attributes>inside</name>`

    inside      markup already; words go through `escaped`
    attributes  their values are words; None leaves one out; `class_` is class, `data_v` is data-v
    """
    return f"<{name}{_attributes(attributes)}>{''.join(inside)}</{name}>"


def _attributes(attributes: dict[str, object]) -> str:
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    return "".join(f' {name}="{_value(value)}"' for name, value in given.items())


def _value(value: object) -> str:
    """A coordinate to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else escaped(str(value))
