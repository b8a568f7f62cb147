"""
Ctrl-C and SIGTERM (a scheduler's, torchrun's): end at a sound place, and say how to go on. The exit code is the shell's
for that signal, 130 or 143; the same signal once more ends at once.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_code(signum: int) -> int:
    """What a shell calls the end by a signal."""
    return 128 + signum


class StopRequest:
    """
    Inside `with StopRequest() as stop`, the first signal only sets `stop.signum`.

    torchrun follows a Ctrl-C, which its processes get from the terminal as well, with a SIGTERM to each: a signal of
    the other kind is no second wish to end.
    """

    def __init__(self) -> None:
        self.signum = 0
        """The signal that came first; 0 is none."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Only the main thread may set handlers; elsewhere nothing changes.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signum = self.signum or number
        signal.signal(number, self._before[number])


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as Python tells of Ctrl-C."""


@contextlib.contextmanager
def interruptible(how_to_go_on: str) -> Iterator[None]:
    """Where a signal may end the work at any moment: one line on stderr and the signal's exit code."""

    def terminated(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"interrupted; {how_to_go_on}", file=sys.stderr, flush=True)
        sys.exit(exit_code(signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)
