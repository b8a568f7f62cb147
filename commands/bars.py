"""Bars for the store: how many shards, how many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fpo.progress import Progress, progress_bar


@contextmanager
def shard_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    with _counting("shards", label) as advance:
        yield advance


@contextmanager
def byte_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    with _counting("MiB", label) as advance:
        yield lambda done, total: advance(-(-done // 2**20), -(-total // 2**20))


@contextmanager
def _counting(unit: str, label: str) -> Iterator[Callable[[int, int], None]]:
    """How far it is; the total is known when the first is done."""
    bars: list[Progress] = []

    def advance(done: int, total: int) -> None:
        if not bars:
            bars.append(progress_bar(total, unit, label))
        bars[0].update(done - bars[0].n)

    try:
        yield advance
    finally:
        for bar in bars:
            bar.close()
