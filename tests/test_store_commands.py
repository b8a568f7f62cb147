"""What the store's commands print: names, numbers, nothing that a stranger could make a terminal do."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_cases import EVERY_FEATURE, FEATURES, World

from fpo import cli
from fpo.store import gc, tag

EVIL = "\x1b]0;owned\x07\x9b31m\nerror: all is well\u202e"
NAMES = {
    "reference": {"model": "org/model", "revision": None, "adapter": None},
    "data": {"source": "org/pairs", "split": "train"},
}


def fill(world: World, provenance: dict, seal: bool = True) -> str:
    writer = world.writer()
    for sid in writer.missing():
        writer.write(sid, world.shard(sid), provenance)
    if seal:
        facts = {"self_check": [{"l0": "12.340000000000001", "advertised_l0": "88.21864318847656"}], EVIL: EVIL}
        writer.seal(facts)
    return writer.key


def fill_column(world: World, n: int, inputs: dict) -> None:
    writer = world.column_writer(n)
    for sid in writer.missing():
        writer.write(sid, world.column_shard(n, sid), {"inputs": inputs})
    writer.seal({})


@pytest.fixture
def world(tmp_path):
    """A cache with a column that is finished and one that is not."""
    world = World(tmp_path / "store", specs=(FEATURES, EVERY_FEATURE))
    fill(world, {"inputs": NAMES})
    fill_column(world, 0, {"sae": "org/sae-a"})
    world.column_writer(1).write(0, world.column_shard(1, 0), {"inputs": {"sae": "org/sae-b"}})
    return world


@pytest.fixture
def fpo(monkeypatch, capsys):
    def run(*arguments: object, expect: int = 0) -> str:
        """All that a command prints."""
        monkeypatch.setattr(sys, "argv", ["fpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        assert (end.value.code or 0) == expect, captured
        return captured.out + captured.err

    return run


def hostile(world: World) -> str:
    """The same groups as another cache, whose maker is a stranger."""
    evil = {
        "reference": {"model": EVIL, "revision": EVIL, "adapter": EVIL},
        "data": {"source": EVIL, "split": EVIL, EVIL: EVIL},
    }
    theirs = World(world.store.root, specs=(FEATURES | {"hookpoint": EVIL}, EVERY_FEATURE | {"hookpoint": EVIL}))
    theirs.recipe["scorer"][EVIL] = EVIL
    fill(theirs, {"inputs": evil})
    fill_column(theirs, 0, {"sae": EVIL, EVIL: EVIL})
    theirs.column_writer(1)
    return theirs.key


@pytest.mark.parametrize("command", ["ls", "show", "diff", "gc", "rm", "error", "verify"])
def test_a_strangers_names_make_the_terminal_do_nothing(world, fpo, tmp_path, command):
    honest, key = world.key, hostile(world)
    store = ("--store", world.store.root)
    litter = world.store.path(key) / "tmp" / EVIL.replace("\x07", "")
    litter.write_bytes(b"1")
    os.utime(litter, (0, 0))
    said = {
        "ls": lambda: fpo("store", "ls", *store),
        "show": lambda: fpo("store", "show", key, *store),
        "diff": lambda: fpo("store", "diff", honest, key, *store),
        "gc": lambda: fpo("store", "gc", *store),
        "rm": lambda: fpo("store", "rm", key, "--yes", *store),
        "error": lambda: fpo("store", "show", EVIL, *store, expect=1),
        "verify": lambda: fpo("store", "verify", key, *store),
    }[command]()
    assert said
    assert all(char.isprintable() or char == "\n" for char in said)
    if command != "error":
        assert "\nerror: all is well" not in said


def test_show_says_what_the_digests_stand_for_and_numbers_as_numbers(world, fpo):
    said = fpo("store", "show", world.key, "--store", world.store.root)
    assert "reference   org/model" in said
    finished, begun = (world.column_key(n)[:12] for n in (0, 1))
    assert f"column      {finished}  features at model.layers.0, top 4: org/sae-a [5a5a5a5a], complete, " in said
    assert f"column      {begun}  features at model.layers.1, top all: org/sae-b [5a5a5a5a], 1 of 3 shards, " in said
    assert "data        org/pairs train" in said
    assert '"advertised_l0": 88.2' in said
    assert '"l0": 12.3\n' in said or '"l0": 12.3,' in said


def test_a_folder_that_is_not_there_is_no_empty_store(fpo, tmp_path):
    for command in ("ls", "gc"):
        said = fpo("store", command, "--store", tmp_path / "none", expect=1)
        assert said == (
            f"error: there is no folder {tmp_path}/none; check --store and FPO_STORE, "
            "or make one with: fpo cache RECIPE\n"
        )
    assert "there is no such folder" in fpo("store", "show", "abcd", "--store", tmp_path / "none", expect=1)


def test_ls_names_the_tags_of_caches_that_are_not_here(world, fpo):
    tag(world.store, world.key, "mine")
    os.rename(world.store.path(world.key), world.store.root / "elsewhere")
    said = fpo("store", "ls", "--store", world.store.root)
    assert f"the tag mine names {world.key[:12]}, which is not here" in said


def test_gc_reports_what_it_could_not_do_and_exits_with_1(world, fpo):
    tmp = world.store.path(world.key) / "tmp"
    tmp.rmdir()
    tmp.symlink_to("/tmp")
    said = fpo("store", "gc", "--yes", "--store", world.store.root, expect=1)
    assert "0 B  freed" in said
    assert f"error: 1 thing could not be looked at or removed\n  {tmp} is a link" in said
    said = fpo("store", "gc", "--json", "--store", world.store.root, expect=1)
    assert len(json.loads(said.split("error:")[0])["problems"]) == 1


def answered(world: World, answer: str) -> tuple[int, str]:
    """Exit code and output of `fpo store rm` on a terminal where somebody types this."""
    ours, theirs = pty.openpty()
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "fpo", "store", "rm", world.key[:8], "--store", str(world.store.root)]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=root, text=True
    )
    os.write(ours, f"{answer}\n".encode())
    said, _ = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    return process.returncode, said


def test_rm_says_what_would_go_and_asks(world):
    code, said = answered(world, "n")
    assert code == 1
    assert f"{world.key[:12]}  5 groups" in said
    assert "org/model" in said
    assert "remove it? [y/N]" in said
    assert world.store.keys() == [world.key]
    code, said = answered(world, "y")
    assert (code, world.store.keys()) == (0, [])
    assert f"removed {world.key[:12]}" in said


def test_a_build_that_failed_before_its_first_shard_is_listed_by_its_names(world, fpo):
    other = World(world.store.root)
    other.recipe["groups"]["seed"] = 8
    begun = other.writer().key
    world.store.note_names(begun, NAMES)
    said = fpo("store", "ls", "--store", world.store.root)
    line = said.index(begun[:12])
    assert "0 of 3 shards" in said[line:]
    assert said.count("org/model") == said.count("org/pairs train") == 2
    fpo("store", "rm", begun, "--yes", "--store", world.store.root)
    assert os.listdir(world.store.root / ".state/names") == []


def test_gc_stays_a_dry_run_without_yes(world, fpo):
    note = world.store.use_file(world.key)
    os.utime(note, (time.time() - 400 * 86400,) * 2)
    said = fpo("store", "gc", "--unused-days", "30", "--store", world.store.root)
    assert "would be freed; add --yes to remove" in said
    assert world.store.keys() == [world.key]
    assert Path(note).exists()
    assert gc(world.store, unused_days=30).items[0].key == world.key


def test_ls_shows_columns_in_short_and_in_json_completely(world, fpo):
    said = fpo("store", "ls", "--store", world.store.root)
    keys = [world.column_key(n)[:12] for n in (0, 1)]
    assert f"+ {keys[0]}  features at model.layers.0, top 4: org/sae-a [5a5a5a5a]\n" in said
    assert f"+ {keys[1]}  features at model.layers.1, top all: org/sae-b [5a5a5a5a], 1 of 3 shards\n" in said
    (facts,) = json.loads(fpo("store", "ls", "--json", "--store", world.store.root))
    columns = {column["key"]: column for column in facts["columns"]}
    assert set(columns) == {world.column_key(0), world.column_key(1)}
    finished = columns[world.column_key(0)]
    assert (finished["spec"], finished["state"], finished["shards"]) == (FEATURES, "complete", 5)
    assert facts["base_bytes"] + sum(column["bytes"] for column in columns.values()) == facts["bytes"]


def test_a_cache_of_many_columns_is_listed_by_the_first_four(tmp_path, fpo):
    world = World(tmp_path, specs=[FEATURES | {"hookpoint": f"model.layers.{n}"} for n in range(6)])
    world.fill()
    said = fpo("store", "ls", "--store", tmp_path)
    assert said.count("  features at") == 4
    assert f"+ 2 more: fpo store show {world.key[:12]}" in said
    assert fpo("store", "show", world.key, "--store", tmp_path).count("column      ") == 6


def test_usage_tells_the_arrays_of_base_and_columns_apart(world, fpo):
    said = fpo("store", "show", world.key, "--usage", "--json", "--store", world.store.root)
    usage = json.loads(said[said.index("{") :])["usage"]
    sizes = sum(path.stat().st_size for path in world.path.rglob("*.zarr.zip") if world.column_key(1) not in str(path))
    assert sum(array["stored"] for array in usage) == sizes
    acts = [array for array in usage if array["name"] == "acts"]
    kept = len(world.groups.columns[0].acts)
    assert [(array["column"], array["raw"]) for array in acts] == [(world.column_key(0), 4 * kept)]


def test_diff_names_the_columns_that_one_cache_lacks(world, fpo):
    other = World(world.store.root, specs=(EVERY_FEATURE,))
    other.recipe["groups"]["seed"] = 8
    fill(other, {})
    said = fpo("store", "diff", world.key, other.key, "--store", world.store.root)
    assert "groups.seed: 7 -> 8  (the same groups in another order)" in said
    assert f"only {world.key[:12]} has features at model.layers.0, top 4: org/sae-a [5a5a5a5a]" in said
    # What is not finished is nobody's yet.
    assert "model.layers.1" not in said


def test_rm_takes_one_column_and_leaves_the_rest(world, fpo):
    column, store = world.column_key(0), ("--store", world.store.root)
    said = fpo("store", "rm", world.key, "--column", column[:8], *store, expect=1)
    assert f"to remove it: fpo store rm {world.key[:12]} --column {column[:12]} --yes" in said
    said = fpo("store", "rm", world.key, "--column", column[:8], "--yes", *store)
    assert f"removed {column[:12]}" in said
    assert os.listdir(world.path / "columns") == [world.column_key(1)]
    assert fpo("store", "verify", world.key, *store).startswith(f"{world.key[:12]}: 3 shards, 5 groups: ")


def test_verify_says_which_columns_it_looked_at_and_which_are_not_finished(world, fpo):
    store = ("--store", world.store.root)
    said = fpo("store", "verify", world.key, *store)
    assert "3 shards, 5 groups and 1 column: all as the manifest says" in said
    assert "is not finished (features at model.layers.1, top all: org/sae-b [5a5a5a5a], 1 of 3 shards)" in said
    assert "3 shards, 5 groups: all" in fpo("store", "verify", world.key, "--no-columns", *store)
    said = fpo("store", "verify", world.key, "--column", world.column_key(1)[:6], *store, expect=1)
    assert "manifest.json is missing" in said
    said = fpo("store", "verify", world.key, "--column", "ab", "--no-columns", *store, expect=2)
    assert "--column and --no-columns exclude each other" in said


def test_push_and_pull_take_the_columns_that_are_named(world, fpo, tmp_path):
    fill_column(world, 1, {})
    target, store = tmp_path / "there", ("--store", world.store.root)
    assert "columns" not in fpo("store", "push", world.key, target, "--no-columns", *store)
    assert not (target / world.key / "columns").exists()
    said = fpo("store", "push", world.key, target, "--column", world.column_key(0)[:6], *store)
    assert f"column {world.column_key(0)[:12]}, features at model.layers.0, top 4: 12 moved, 0 there already" in said
    said = fpo("store", "pull", world.key, world.store.root, "--store", target, "--json")
    facts = json.loads(said[said.index("{") :])
    assert (facts["base"]["moved"], facts["base"]["present"]) == (0, 8)
    moved = {column["key"]: column["moved"] for column in facts["columns"]}
    assert moved == {world.column_key(0): 0, world.column_key(1): 8}
