"""Many shards and many caches: what one costs does not grow with how many there are."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager

import numpy as np
import pytest
from store_cases import FEATURES, make_groups, make_recipe

from fpo.canonical import sha256_hex
from fpo.store import (
    CacheWriter,
    Claims,
    Manifest,
    ShardEntry,
    Store,
    cache_key,
    column_recipe,
    gc,
    groups_digest,
    nearest,
    open_cache,
)
from fpo.store.format.manifest import manifest_bytes, recipe_bytes, shard_name

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


def lists_alone(root, shards, columns):
    """A cache of so many columns of which recipes and manifests are true; its shards are files of the right size."""

    def write(folder, recipe, n_tokens):
        entries = tuple(
            ShardEntry(
                shard=sid,
                size=1000 + sid,
                sha256=sha256_hex(b"%d" % sid),
                n_groups=2000,
                n_completions=4000,
                n_tokens=n_tokens,
                rows_digest=digests[sid],
            )
            for sid in range(shards)
        )
        key = cache_key(recipe)
        totals = {name: shards * n for name, n in (("groups", 2000), ("completions", 4000), ("tokens", n_tokens))}
        manifest = Manifest(
            format=1, key=key, shards=entries, facts={}, **{f"n_{name}": n for name, n in totals.items()}
        )
        for name in ("shards", "records"):
            (folder / key / name).mkdir(parents=True)
        (folder / key / "recipe.json").write_bytes(recipe_bytes(recipe))
        (folder / key / "manifest.json").write_bytes(manifest_bytes(manifest))
        for entry in entries:
            with open(folder / key / shard_name(entry.shard), "wb") as file:
                file.truncate(entry.size)
        return key

    digests = [sha256_hex(b"rows %d" % sid) for sid in range(shards)]
    groups = {"digest": groups_digest(digests), "n_groups": 2000 * shards, "n_completions": 4000 * shards}
    groups |= {"score_mask": False, "seed": 0, "shard_groups": [2000] * shards}
    key = write(root, {"format": 1, "scorer": {"vocab_size": 100}, "groups": groups}, 400_000)
    for n in range(columns):
        spec = FEATURES | {"hookpoint": f"model.layers.{n}"}
        write(root / key / "columns", column_recipe(key, spec, [2000] * shards), 0)
    return key


@pytest.mark.parametrize(("shards", "seconds"), [(100, 0.4), pytest.param(500, 1, marks=pytest.mark.campaign)])
def test_a_million_groups_and_twenty_columns_are_listed_and_opened_within_a_second(tmp_path, shards, seconds):
    """Of this process's own time: 21 manifests are parsed once to list and once to open. 100 shards: a fifth of it."""
    key = lists_alone(tmp_path, shards, columns=20)
    started = time.process_time()
    (summary,) = Store(tmp_path).summaries()
    listed = time.process_time()
    cache = open_cache(tmp_path, key, columns="all")
    opened = time.process_time()
    print(f"\nlisted in {listed - started:.2f} s, opened in {opened - listed:.2f} s")
    assert (summary.n_groups, len(summary.columns), len(cache.columns)) == (2000 * shards, 20, 20)
    assert all(column.complete for column in summary.columns)
    assert opened - started < seconds
