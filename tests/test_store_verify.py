"""Doubting a cache with its columns: every kind of damage is found, named by its file, and put back."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time

import numpy as np
import pytest
from store_cases import EVERY_FEATURE, FEATURES, HIDDEN_GRAM, SPECS, TOP_LOGITS, World, make_column, same, tree

from fpo.canonical import parse_checked_json
from fpo.errors import CacheConflict, CacheDamaged, CacheMissing
from fpo.store import CacheWriter, ColumnRows, Rebuild, Store, check_changed, column_recipe, open_cache, pull, verify
from fpo.store.format.manifest import record_name

LEVELS = ("sizes", "checksums", "all")


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path / "store")
    world.fill()
    return world


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_every_kind_of_column_is_verified_in_as_many_steps_as_there_are_shards(tmp_path):
    world = World(tmp_path, specs=SPECS)
    world.fill()
    steps = []
    report = verify(world.store, world.key, lambda *at: steps.append(at))
    assert (report.ok, report.shards, report.groups, report.notes) == (True, 3, 5, [])
    # The first column is cut into 5 shards, the other five as the base is.
    assert report.columns == {world.column_key(n): 5 if n == 0 else 3 for n in range(len(SPECS))}
    assert steps == [(n, 3 + 5 + 5 * 3) for n in range(1, 24)]


DAMAGE = {
    "a flipped bit": ("shards/000003.zarr.zip", flip, "checksums"),
    "a short shard": ("shards/000003.zarr.zip", lambda path: path.write_bytes(path.read_bytes()[:-1]), "sizes"),
    "no shard": ("shards/000003.zarr.zip", os.unlink, "sizes"),
    "another shard": (
        "shards/000003.zarr.zip",
        lambda path: shutil.copy(path.with_name("000001.zarr.zip"), path),
        "checksums",
    ),
    "a damaged record": ("records/000002.json", flip, "sizes"),
    "no record": ("records/000002.json", os.unlink, "sizes"),
    "a damaged manifest": ("manifest.json", flip, "sizes"),
    "a damaged recipe": ("recipe.json", flip, "sizes"),
    "no recipe": ("recipe.json", os.unlink, "sizes"),
    "a stranger": ("shards/extra", lambda path: path.write_bytes(b"1"), "sizes"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_to_a_column_is_found_and_named_and_the_base_passes(world, what):
    name, damage, least = DAMAGE[what]
    path = world.column_path(0) / name
    damage(path)
    for level in LEVELS[LEVELS.index(least) :]:
        report = verify(world.store, world.key, level=level)
        assert any(str(path) in problem for problem in report.problems), (level, report)
        assert (report.shards, report.columns[world.column_key(1)]) == (3, 3)
        assert report.columns.get(world.column_key(0), 0) <= 5
    assert verify(world.store, world.key, columns=()).ok
    assert verify(world.store, world.key, columns=[world.column_key(1)[:9]]).ok


def rows(world: World, spec, ids) -> ColumnRows:
    """Of a column of this spec beside the groups with these ids."""
    groups = world.groups.take(ids)
    return ColumnRows(groups.group_id, len(groups.completion_digest), make_column(spec, groups))


@pytest.mark.parametrize("spec", [TOP_LOGITS, HIDDEN_GRAM])
def test_a_column_of_other_completions_is_found_where_nothing_but_the_base_tells(tmp_path, spec):
    """Right in itself and sealed: the tokens that it was scored for are others."""
    others = [(2, (1, 1)), (0, (3, 2)), (4, (5, 2)), (1, (2, 2)), (3, (1,))]
    ours, theirs = World(tmp_path / "ours", (spec,)), World(tmp_path / "theirs", (spec,), others)
    ours.fill_base()
    writer = CacheWriter(ours.store, column_recipe(ours.key, spec, [2, 2, 1]), ours.plan)
    for sid in range(3):
        writer.write(sid, rows(theirs, spec, theirs.plan[sid]), {})
    writer.seal({})
    key = writer.key
    report = verify(ours.store, ours.key)
    assert report.columns[key] == 3
    assert report.problems
    assert all(f"{key}/shards/00000" in problem and "is damaged" in problem for problem in report.problems)
    assert verify(ours.store, ours.key, level="checksums").ok


def test_a_column_that_is_cut_otherwise_than_its_base_is_named(world):
    """Five groups as 3 + 2: the base has 2 + 2 + 1."""
    plan = [np.array([3, 0, 4]), np.array([1, 2])]
    writer = CacheWriter(world.store, column_recipe(world.key, EVERY_FEATURE, [3, 2]), plan)
    for sid, ids in enumerate(plan):
        writer.write(sid, rows(world, EVERY_FEATURE, ids), {})
    writer.seal({})
    (problem,) = verify(world.store, world.key).problems
    assert problem.startswith(f"{world.path}/columns/{writer.key}/recipe.json: its shards are not cut from the base's")
    with pytest.raises(CacheDamaged, match="its shards are not cut from the base's"):
        open_cache(world.store, world.key, columns=[EVERY_FEATURE])


def test_the_column_of_another_base_is_refused_by_name_everywhere(world, tmp_path):
    other = World(tmp_path / "other", (FEATURES,))
    other.recipe["groups"]["seed"] = 8
    other.fill()
    foreign = world.path / "columns" / other.column_key(0)
    shutil.copytree(other.column_path(0), foreign)
    (problem,) = verify(world.store, world.key).problems
    assert problem.startswith(f"{foreign}/recipe.json is no column of cache {world.key[:12]}")
    with pytest.raises(CacheDamaged, match="is no column of cache"):
        pull(world.store, world.key, tmp_path / "there")
    assert not (tmp_path / "there" / world.key / "manifest.json").exists()
    with pytest.raises(CacheDamaged, match="is no column of cache"):
        Rebuild(world.store, world.key, column=other.column_key(0))
    shown = {column.key: column.state for column in world.store.summary(world.key).columns}
    assert shown[other.column_key(0)] == "damaged"


@pytest.mark.parametrize("name", ["README", "ab", "\x1b[2J", "AB" * 32])
def test_strangers_among_the_columns_are_named_in_printable_words(world, name):
    (world.path / "columns" / name).mkdir()
    (problem,) = verify(world.store, world.key).problems
    assert problem.isprintable()
    assert problem.endswith("does not belong to this cache")
    assert len(world.store.summary(world.key).columns) == 2


def test_a_column_that_is_a_link_does_not_hide_the_others(world, tmp_path):
    shutil.move(world.column_path(0), tmp_path / "far")
    world.column_path(0).symlink_to(tmp_path / "far")
    report = verify(world.store, world.key)
    assert [f"{world.column_path(0)} is a link" in problem for problem in report.problems] == [True]
    assert report.columns == {world.column_key(1): 3}
    columns = {column.key: column.state for column in world.store.summary(world.key).columns}
    assert columns == {world.column_key(0): "damaged", world.column_key(1): "complete"}
    assert [column.held for column in open_cache(world.store, world.key, columns="all").columns] == [TOP_LOGITS]


def test_an_unfinished_column_is_a_note_and_no_problem(tmp_path):
    world = World(tmp_path)
    world.fill_base()
    world.column_writer(0).write(1, world.column_shard(0, 1), {})
    (world.path / "columns" / ("cd" * 32) / "shards").mkdir(parents=True)
    report = verify(world.store, world.key)
    assert (report.ok, report.columns) == (True, {})
    assert sorted(note.partition(" is not finished ")[2] for note in report.notes) == [
        "(empty); finish it with: fpo cache RECIPE",
        "(features at model.layers.0, top 4: [5a5a5a5a], 1 of 5 shards); finish it with: fpo cache RECIPE",
    ]
    with pytest.raises(CacheMissing, match="has no column whose key starts with 'ffff'; it has"):
        verify(world.store, world.key, columns=["ffff"])


# Rebuild


def test_a_damaged_shard_of_a_column_is_put_back_and_the_column_is_the_same_answer(world):
    before = tree(world.path)
    flip(world.column_path(0) / "shards/000003.zarr.zip")
    (world.column_path(0) / "records/000001.json").unlink()
    assert Rebuild(world.store, world.key).damaged == []
    rebuild = Rebuild(world.store, world.key, column=world.column_key(0))
    assert rebuild.damaged == [1, 3]
    shard = world.column_shard(0, 3)
    column = dataclasses.replace(shard.column, tail_sq=shard.column.tail_sq + np.float32(1))
    with pytest.raises(CacheConflict, match=f"shard 3 of {world.column_key(0)[:12]} comes out with the sha256"):
        rebuild.put(3, dataclasses.replace(shard, column=column))
    for sid in rebuild.damaged:
        rebuild.put(sid, world.column_shard(0, sid))
    del rebuild
    after = tree(world.path)
    record = f"columns/{world.column_key(0)}/records/000001.json"
    assert parse_checked_json(after.pop(record))["provenance"]["rebuilt"] is True
    del before[record]
    assert after == before
    assert verify(world.store, world.key).ok


def test_a_rebuild_knows_from_where_the_rows_of_a_column_were_copied(tmp_path):
    world = World(tmp_path, specs=(TOP_LOGITS,))
    world.fill_base()
    writer = world.column_writer(0)
    for sid in writer.missing():
        copied = {"rows": {"reused": {"ab" * 32: 1}, "scored": 0}} if sid == 2 else {}
        writer.write(sid, world.column_shard(0, sid), copied)
    writer.seal({})
    rebuild = Rebuild(world.store, world.key, column=world.column_key(0))
    assert [rebuild.sources(sid) for sid in range(5)] == [[[]], [[]], [["ab" * 32]], [[]], [[]]]
    (world.column_path(0) / record_name(2)).unlink()
    assert rebuild.sources(2) == [[], None]


def test_a_pull_repairs_the_damaged_shard_of_a_column(world, tmp_path):
    mine = Store(tmp_path / "mine")
    pull(world.store, world.key, mine)
    path = mine.path(world.key) / "columns" / world.column_key(0) / "shards/000003.zarr.zip"
    flip(path)
    assert pull(world.store, world.key, mine).repaired == ()
    assert not verify(mine, world.key).ok
    assert pull(world.store, world.key, mine, repair=True).repaired == (str(path),)
    assert tree(mine.path(world.key)) == tree(world.path)


def test_what_changed_since_the_seal_is_read_of_the_base_and_the_open_columns(world):
    flip(world.column_path(0) / "shards/000003.zarr.zip")
    later = time.time() + 10
    os.utime(world.column_path(0) / "shards/000003.zarr.zip", (later, later))
    check_changed(open_cache(world.store, world.key))
    check_changed(open_cache(world.store, world.key, columns=[TOP_LOGITS]))
    with pytest.raises(CacheDamaged, match=rf"{world.column_key(0)}/shards/000003\.zarr\.zip"):
        check_changed(open_cache(world.store, world.key, columns="all"))


def test_a_reader_meets_a_damaged_column_only_where_it_asks_for_it(world):
    flip(world.column_path(0) / "shards/000000.zarr.zip")
    cache = open_cache(world.store, world.key, columns=[TOP_LOGITS])
    assert same(cache.shard(0).columns[0], world.beside(0).columns[1])
    with pytest.raises(CacheDamaged, match=rf"{world.column_key(0)}/shards/000000\.zarr\.zip"):
        open_cache(world.store, world.key, columns=[FEATURES]).shard(0)
