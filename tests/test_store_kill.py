"""Writers killed before every system call: what they leave is whole or nothing, and resuming gives the same bytes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from store_cases import Part, World, same, tree
from store_killed_writer import world_in

from fpo.errors import CacheIncomplete, CacheMissing
from fpo.store import open_cache, verify
from fpo.store.format.encoding import decode_shard
from fpo.store.format.manifest import recipe_facts
from fpo.store.sealed import finished_shards

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked writers")


# A file takes seven or eight calls: with steps of 17 every one of them is somewhere the last.
@pytest.fixture(scope="module", params=[17, pytest.param(1, marks=pytest.mark.campaign)], ids=["some", "all"])
def graves(request, tmp_path_factory):
    """The stores of writers killed before their n-th system call, for every n or for some."""
    folder = tmp_path_factory.mktemp("killed")
    here = Path(__file__).parent
    script = [sys.executable, str(here / "store_killed_writer.py"), str(folder), str(request.param)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # A base of 3 shards and a column of 5 have as many records, and a recipe and a manifest each: every file at least
    # open, write, fsync, link, unlink, open, fsync.
    assert int(done.stdout) >= 20 * 7
    return sorted(folder.iterdir())


def without_provenance(files: dict[str, bytes]) -> dict[str, bytes]:
    """A record says how its shard came to be; an adopted shard came to be otherwise."""
    return {name: data for name, data in files.items() if "records/" not in name}


def test_a_killed_and_resumed_cache_has_the_same_bytes(graves, tmp_path):
    whole = world_in(tmp_path / "whole")
    whole.fill()
    expected = tree(whole.path)
    for grave in graves:
        world = world_in(shutil.copytree(grave, tmp_path / grave.name))
        world.fill()
        found = tree(world.path)
        assert without_provenance(found) == without_provenance(expected), grave.name
        assert set(found) == set(expected), grave.name
        report = verify(world.store, world.key)
        assert (report.problems, report.shards, list(report.columns.values())) == ([], 3, [5]), grave.name


def test_what_a_killed_writer_committed_is_whole_and_nothing_else_is_read(graves):
    """And what has a manifest holds all of its shards."""
    committed = 0
    for grave in graves:
        world = world_in(grave)
        for part in (Part(world), Part(world, 0)):
            folder = world.store.folder(world.key)
            if part.column is not None:
                folder = folder.inside(f"columns/{part.path.name}")
            bounds = recipe_facts(part.recipe).bounds
            done = finished_shards(folder, len(part.plan))
            for sid in done:
                data = folder.read(f"shards/{sid:06d}.zarr.zip", 10**6)
                assert same(decode_shard(data, part.path.name, sid, bounds), part.rows(sid))
            assert len(done) == len(part.plan) or not (part.path / "manifest.json").exists()
            committed += len(done)
    assert committed > len(graves)


def test_a_reader_sees_the_base_when_it_is_sealed_and_the_column_when_that_is(graves):
    seen = []
    for grave in graves:
        world = world_in(grave)
        for specs in ((), world.specs):
            try:
                cache = open_cache(world.store, world.key, columns=specs)
            except (CacheMissing, CacheIncomplete):
                continue
            assert all(len(cache.shard(sid)) == len(world.plan[sid]) for sid in range(3))
            seen.append(len(specs))
    assert seen.count(0) > seen.count(1) > 0


def test_a_killed_cache_opens_only_when_sealed(tmp_path):
    world = World(tmp_path)
    with pytest.raises(CacheMissing, match="it is empty"):
        open_cache(world.store, "ab")
    writer = world.writer()
    writer.write(1, world.shard(1), {})
    with pytest.raises(CacheIncomplete, match=r"1 of 3 shards are done; finish it with: fpo cache RECIPE"):
        open_cache(world.store, writer.key[:8])
