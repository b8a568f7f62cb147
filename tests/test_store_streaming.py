"""Reading a cache behind a URL through a bounded folder of shards."""

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from store_cases import FEATURES, TOP_LOGITS, World, same
from store_servers import FAULTS, sealed, web_server

from fpo.errors import CacheDamaged, CacheError
from fpo.store import Shelf, open_cache, push

pytest.importorskip("obstore")

SHARD = "shards/000001.zarr.zip"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing here is worth waiting for."""
    monkeypatch.setattr("fpo.store.remote.bucket.RETRY_SECONDS", 1.0)
    monkeypatch.setattr("fpo.store.shards._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("fpo.store.remote.streaming.PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr("fpo.store.remote.streaming._PAUSE_SECONDS", 0.01)


@pytest.fixture
def world(tmp_path):
    return sealed(World, tmp_path / "here")


@pytest.fixture
def web(world):
    with web_server(world.store.root) as server:
        yield server


def bytes_in(folder):
    """Of whole and unfinished shards; some may go while we look."""
    total = 0
    for path in folder.glob("*.zarr.zip*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_a_cache_streams_with_less_disk_than_it_has(world, web, tmp_path):
    cache = open_cache(web.url, world.key)
    largest = max(entry.size for entry in cache.manifest.shards)
    assert cache.manifest.n_bytes > 2.5 * largest
    shelf = Shelf(tmp_path / "shelf", max_bytes=int(2.2 * largest))
    cache = open_cache(web.url, world.key, shelf)
    order = np.random.default_rng(0).permuted(np.tile(np.arange(3), (10, 1)), axis=1).ravel().tolist()
    cache.prefetch(order)
    for sid in order:
        assert same(cache.shard(sid), world.shard(sid))
        assert bytes_in(shelf.root) <= shelf.max_bytes


def test_what_is_expected_is_fetched_ahead_once(world, web, tmp_path):
    cache = open_cache(web.url, world.key, Shelf(tmp_path / "shelf"))
    cache.prefetch([2, 0, 1])
    deadline = time.monotonic() + 10
    while len(list((tmp_path / "shelf").glob("*.zarr.zip"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    asked = {name: n for (method, name), n in web.requests.items() if method == "GET" and "shards" in name}
    assert asked == {f"shards/{sid:06d}.zarr.zip": 1 for sid in range(3)}
    for sid in (2, 0, 1):
        assert same(cache.shard(sid), world.shard(sid))
    # Another process with the same shelf fetches nothing.
    assert same(open_cache(web.url, world.key, Shelf(tmp_path / "shelf")).shard(0), world.shard(0))
    assert sum(n for (method, name), n in web.requests.items() if method == "GET" and "shards" in name) == 3


def test_a_base_and_its_columns_are_fetched_side_by_side_within_half_of_the_shelf(tmp_path):
    """Nothing is read yet, so what lies on the shelf was fetched ahead; the folder whose plan is behind goes first."""
    wide = sealed(World, tmp_path / "wide", specs=(FEATURES, TOP_LOGITS))
    with web_server(wide.store.root) as web:
        cache = open_cache(web.url, wide.key, Shelf(tmp_path / "first"), columns=[TOP_LOGITS])
        sizes = [entry.size for entry in (*cache.base.manifest.shards, *cache.columns[0].sealed.manifest.shards)]
        shelf = Shelf(tmp_path / "shelf", max_bytes=2 * sum(sizes) - 2)
        cache = open_cache(web.url, wide.key, shelf, columns=[TOP_LOGITS])
        cache.prefetch([0, 1, 2])
        deadline = time.monotonic() + 10
        while len(list(shelf.root.glob("*.zarr.zip"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        # All six would be two bytes more than half: the last waits until something is read.
        time.sleep(0.05)
        assert bytes_in(shelf.root) <= shelf.max_bytes // 2
        asked = [name for (method, name), n in web.requests.items() if method == "GET" and "shards" in name]
        assert len(asked) == 5
        assert sum(name.startswith("columns/") for name in asked) in (2, 3)
        for sid in range(3):
            found = cache.shard(sid)
            assert same(found.columns[0], wide.beside(sid).columns[1])
            assert same(dataclasses.replace(found, columns=()), wide.shard(sid))
        assert sum(n for (method, name), n in web.requests.items() if method == "GET" and "shards" in name) == 6


def test_a_cache_with_columns_streams_through_a_shelf_that_is_smaller(tmp_path):
    wide = sealed(World, tmp_path / "wide", specs=(FEATURES, TOP_LOGITS))
    push(wide.store, wide.key, tmp_path / "plain", columns=[wide.column_key(1)])
    with web_server(tmp_path / "plain") as web:
        cache = open_cache(web.url, wide.key, Shelf(tmp_path / "first"), columns=[TOP_LOGITS])
        largest = max(entry.size for entry in cache.manifest.shards)
        shelf = Shelf(tmp_path / "shelf", max_bytes=int(2.5 * largest))
        cache = open_cache(web.url, wide.key, shelf, columns=[TOP_LOGITS])
        order = np.random.default_rng(0).permuted(np.tile(np.arange(3), (10, 1)), axis=1).ravel().tolist()
        cache.prefetch(order)
        for sid in order:
            assert same(cache.shard(sid).columns[0], wide.beside(sid).columns[1])
            assert bytes_in(shelf.root) <= shelf.max_bytes


def test_a_cache_that_is_closed_expects_nothing_more_of_the_shelf(world, web, tmp_path):
    shelf = Shelf(tmp_path / "shelf", max_bytes=1000)
    first = open_cache(web.url, world.key, shelf)
    first.prefetch([0, 1, 2])
    assert len(shelf.ahead._folders) == 1
    del first
    gc.collect()
    assert len(shelf.ahead._folders) == 0


def test_a_damaged_shard_on_the_shelf_is_fetched_again(world, web, tmp_path):
    cache = open_cache(web.url, world.key, Shelf(tmp_path / "shelf"))
    cache.shard(0)
    (path,) = (tmp_path / "shelf").glob("*.zarr.zip")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert same(cache.shard(0), world.shard(0))
    assert web.requests["GET", "shards/000000.zarr.zip"] == 2


def test_a_shelf_that_cannot_be_written_only_costs_speed(world, web, tmp_path, caplog):
    (tmp_path / "shelf").write_text("a file, not a folder")
    cache = open_cache(web.url, world.key, Shelf(tmp_path / "shelf"))
    cache.prefetch([0, 1, 2])
    for sid in (0, 1, 2, 0):
        assert same(cache.shard(sid), world.shard(sid))
    assert sum("shards are not kept" in line for line in caplog.messages) == 1


def test_a_fault_ahead_is_told_when_its_shard_is_read(world, web, tmp_path):
    def flip(asked, n, body):
        return FAULTS["flips a bit"](body) if asked == SHARD else (200, body, len(body))

    web.fault = flip
    cache = open_cache(web.url, world.key, Shelf(tmp_path / "shelf"))
    cache.prefetch([0, 1, 2])
    assert same(cache.shard(0), world.shard(0))
    with pytest.raises(CacheDamaged, match=r"000001\.zarr\.zip has .* bytes with the sha256"):
        cache.shard(1)
    assert same(cache.shard(2), world.shard(2))


def test_a_run_under_way_waits_for_a_server_that_is_away(world, web, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fpo.store.remote.bucket.RETRY_SECONDS", 0.0)
    monkeypatch.setattr("fpo.store.remote.streaming.PATIENCE_SECONDS", 60.0)
    cache = open_cache(web.url, world.key, Shelf(tmp_path / "shelf"))
    # Each look asks four times.
    web.fault = lambda asked, n, body: (503, b"", 0) if n <= 8 else (200, body, len(body))
    assert same(cache.shard(1), world.shard(1))
    assert sum("trying for another" in line for line in caplog.messages) == 2
    web.fault = lambda asked, n, body: (503, b"", 0)
    monkeypatch.setattr("fpo.store.remote.streaming.PATIENCE_SECONDS", 0.1)
    with pytest.raises(CacheError, match=r"cannot read http.*/shards/000002\.zarr\.zip: .*503"):
        cache.shard(2)


def test_the_bound_is_read_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FPO_SHARDS", str(tmp_path))
    monkeypatch.setenv("FPO_SHARDS_GIB", "0.5")
    assert (Shelf().root, Shelf().max_bytes) == (tmp_path, 2**29)
    monkeypatch.setenv("FPO_SHARDS_GIB", "much")
    with pytest.raises(CacheError, match="FPO_SHARDS_GIB is 'much'"):
        Shelf()


def test_a_shelf_too_small_for_any_shard_still_reads(world, web, tmp_path):
    cache = open_cache(web.url, world.key, Shelf(tmp_path / "shelf", max_bytes=100))
    cache.prefetch([0, 1, 2])
    assert all(same(cache.shard(sid), world.shard(sid)) for sid in (0, 1, 2))
    assert bytes_in(tmp_path / "shelf") == 0


def test_what_a_killed_process_left_on_the_shelf_makes_room(world, web, tmp_path):
    shelf = Shelf(tmp_path / "shelf")
    shelf.root.mkdir()
    left = shelf.root / f"{'ab' * 32}.zarr.zip.0123456789abcdef"
    left.write_bytes(b"unfinished")
    open_cache(web.url, world.key, shelf).shard(0)
    assert not left.exists()


def _read_all(url, key, shelf, start, answers):
    cache = open_cache(url, key, Shelf(shelf))
    start.wait()
    cache.prefetch([0, 1, 2])
    answers.put([len(cache.shard(sid)) for sid in (0, 1, 2)])


def test_processes_of_one_machine_fetch_a_shard_once(world, web, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    start, answers = spawn.Barrier(2), spawn.Queue()
    arguments = (web.url, world.key, tmp_path / "shelf", start, answers)
    jobs = [spawn.Process(target=_read_all, args=arguments) for _ in range(2)]
    for job in jobs:
        job.start()
    assert [answers.get(timeout=60) for _ in jobs] == [[2, 2, 1]] * 2
    for job in jobs:
        job.join()
    assert {n for (method, name), n in web.requests.items() if method == "GET" and "shards" in name} == {1}
    assert {path.suffix for path in (tmp_path / "shelf").iterdir()} == {".zip", ""}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_reader_is_told_instead_of_waiting_for_ever(world, web, tmp_path):
    cache = open_cache(web.url, world.key, Shelf(tmp_path / "shelf"))
    cache.shard(0)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            cache.shard(1)
        except CacheError as error:
            os._exit(0 if "open it in each process" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
