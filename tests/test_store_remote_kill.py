"""Pushes and pulls that are killed anywhere, then continued."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from store_cases import TOP_LOGITS, World, tree
from store_servers import BUCKET, s3_environment, s3_server, web_server

from fpo.errors import CacheIncomplete, CacheMissing
from fpo.store import Store, open_cache, pull, push, verify

pytest.importorskip("obstore")
pytestmark = [pytest.mark.long, pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")]

BASE = ("recipe.json", "manifest.json", "shards/", "records/")
every_point = pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.campaign)])


def run_killed(what: str, folder: Path, url: str, step: int, environment: dict[str, str]) -> list[int]:
    """The points at which a transfer was killed."""
    here = Path(__file__).parent
    script = [sys.executable, str(here / "store_killed_transfer.py"), what, str(folder), url, str(step)]
    done = subprocess.run(script, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(range(1, int(done.stdout), step))


@every_point
def test_a_killed_push_continues_and_no_reader_sees_a_part(tmp_path, monkeypatch, step):
    pytest.importorskip("moto")
    with s3_server() as port:
        for name, value in s3_environment(port).items():
            monkeypatch.setenv(name, value)
        url = f"s3://{BUCKET}/killed"
        points = run_killed("push", tmp_path, url, step, s3_environment(port))
        # claim, recipe, 3 shards, 3 records, manifest, and the same of a column with 5 shards: each at least put and
        # looked at, before and after
        assert points[-1] > (9 + 13) * 2 * 2 - step
        world = World(tmp_path / "source", specs=(TOP_LOGITS,))
        key, sealed = world.key, 0
        for n in points:
            there = f"{url}/{n}"
            try:
                open_cache(there, key)
                sealed += 1
            except (CacheMissing, CacheIncomplete):
                pass
            push(world.store, key, there)
            again = push(world.store, key, there)
            assert (again.moved, again.present) == (0, 20), n
            report = verify(there, key)
            assert report.ok, (n, report.problems)
            assert report.columns == {world.column_key(0): 5}, n
            assert open_cache(there, key).digest == open_cache(world.store, key).digest
        assert sealed < len(points)
        print(f"push: killed at {len(points)} points, {sealed} of them after the manifest")


@every_point
def test_a_killed_pull_continues_to_the_same_bytes(tmp_path, step):
    world = World(tmp_path / "source", specs=(TOP_LOGITS,))
    key = world.fill().key
    expected = tree(world.store.path(key))
    with web_server(world.store.root) as web:
        points = run_killed("pull", tmp_path, web.url, step, {})
        # 3 shards, 3 records, recipe and manifest, and the same of a column with 5 shards: each at least open,
        # write, fsync, link, unlink, open, fsync
        assert points[-1] > (8 + 12) * 7 - step
        for n in points:
            mine = Store(tmp_path / f"{n}")
            found = tree(mine.path(key))
            # What stands under its final name is whole, whenever the killer came.
            assert all(expected[name] == data for name, data in found.items()), n
            for part in ("", f"columns/{world.column_key(0)}/"):
                whole = {name for name in expected if name.startswith(part or tuple(BASE))}
                assert f"{part}manifest.json" not in found or whole <= set(found), n
            assert not any(name.startswith("columns/") for name in found) or "manifest.json" in found, n
            pull(web.url, key, mine, columns=[world.column_key(0)])
            assert tree(mine.path(key)) == expected, n
        print(f"pull: killed at {len(points)} points")
