"""Many shards and many caches: what one costs does not grow with how many there are."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager

import numpy as np
import pytest
from store_cases import make_groups, make_recipe

from fpo.store import CacheWriter, Claims, Store, gc, nearest, open_cache

QUICK, MANY = 60, 2000
SHARDS = 5000


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """What is counted is our own work; a disk that syncs takes as long as it takes."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@contextmanager
def counted(monkeypatch, name):
    """The calls of os.NAME inside."""
    calls = []
    real = getattr(os, name)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
        yield calls


def many_caches(root, count):
    """Caches of one scorer, of one group each."""
    groups, plan = make_groups([(1, (2, 2))]), [np.array([0])]
    for seed in range(count):
        recipe = make_recipe(groups, plan)
        recipe["groups"]["seed"] = seed
        writer = CacheWriter(root, recipe, plan)
        writer.write(0, groups, {})
        writer.seal({})
    return Store(root), recipe


@pytest.mark.parametrize("count", [QUICK, pytest.param(SHARDS, marks=pytest.mark.campaign)])
def test_filling_a_cache_lists_its_folders_a_few_times_whatever_its_shards(tmp_path, monkeypatch, count):
    """No listing before every shard: whether one stands is asked of its own files."""
    groups = make_groups([(1, (2, 1))] * count)
    plan = [np.array([n]) for n in np.random.default_rng(0).permutation(count)]
    writer = CacheWriter(tmp_path, make_recipe(groups, plan), plan)
    claims = Claims(writer.folder)
    started = time.perf_counter()
    with counted(monkeypatch, "listdir") as listings:
        for sid in writer.missing():
            claim = claims.take(sid)
            assert not writer.stands(sid)
            writer.write(sid, groups.take(plan[sid]), {})
            claim.end()
        writer.seal({})
    seconds = time.perf_counter() - started
    print(f"\n{count} shards filled in {seconds:.1f} s, {len(listings)} listings")
    assert len(listings) < 10
    assert open_cache(tmp_path, writer.key).n_groups == count


@pytest.mark.parametrize("count", [QUICK, pytest.param(MANY, marks=pytest.mark.campaign)])
def test_gc_ls_and_nearest_look_at_every_cache_a_few_times(tmp_path, monkeypatch, count):
    store, recipe = many_caches(tmp_path, count)
    for key in store.keys():  # noqa: SIM118 - a store is no dict
        os.utime(store.use_file(key), (time.time() - 400 * 86400,) * 2)
    other = {**recipe, "groups": {**recipe["groups"], "seed": count}}
    steps = {
        "gc, looking": lambda: gc(store, unused_days=30),
        "ls": store.summaries,
        "nearest": lambda: nearest(store, other),
        "gc": lambda: gc(store, unused_days=30, dry_run=False),
    }
    for name, step in steps.items():
        started = time.perf_counter()
        with counted(monkeypatch, "listdir") as listings:
            step()
        print(f"\n{name} of {count} caches: {time.perf_counter() - started:.1f} s, {len(listings)} listings")
        assert len(listings) < 12 * count
    assert store.keys() == []
