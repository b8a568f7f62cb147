"""One thread finishes what the other began: order, errors, and shards that are written while the next is scored."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tiny_world import TinyWorld, build_tiny_world

from fpo.errors import CacheError
from fpo.stage1_cache import build_caches
from fpo.stage1_cache.ahead import one_ahead
from fpo.stage1_cache.score import ReferenceScorer
from fpo.store import CacheWriter, Store, verify

pytestmark = pytest.mark.usefixtures("private_memory")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), 24, 2)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_items_come_in_order_with_what_was_made_of_them(n: int) -> None:
    assert list(one_ahead(range(n), lambda item: item * item)) == [(item, item * item) for item in range(n)]


def test_the_next_item_is_taken_while_the_last_one_is_worked_on() -> None:
    taken = [threading.Event() for _ in range(4)]

    def items() -> object:
        for number, event in enumerate(taken):
            event.set()
            yield number

    def work(number: int) -> None:
        assert taken[min(number + 1, 3)].wait(60)

    assert [item for item, _ in one_ahead(items(), work)] == [0, 1, 2, 3]  # type: ignore[call-overload]


def test_what_fails_in_the_thread_is_raised_and_what_was_begun_is_finished() -> None:
    finished = []

    def items() -> object:
        yield 1
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(ZeroDivisionError):
        list(one_ahead([1, 0, 2, 3], lambda item: finished.append(1 / item)))
    with pytest.raises(KeyboardInterrupt):
        list(one_ahead(items(), lambda item: finished.append(item)))  # type: ignore[call-overload]
    assert finished == [1.0, 0.5, 1, 0]  # of the first four, 2 was there already when 0 failed, and 3 was not


def test_a_shard_is_written_while_the_next_one_is_scored(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shard's writer waits until the second shard's batch runs: one after the other would never end."""
    recipe = world.recipe(cache={"shard_pairs": 8}, features=[], objective={"name": "dpo"}, data={"eval_split": None})
    second, batches, n_threads = threading.Event(), [], set()
    write, score = CacheWriter.write, ReferenceScorer._score_batch

    def waiting(self: CacheWriter, sid: int, *rest: object) -> None:
        assert second.wait(60)
        n_threads.add(threading.current_thread())
        write(self, sid, *rest)  # type: ignore[arg-type]

    def noting(self: ReferenceScorer, *rest: object) -> object:
        assert threading.current_thread() is threading.main_thread()
        batches.append(rest)
        if len(batches) == 2:
            second.set()
        return score(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(CacheWriter, "write", waiting)
    monkeypatch.setattr(ReferenceScorer, "_score_batch", noting)
    (report,) = build_caches(recipe, tmp_path)
    assert (report.built_shards, len(batches)) == (3, 3)
    assert threading.main_thread() not in n_threads
    assert verify(tmp_path, report.cache.key).ok


def test_a_disk_that_fails_in_the_thread_is_the_same_error(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise CacheError("cannot write: no space left")

    monkeypatch.setattr(CacheWriter, "write", full)
    with pytest.raises(CacheError, match="no space left"):
        build_caches(world.recipe(), tmp_path)


def test_interrupted_while_it_scores_it_keeps_the_shard_that_was_scored(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = world.recipe(cache={"shard_pairs": 8}, features=[], objective={"name": "dpo"}, data={"eval_split": None})
    batches = []
    score = ReferenceScorer._score_batch

    def stopping(self: ReferenceScorer, *rest: object) -> object:
        batches.append(rest)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return score(self, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceScorer, "_score_batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            build_caches(recipe, tmp_path)
    (key,) = Store(tmp_path).keys()
    assert len(list((tmp_path / key / "records").iterdir())) == 1
    assert list((tmp_path / key / "tmp").glob("*.json*")) == []
    assert build_caches(recipe, tmp_path)[0].built_shards == 2
