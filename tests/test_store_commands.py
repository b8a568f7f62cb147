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
from store_cases import World

from fpo import cli
from fpo.store import gc, tag

EVIL = "\x1b]0;owned\x07\x9b31m\nerror: all is well\u202e"
NAMES = {
    "reference": {"model": "org/model", "revision": None, "adapter": None},
    "features": [{"sae": "org/sae-a"}, {"sae": "org/sae-b"}],
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


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path / "store")
    world.key = fill(world, {"inputs": NAMES})
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
    evil = {
        "reference": {"model": EVIL, "revision": EVIL, "adapter": EVIL},
        "features": [{"sae": EVIL}, {"sae": EVIL}],
        "data": {"source": EVIL, "split": EVIL, EVIL: EVIL},
    }
    world.recipe["scorer"]["features"][0]["hookpoint"] = EVIL
    world.recipe["scorer"][EVIL] = EVIL
    return fill(world, {"inputs": evil})


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
    assert "feature     model.layers.0 top 4: org/sae-a" in said
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
    assert f"{world.key[:12]}  5 pairs" in said
    assert "org/model" in said
    assert "remove it? [y/N]" in said
    assert world.store.keys() == [world.key]
    code, said = answered(world, "y")
    assert (code, world.store.keys()) == (0, [])
    assert f"removed {world.key[:12]}" in said


def test_a_build_that_failed_before_its_first_shard_is_listed_by_its_names(world, fpo):
    other = World(world.store.root)
    other.recipe["pairs"]["seed"] = 8
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
