"""Words of strangers stay words, in a terminal and on a page; tables and passages show what they were given."""

import math

import numpy as np
import pytest
from report_pages import HOSTILE

from fpo.report import Column, Pair, Passage, Passages, Table
from fpo.report.words import escaped, plain, said


def test_what_steers_a_terminal_is_spelled_out():
    """Escape, bell, a line break, a paragraph separator, right-to-left override, and the one-byte CSI."""
    assert plain("a\x1b[31m\x07\n\u2029\u202e\x9bz") == r"a\x1b[31m\x07\n\u2029\u202e\x9bz"


def test_words_of_all_scripts_are_left_as_they_are():
    text = "größer 語 क्‍ष \N{FAMILY} π²"
    assert plain(text) == text


def test_markup_is_text_on_a_page():
    assert escaped(HOSTILE).startswith("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;&lt;!-- \\x1b[31mred")
    assert escaped("\"'&") == "&quot;&#x27;&amp;"


@pytest.mark.parametrize(
    ("value", "form", "words"),
    [
        (0.123456, "", "0.1235"),
        (1234567, "", "1,234,567"),
        (0.5, ".1%", "50.0%"),
        (True, "", "yes"),
        (None, ".2f", "-"),
        (math.nan, ".2f", "-"),
        (3, lambda n: f"{n} pears", "3 pears"),
        ("a\x1b", "", r"a\x1b"),
    ],
)
def test_a_value_is_said_as_its_column_asks(value, form, words):
    assert said(value, form) == words


ROWS = [
    {"run": "fpo", "acc": 0.71, "low": 0.66, "high": 0.76, "steps": 1000},
    {"run": "a\x1b[2Jb", "acc": None, "steps": 75},
]
TABLE = Table("runs", [Column("run"), Column("acc", "accuracy", ".2f", ("low", "high")), Column("steps")], ROWS)


def test_a_terminal_gets_numbers_to_the_right_and_words_to_the_left():
    assert TABLE.text() == (
        "run                 accuracy  steps\nfpo        0.71 [0.66, 0.76]  1,000\na\\x1b[2Jb                  -     75"
    )


def test_a_long_table_is_cut_in_a_terminal_alone():
    table = Table("n", [Column("n")], [{"n": n} for n in range(5)], text_rows=2)
    assert table.text() == "n\n0\n1\nand 3 more"
    assert table.html().count("<tr>") == 1 + 5


def test_what_is_wider_than_the_terminal_goes_on_below_under_the_same_rows():
    """`run` and its gap take 11 characters, accuracy 17 more: 28; the steps would make it 35."""
    assert TABLE.text(30) == (
        "run                 accuracy\n"
        "fpo        0.71 [0.66, 0.76]\n"
        "a\\x1b[2Jb                  -\n\n"
        "run        steps\n"
        "fpo        1,000\n"
        "a\\x1b[2Jb     75"
    )


def test_a_table_without_rows_is_its_headings():
    assert Table("none", [Column("n", "how many")], []).text() == "how many"


def test_a_cell_holds_all_digits_beside_the_words():
    assert '<td data-v="0.71">0.71 <small>[0.66, 0.76]</small></td><td data-v="1000">1,000</td>' in TABLE.html()
    assert "<td>75</td>" in TABLE.html()


def test_numbers_of_numpy_are_numbers_and_what_is_none_is_unknown():
    rows = [{"n": np.float64(0.123456)}, {"n": math.nan}]
    page = Table("t", [Column("n")], rows).html()
    assert '<td data-v="0.123456">0.1235</td>' in page
    assert "<td>-</td>" in page


@pytest.mark.parametrize("address", ["javascript:alert(1)", "data:text/html,x", "//else.where", " https://x", 7, None])
def test_only_the_web_and_the_page_are_linked_to(address):
    table = Table("t", [Column("n", link="to")], [{"n": 1, "to": address}])
    assert "href" not in table.html()


def test_an_address_cannot_leave_its_attribute():
    table = Table("t", [Column("n", link="to")], [{"n": 1, "to": 'https://x/"onclick="alert(1)'}])
    assert '<a href="https://x/&quot;onclick=&quot;alert(1)">1</a>' in table.html()


def test_a_passage_is_cold_pieces_and_warm_tokens():
    """The last token has no activation, since nothing is predicted from it."""
    passage = Passage([" the", " red", " fox", " ran"], [0.0, 1.23456, 0.0])
    assert passage.spans() == [" the", (" red", 1.23), " fox ran"]


def test_a_terminal_marks_what_is_warm_beside_the_hottest():
    """0.04 is less than a twentieth of 1."""
    pair = Pair("Say\x1b", Passage([" a", " b", " c"], [1.0, 0.04, 0.5]), Passage(["no\n"], [0.0], "mean 0"))
    assert Passages("feature 7", [pair]).text() == (
        "feature 7\n\n  prompt    Say\\x1b\n  chosen     «a» b «c»\n  rejected  no\\n  (mean 0)"
    )
