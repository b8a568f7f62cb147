"""
Two kinds of work at a time: the main thread goes on with the next item while another thread finishes the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def one_ahead(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
    """
    Each item with `work(item)`, in order. A thread works on one item while the next one is taken from `items`; at most
    two are there besides the one that is given out.

    Raises what `items` and `work` raise; work that has begun is finished before that, so what it writes is whole.
    """
    with ThreadPoolExecutor(1) as pool:
        before: tuple[Item, Future[Result]] | None = None
        for item in items:
            job = pool.submit(work, item)
            if before is not None:
                yield before[0], before[1].result()
            before = item, job
        if before is not None:
            yield before[0], before[1].result()
