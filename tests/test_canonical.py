"""JSON that carries its own checksum: one spelling, and every other byte is refused."""

import pytest

from fpo.canonical import checked_json, parse_checked_json

BODIES = [
    {},
    {"a": 1},
    {"zz": [1, {"check": 2, "d": 3}], "a": 'x\n "d": '},
    {"check1": 1, "b": {"d": 1}},
    {"\u00fc": 1, "chec": None, "check\n": "3"},
]


@pytest.mark.parametrize("body", BODIES)
def test_what_was_spelled_is_read_wherever_the_checksum_sorts(body):
    """Before all names, behind them, between them, and beside one that looks like it in a string or further inside."""
    data = checked_json(body)
    assert parse_checked_json(data) == body
    inside = [data[:at] + extra + data[at:] for at in range(len(data) + 1) for extra in (b" ", b"\n")]
    for other in [*inside, data.replace(b'"check"', b'"Check"', 1), data.replace(b"\n ", b"\n", 1)]:
        with pytest.raises(ValueError, match=r".+"):
            parse_checked_json(other)
