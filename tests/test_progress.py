"""How far it is: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from fpo import progress
from fpo.progress import duration, progress_bar, say


class Clock:
    """A clock that the test turns."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_without_a_terminal_a_line_a_minute_says_count_rate_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """300 of 1,200 were there; 300 more in 60 s are 5 a second, and the 600 that remain take 120 s."""
    with progress_bar(1200, "pairs", "cache train", initial=300) as bar:
        bar.set_postfix_str("700 tokens/s")
        for _ in range(6):
            clock.now += 10
            bar.update(50)
        assert bar.elapsed == 60
    assert capsys.readouterr().err == "cache train: 600/1,200 pairs, 700 tokens/s, 5 pairs/s, eta 2 min\n"


def test_a_line_can_be_asked_for_and_name_its_place_itself(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress_bar(720, "pairs", "align")
    clock.now += 2
    bar.update(320)
    bar.set_postfix_str("loss 0.21 margin 1.9", place="step 40/90")
    bar.line()
    clock.now += 59
    bar.update(0)
    assert capsys.readouterr().err == "align: step 40/90, loss 0.21 margin 1.9, 160 pairs/s, eta 2 s\n"


def test_on_a_terminal_there_is_a_bar_and_no_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(10, "pairs", "align") as bar:
        clock.now += 600
        bar.update(10)
        bar.line()
    assert "10/10" in terminal.getvalue()
    assert "eta" not in terminal.getvalue()


def test_what_is_said_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("loading the policy ...")
    assert capsys.readouterr() == ("", "loading the policy ...\n")


@pytest.mark.parametrize(("seconds", "text"), [(4.2, "4 s"), (89, "89 s"), (120, "2 min"), (12600, "3.5 h")])
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text
