"""
What `fpo cache` writes into a manifest as `facts`, read back: a manifest may be a stranger's, so its facts have a
schema like everything else in it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fpo.errors import CacheDamaged
from fpo.store import OpenColumn


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it holds what is not printable")
    return text


def _spells_a_number(text: str) -> str:
    float(text)
    return text


_Text = Annotated[str, Field(max_length=500), AfterValidator(_printable)]
_Number = Annotated[str, Field(pattern=r"^-?[0-9.e+-]+$|^nan$", max_length=30), AfterValidator(_spells_a_number)] | int
"""A float is spelled out: canonical JSON has none."""


class SelfCheckFacts(BaseModel):
    """What the self-check found at one hookpoint."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    hookpoint: _Text
    checked: bool
    tokens: int = 0
    l0: _Number | None = None
    advertised_l0: _Number | None = None
    fvu: _Number | None = None
    elsewhere: dict[_Text, _Number] = {}
    note: _Text | None = None

    def line(self) -> str:
        """For people."""
        if not self.checked:
            return f"{self.hookpoint}: off"
        advertised = f" (advertised {float(self.advertised_l0):.4g})" if self.advertised_l0 else ""
        note = f"; {self.note}" if self.note else ""
        return f"{self.hookpoint}: L0 {self.l0}{advertised}, FVU {self.fvu} on {self.tokens} tokens{note}"


def self_check_of(column: OpenColumn) -> SelfCheckFacts:
    """The self-check in the manifest of a column of features. Raises CacheDamaged where it has another shape."""
    try:
        return parse_self_check(column.sealed.manifest.facts)
    except ValueError as error:
        raise CacheDamaged(
            f"{column.sealed.folder.where('manifest.json')} says of the self-check what fpo cache does not write: "
            f"{error}; it was made by something else: remove that column and build it with fpo cache"
        ) from None


def parse_self_check(facts: dict[str, Any]) -> SelfCheckFacts:
    """Raises ValueError naming the place."""
    try:
        return SelfCheckFacts.model_validate(facts.get("self_check"))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(["self_check", *map(str, problem["loc"])])
        raise ValueError(_shown(f"{place}: {problem['msg']}")) from None


def _shown(text: str) -> str:
    return text if text.isprintable() else ascii(text)
