"""
How far a long step is, on stderr: tqdm's bar on a terminal; elsewhere (a batch job, nohup, CI) a line a minute, which
a log keeps and `tail -f` shows.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

LINE_SECONDS = 60.0


def progress_bar(total: int, unit: str, desc: str, *, initial: int = 0, smoothing: float = 0.3) -> Progress:
    """
    A bar, or lines where stderr is no terminal: `desc: 40/90 unit, note, 37 unit/s, eta 2 min`.

    unit     what is counted, in the plural: "pairs"
    initial  how many are done already; the rate does not count them
    """
    return Progress(total, unit, desc, initial=initial, smoothing=smoothing)


def is_first_rank() -> bool:
    """Under torchrun, one process speaks."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """One line on stderr, above any bar: what is going on while there is nothing to count."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """tqdm's `update`, `set_postfix_str`, `n` and `close`; also a context manager."""

    def __init__(self, total: int, unit: str, desc: str, *, initial: int = 0, smoothing: float = 0.3) -> None:
        self.total, self.unit, self.desc = total, unit, desc
        self.n, self._initial = initial, initial
        self._file: TextIO = sys.stderr
        self._began = self._last_line = time.monotonic()
        self._note, self._place = "", ""
        self._bar: tqdm[Any] | None = None
        if self._file.isatty():
            self._bar = tqdm(total=total, initial=initial, desc=desc, unit=f" {unit}", smoothing=smoothing)

    def update(self, n: int = 1) -> None:
        """`n` more are done."""
        self.n += n
        if self._bar is not None:
            self._bar.update(n)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self.line()

    def set_postfix_str(self, note: str, place: str = "") -> None:
        """What stands behind the count from now on; in lines, `place` stands for the count: "step 40/90"."""
        self._note, self._place = note, place
        if self._bar is not None:
            self._bar.set_postfix_str(note)

    def line(self) -> None:
        """A line now; nothing on a terminal, where the bar says it all."""
        if self._bar is not None:
            return
        self._last_line = time.monotonic()
        parts = [self._place or f"{self.n:,}/{self.total:,} {self.unit}", self._note]
        done = self.n - self._initial
        if done:
            rate = done / max(self.elapsed, 1e-9)
            parts += [f"{rate:,.3g} {self.unit}/s" if rate < 100 else f"{rate:,.0f} {self.unit}/s"]
            if self.n < self.total:
                parts += [f"eta {duration((self.total - self.n) / rate)}"]
        print(f"{self.desc}: {', '.join(filter(None, parts))}", file=self._file, flush=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def close(self) -> None:
        """No more of it."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Seconds in the largest unit that leaves a number of two digits: `40 s`, `2 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
