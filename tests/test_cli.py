"""The commands as a user meets them: help, output, exit codes, and the README that names them all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main
from safetensors import SafetensorError
from tiny_world import TinyWorld, build_tiny_world

from fpo import cli
from fpo.commands.align import align_command
from fpo.commands.bars import byte_bar
from fpo.errors import RunError
from fpo.recipe import recipe_schema
from fpo.store import counted

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), 24, 8)


def fpo(world: TinyWorld, *arguments: object, expect: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command, run in the world's folder."""
    environment = {
        **os.environ,
        "FPO_STORE": str(world.store),
        "XDG_CACHE_HOME": str(world.root / "xdg"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    done = subprocess.run(
        [sys.executable, "-m", "fpo", *map(str, arguments)],
        cwd=world.root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout, done.stderr


def commands() -> list[list[str]]:
    """Every command of the command line, groups opened."""

    def leaves(command: object, path: list[str]) -> list[list[str]]:
        children = getattr(command, "commands", None)
        if not children:
            return [path]
        return [leaf for name, child in children.items() for leaf in leaves(child, [*path, name])]

    return leaves(typer.main.get_command(cli.app), [])


@pytest.mark.long
def test_every_command_has_help_and_stands_in_the_readme(world: TinyWorld) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ["cache"] in commands()
    for command in commands():
        out, _ = fpo(world, *command, "--help")
        assert "Usage" in out
        assert f"fpo {' '.join(command)}" in readme


def test_a_run_folder_may_lie_in_the_home(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in --output=~/runs/mine, which no shell expands."""
    from fpo import stage2_align

    asked: list[Path] = []

    def align(recipe: object, cache: object, output: Path, *_: object) -> None:
        asked.append(output)
        raise RunError("enough")

    monkeypatch.setenv("HOME", str(world.root))
    monkeypatch.setattr("fpo.commands.align.recipe_cache", lambda *_, **__: None)
    monkeypatch.setattr(stage2_align, "align", align)
    with pytest.raises(RunError, match="enough"):
        align_command(world.recipe_file(), output=Path("~/runs/mine"), resume=False)
    assert asked == [world.root / "runs/mine"]


@pytest.mark.long
def test_the_way_of_a_pair_through_the_commands(world: TinyWorld) -> None:
    recipe = world.recipe_file(training={"max_steps": 3})
    out, err = fpo(world, "align", recipe, expect=1)
    assert out == ""
    assert "does not hold this recipe's cache" in err
    assert f"build it with: fpo cache {recipe}" in err
    assert err.startswith("opening the cache ...\nerror: ")

    _, err = fpo(world, "align", recipe, "--set", "data.split=train[:9]", expect=1)
    assert f"build it with: fpo cache {recipe} --set 'data.split=train[:9]'" in err

    out, err = fpo(world, "cache", recipe)
    assert "24 of 24 pairs kept" in out
    size = r"\d+\.\d KiB, [\d,]+ bytes per pair, built"
    assert re.search(rf"^  base        2 shards, {size}\n", out, re.MULTILINE)
    assert re.search(rf"^  column      features at model\.layers\.1, top 16: {size}\n", out, re.MULTILINE)
    assert "built       2 shards in" in out
    assert ": 48 completions scored (" in out
    assert re.search(r"^  prompt      column prompt, \d+\.\d tokens on average\n", out, re.MULTILINE)
    assert err == f"loading the reference {world.root / 'model'} ...\n"  # no terminal, no progress bar
    out, _ = fpo(world, "cache", recipe, "--json")
    caches = json.loads(out)
    assert [(cache["groups"], cache["completions"]) for cache in caches] == [(24, 48), (8, 16)]
    assert [cache["built_shards"] for cache in caches] == [0, 0]
    key = caches[0]["key"]

    out, err = fpo(world, "align", recipe, "--output", "run")
    assert "trained     3 steps of 4 pairs (1 process x 4 x 1)" in out
    column = caches[0]["columns"][0]["key"]
    assert f"\ncolumn      {column[:12]} (manifest " in out
    assert err.startswith("opening the cache ...\nloading the policy ...\nalign: step 1/3, loss 0.693 margin ")
    _, err = fpo(world, "align", recipe, "--output", "run", expect=1)
    assert "\nerror: run: this run exists; continue it with --resume" in err
    out, _ = fpo(world, "evaluate", "run", "--json")
    assert {"eval_loss", "eval_rewards/accuracies"} <= json.loads(out).keys()
    assert json.loads((world.root / "run" / "evaluation.json").read_text()) == json.loads(out)

    out, _ = fpo(world, "store", "ls")
    assert key[:12] in out
    assert "complete" in out
    out, _ = fpo(world, "store", "show", key[:8], "--json")
    assert json.loads(out)["key"] == key
    out, _ = fpo(world, "store", "verify", key[:8])
    assert "24 groups and 1 column: all as the manifest says" in out

    tag, _ = fpo(world, "store", "tag", key[:8], "first")
    assert tag == f"first -> {key[:12]}\n"
    out, _ = fpo(world, "store", "diff", "first", caches[1]["key"][:10])
    assert "groups.digest" in out
    assert "scorer" not in out
    out, _ = fpo(world, "store", "verify", "first", "--recompute", "6", "--recipe", recipe)
    assert "6 groups scored again: token log-probs differ by" in out
    _, err = fpo(world, "store", "verify", "first", "--recompute", "6", expect=1)
    assert "--recompute needs --recipe" in err
    out, _ = fpo(world, "store", "push", "first", world.root / "other-store")
    assert f"pushed {key[:12]}" in out
    out, _ = fpo(world, "store", "pull", key[:9], world.root / "other-store", "--store", world.root / "third")
    assert f"pulled {key[:12]}" in out
    out, _ = fpo(world, "store", "show", "first", "--usage")
    assert "token_logps" in out
    out, _ = fpo(world, "store", "export", "first", world.root / "exported", "--to", "trl")
    assert "exported 24 groups" in out
    out, _ = fpo(world, "align", recipe, "--set", f"cache.store={world.root / 'third'}", "--output", "from-third")
    assert f"cache       {key[:12]}" in out
    _, err = fpo(world, "store", "rm", key[:9], "--store", world.root / "third", expect=1)
    assert f"nothing is removed without a yes; to remove it: fpo store rm {key[:12]} --yes" in err
    out, _ = fpo(world, "store", "rm", key[:9], "--store", world.root / "third", "--yes")
    assert f"removed {key[:12]}" in out
    _, err = fpo(world, "store", "rm", "first", "--yes", expect=1)
    assert "fpo store untag first" in err
    out, _ = fpo(world, "store", "gc")
    assert "would be freed; add --yes to remove" in out
    out, _ = fpo(world, "store", "untag", "first")
    assert "no longer names" in out

    shard = world.store / key / "shards" / "000001.zarr.zip"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    _, err = fpo(world, "store", "verify", key[:8], expect=1)
    assert "000001.zarr.zip" in err
    _, err = fpo(world, "align", recipe, "--output", "other", expect=1)
    assert "000001.zarr.zip" in err
    shard.write_bytes(whole)


def test_expected_failures_are_one_clear_message_and_usage_errors_exit_with_2(world: TinyWorld) -> None:
    recipe = world.recipe_file()
    out, err = fpo(world, "cache", recipe, "--set", "objective.betta=1", expect=1)
    assert out == ""
    assert re.fullmatch(r"error: .*: objective\.betta: no such field; nearest is beta\n", err)
    _, err = fpo(world, "store", "show", "0123", expect=1)
    assert err.startswith("error: no cache in ")
    fpo(world, "cache", expect=2)
    fpo(world, "cach", recipe, expect=2)


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (
            TypeError("one\ntwo"),
            "error: this is a bug, or a case that fpo does not know: TypeError: one two; the trace",
        ),
        (OSError(28, "No space left on device", "x"), "error: [Errno 28] No space left on device: 'x'; mend that and"),
        (SafetensorError("I/O error (os error 28)"), "error: I/O error (os error 28); mend that and give the same"),
    ],
)
def test_what_nobody_expected_is_one_line_and_a_file_with_the_traceback(
    failure: Exception,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail() -> None:
        raise failure

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(said)
    (log,) = tmp_path.iterdir()
    assert err.endswith(f"the traceback is in {log}\n")
    assert "raise failure" in log.read_text()

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.endswith("the traceback is shown with FPO_DEBUG=1\n")
    monkeypatch.setenv("FPO_DEBUG", "1")
    with pytest.raises(type(failure)):
        cli.main()


def test_version_and_short_help(capsys: pytest.CaptureFixture[str]) -> None:
    command = typer.main.get_command(cli.app)
    for arguments, expected in (
        (["--version"], f"fpo {version('fpo')}\n"),
        (["-h"], "Usage"),
        (["store", "-h"], "Usage"),
        (["store", "gc", "-h"], "Usage"),
    ):
        command.main(arguments, standalone_mode=False)
        assert expected in capsys.readouterr().out


def test_the_schema_for_editors_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    typer.main.get_command(cli.app).main(["schema"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == recipe_schema()


def test_what_is_counted_is_singular_where_it_is_one() -> None:
    assert [counted(number, "shard") for number in (0, 1, 2000)] == ["0 shards", "1 shard", "2,000 shards"]


def test_transfers_are_counted_in_mebibytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun mebibytes count as whole ones: 3.5 MiB are 4."""
    monkeypatch.setattr("fpo.progress.LINE_SECONDS", 0.0)
    with byte_bar("push") as advance:
        advance(2**20, 7 * 2**19)
        advance(7 * 2**19, 7 * 2**19)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("push: 1/4 MiB, ")
    assert last.startswith("push: 4/4 MiB, ")


def test_what_the_documents_point_to_is_there() -> None:
    """Links lead to files, and processes are started by the command: `-m fpo` looks into the current folder first."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        assert "-m fpo " not in text, page.name


def test_a_users_own_modules_are_not_taken_for_ours(tmp_path: Path) -> None:
    """All of ours is inside the package `fpo`; `-m` looks for modules in the current folder first."""
    for name in ("cli.py", "errors.py", "recipe.py", "progress.py", "store.py"):
        (tmp_path / name).write_text("raise SystemExit('not ours')")
    (tmp_path / "none").mkdir()
    command = [Path(sys.executable).with_name("fpo"), "store", "ls", "--store", tmp_path / "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("no caches in")


def test_looking_at_a_store_imports_no_torch(world: TinyWorld) -> None:
    code = (
        "import sys; from fpo import cli; sys.argv = ['fpo', 'store', 'ls']\ntry: cli.main()\nexcept SystemExit: pass\n"
    )
    code += "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'"
    environment = {**os.environ, "FPO_STORE": str(world.store)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, stdout=subprocess.DEVNULL)
