"""A cache of a million groups of two: opens at once, streams in bounded memory, in an order that needs no replay."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from store_cases import arrays_in
from store_synthetic import SHARD_GROUPS, cheap_spec, write_cheap_cache

from fpo.stage2_align.order import BLOCK_SHARDS, cut_batches, epoch_blocks
from fpo.stage2_align.stream import PairStream
from fpo.store import Cache, Store, open_cache

QUICK, LARGE = 24 * SHARD_GROUPS + 77, 1_000_000
MB = 2**20


@pytest.fixture(scope="module", params=[QUICK, pytest.param(LARGE, marks=pytest.mark.campaign)])
def cache(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    started = time.perf_counter()
    key = write_cheap_cache(folder, request.param, n_columns=2 if request.param == QUICK else 20)
    print(f"\n{request.param} groups written and sealed in {time.perf_counter() - started:.1f} s")
    return open_cache(folder, key, columns=[cheap_spec(0)])


def test_it_opens_in_less_than_a_second(cache):
    started = time.perf_counter()
    opened = open_cache(cache.folder.root.parent, cache.key, columns="all")
    seconds = time.perf_counter() - started
    print(
        f"\n{opened.n_groups} groups in {len(opened.shard_groups)} shards open with {len(opened.columns)} columns in "
        f"{seconds * 1000:.1f} ms"
    )
    assert opened.n_groups == cache.n_groups
    assert len(opened.columns) >= 2
    assert seconds < 1


def test_it_is_listed_in_less_than_a_second(cache):
    started = time.perf_counter()
    (summary,) = Store(cache.folder.root.parent).summaries()
    seconds = time.perf_counter() - started
    print(f"\n{summary.n_groups} groups with {len(summary.columns)} columns are listed in {seconds * 1000:.1f} ms")
    assert summary.complete
    assert all(column.complete for column in summary.columns)
    assert seconds < 1


def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def raw_bytes(groups):
    return sum(array.nbytes for array in arrays_in(groups).values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="/proc")
def test_an_epoch_streams_in_memory_that_depends_on_the_block_alone(cache):
    """
    Bound: eight blocks' raw bytes and 64 MB. At most three blocks live at once (trained from, waiting, being read), the
    one being read up to three times over while its shards are put together and shuffled, and with 64-bit positions.
    """
    block = BLOCK_SHARDS * raw_bytes(cache.shard(0))
    stream = PairStream(cache, seed=3, per_device=256)
    next(iter(stream))  # threads, queues and torch are there before the measurement
    Path("/proc/self/clear_refs").write_text("5")
    before, started, seen = resident("VmRSS"), time.perf_counter(), 0
    for batch in stream:
        seen += len(batch["n_completions"])
    grown, seconds = resident("VmHWM") - before, time.perf_counter() - started
    print(
        f"\n{seen} pairs streamed in {seconds:.1f} s ({seen / seconds:.0f}/s), a block is {block / MB:.1f} MB raw, "
        f"resident memory grew by at most {grown / MB:.1f} MB"
    )
    assert seen == cache.n_groups
    assert grown < 8 * block + 64 * MB


def epoch_rows(cache, epoch, batch=256, seed=3):
    blocks = epoch_blocks(cache.shard_groups, seed=seed, epoch=epoch, batch=batch)
    return np.concatenate([block.rows[: len(block.rows) - block.leftover] for block in blocks])


def test_every_epoch_is_another_permutation_that_seed_and_epoch_alone_decide(cache):
    first, second = epoch_rows(cache, 0), epoch_rows(cache, 1)
    for rows in (first, second, epoch_rows(cache, 0, seed=4)):
        assert np.array_equal(np.sort(rows), np.arange(cache.n_groups))
    assert np.array_equal(first, epoch_rows(cache, 0))
    for other in (second, epoch_rows(cache, 0, seed=4)):
        assert (first == other).mean() < 0.01
    lengths = np.random.default_rng(0).integers(1, 99, 10_000)
    cut = [np.concatenate(cut_batches(lengths, 5, seed=3, epoch=epoch, batch=100)) for epoch in (0, 0, 1)]
    assert np.array_equal(cut[0], cut[1])
    assert not np.array_equal(cut[0], cut[2])


def test_any_step_is_reached_without_replay(cache, monkeypatch):
    """The batches behind step n of epoch 2 equal those of a whole epoch, and few shards are read to get there."""
    stream = PairStream(cache, seed=3, per_device=256)
    stream.start(epoch=2)
    steps = len(stream)
    places = sorted({1, steps // 3, steps - 2})
    wanted = {step: [] for step in places}
    if cache.n_groups == QUICK:
        for step, batch in enumerate(stream):
            if step in wanted:
                wanted[step] = batch
    reads = []
    real = Cache.shard
    monkeypatch.setattr(Cache, "shard", lambda self, sid: reads.append(sid) or real(self, sid))
    for step in places:
        reads.clear()
        stream.start(epoch=2, skip=step)
        started = time.perf_counter()
        iterator = iter(stream)
        for _ in range(step):
            assert next(iterator) is None
        batch = next(iterator)
        seconds, shards_read = time.perf_counter() - started, len(set(reads))
        iterator.close()
        print(f"\nstep {step} of {steps}: {shards_read} shards read, {seconds * 1000:.0f} ms")
        # Its own block, the one read ahead, and the few shards of what was left over from the block before.
        assert shards_read <= 4 * BLOCK_SHARDS
        if wanted[step]:
            assert batch.keys() == wanted[step].keys()
            for name in batch:
                torch.testing.assert_close(batch[name], wanted[step][name], rtol=0, atol=0, equal_nan=True)
