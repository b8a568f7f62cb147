"""Token ids are made once per store: whoever comes second maps them, and only time depends on it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_world import TinyWorld, build_tiny_world

import fpo.stage1_cache.identity as identity_module
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage1_cache.drops import DropReport
from fpo.stage1_cache.identity import CacheIdentity, cache_identities
from fpo.stage1_cache.shared import SharedTokens
from fpo.stage1_cache.tokenise import ARRAYS, TokenisedGroups, tokenise
from fpo.store import Store, gc

pytestmark = pytest.mark.usefixtures("private_memory")

QUESTION = {"what": "some tokens"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), 12, 2)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry per time that data is tokenised."""
    calls = []

    def counted(*args: Any, **options: Any) -> TokenisedGroups:
        calls.append("tokenised")
        return tokenise(*args, **options)

    monkeypatch.setattr(identity_module, "tokenise", counted)
    return calls


def identity(world: TinyWorld, store: Path | None, **sections: Any) -> CacheIdentity:
    return cache_identities(world.recipe(**sections), None if store is None else Store(store))[0]


def assert_equal(one: TokenisedGroups, other: TokenisedGroups) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.drops == other.drops


def folder_of(store: Path) -> Path:
    """Of the only answer that the store holds."""
    (folder,) = [path for path in (store / ".state/tokens").iterdir() if path.name[0] != "."]
    return folder


def test_what_is_mapped_is_what_was_made_and_what_memory_holds(
    world: TinyWorld, tmp_path: Path, made: list[str]
) -> None:
    first, second = (identity(world, tmp_path).tokens for _ in range(2))
    assert made == ["tokenised"]
    assert_equal(first, second)
    assert_equal(second, identity(world, None).tokens)
    assert not second.input_ids.flags.writeable


def test_a_mask_is_shared_too(world: TinyWorld, tmp_path: Path, made: list[str]) -> None:
    data = {"as_messages": True, "score": "assistant", "chat_template": TAGGED}
    first, second = (identity(world, tmp_path, data=data).tokens for _ in range(2))
    assert made == ["tokenised"]
    assert first.score_mask is not None
    assert_equal(first, second)
    assert_equal(second, identity(world, None, data=data).tokens)


# The assistant says its completion; that it does so again does not count.
TAGGED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    " {{ m.content }}{% endfor %}"
)


def test_the_key_does_not_know_whether_tokens_are_shared(world: TinyWorld, tmp_path: Path) -> None:
    keys = []
    for store in (None, tmp_path / "one", tmp_path / "one"):
        os.environ["XDG_CACHE_HOME"] = str(tmp_path / f"xdg-{len(keys)}")  # nothing is remembered
        keys.append(identity(world, store).key_recipe)
    assert keys[0] == keys[1] == keys[2]


def test_other_shards_of_the_same_tokens_share_them_and_other_lengths_do_not(
    world: TinyWorld, tmp_path: Path, made: list[str]
) -> None:
    for sections in ({}, {"cache": {"shard_pairs": 3}}, {"objective": {"name": "dpo"}}):
        assert len(identity(world, tmp_path, **sections).tokens) == 12
    assert len(made) == 1
    assert len(identity(world, tmp_path, data={"max_length": 20}).tokens) == 12
    assert len(made) == 2


def test_a_second_build_maps_what_the_first_one_made(world: TinyWorld, tmp_path: Path, made: list[str]) -> None:
    recipe = world.recipe()
    build_caches(recipe, tmp_path)
    assert len(made) == 2  # a split each
    (tmp_path / "xdg/fpo-memo").rename(tmp_path / "forgotten")
    find_cache(recipe, tmp_path)
    build_caches(world.recipe(cache={"shard_pairs": 5}), tmp_path)
    assert len(made) == 2


def test_looking_for_a_cache_makes_no_store(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="does not hold this recipe's cache"):
        find_cache(world.recipe(), tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "input_ids"),
        lambda folder: os.truncate(folder / "splits", 8),
        lambda folder: (folder / "weight").unlink(),
        lambda folder: (folder / "score_mask").write_bytes(b"\0"),
        lambda folder: flip(folder / "tokens.json"),
        lambda folder: (folder / "tokens.json").unlink(),
        lambda folder: (
            (folder / "score").rename(folder / "elsewhere") and (folder / "score").symlink_to(folder / "elsewhere")
        ),
    ],
    ids=["bit", "short", "missing", "more", "json", "no json", "link"],
)
def test_what_is_damaged_is_made_anew(
    world: TinyWorld, tmp_path: Path, made: list[str], damage: Callable[[Path], object]
) -> None:
    expected = identity(world, tmp_path).tokens
    ids = expected.input_ids.copy()
    damage(folder_of(tmp_path))
    again = identity(world, tmp_path).tokens
    assert len(made) == 2
    np.testing.assert_array_equal(again.input_ids, ids)
    assert_equal(identity(world, tmp_path).tokens, again)
    assert len(made) == 2


def tokens(n: int = 3) -> TokenisedGroups:
    arrays = {name: np.arange(n).astype(dtype) for name, dtype in ARRAYS.items()}
    return TokenisedGroups(**{**arrays, "score_mask": None}, drops=DropReport(kept=n, read=n))


def written(folder: Path | None) -> TokenisedGroups:
    found = tokens()
    if folder is not None:
        for name in ARRAYS:
            if name != "score_mask":
                (folder / name).write_bytes(getattr(found, name).tobytes())
    return found


def test_of_many_at_once_one_tokenises_and_the_others_wait(tmp_path: Path) -> None:
    began, go = threading.Event(), threading.Event()
    makers, found = [], []

    def make(folder: Path | None, sign_of_life: object) -> TokenisedGroups:
        makers.append(folder)
        began.set()
        assert go.wait(60)
        return written(folder)

    def ask() -> None:
        found.append(SharedTokens(Store(tmp_path), lambda: QUESTION).get(make))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert began.wait(60)
    go.set()
    for thread in threads:
        thread.join()
    assert len(makers) == 1
    assert len(found) == 4
    for one in found:
        assert_equal(one, tokens())


def test_what_a_killed_process_left_is_neither_read_nor_waited_for(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def half(folder: Path | None, sign_of_life: object) -> TokenisedGroups:
        assert folder is not None
        written(folder)
        left = folder.with_name(folder.name + "-left")
        folder.rename(left)  # SIGKILL cleans nothing up
        raise Killed

    shared = SharedTokens(Store(tmp_path), lambda: QUESTION)
    with pytest.raises(Killed):
        shared.get(half)
    (left,) = (tmp_path / ".state/tokens").iterdir()
    calls = []
    assert_equal(shared.get(lambda folder, _: calls.append(folder) or written(folder)), tokens())
    assert len(calls) == 1
    assert left.exists()
    os.utime(left, (0, 0))
    (item,) = gc(tmp_path, dry_run=False).items
    assert (item.path, item.removed) == (left, True)


def test_where_nothing_can_be_written_the_tokens_are_held_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder can be made here")
    folders: list[Path | None] = []

    def full(folder: Path | None, sign_of_life: object) -> TokenisedGroups:
        folders.append(folder)
        if folder is not None:
            raise OSError(28, "No space left on device")
        return written(None)

    assert_equal(SharedTokens(Store(tmp_path / "file"), lambda: QUESTION).get(full), tokens())
    assert folders == [None]
    assert_equal(SharedTokens(Store(tmp_path / "store"), lambda: QUESTION).get(full), tokens())
    assert [folder is None for folder in folders] == [True, False, True]
    assert list((tmp_path / "store/.state/tokens").iterdir()) == []


def test_tokens_of_data_that_changed_meanwhile_are_not_shared(tmp_path: Path) -> None:
    answers = iter([QUESTION, {"what": "other tokens"}])
    shared = SharedTokens(Store(tmp_path), lambda: next(answers))
    assert_equal(shared.get(lambda folder, _: written(folder)), tokens())
    assert list((tmp_path / ".state/tokens").iterdir()) == []


def test_gc_removes_tokens_that_nobody_reads(tmp_path: Path) -> None:
    shared = SharedTokens(Store(tmp_path), lambda: QUESTION)
    shared.get(lambda folder, _: written(folder))
    folder = folder_of(tmp_path)
    day = 86400
    long_ago = folder.stat().st_mtime - 20 * day
    assert gc(tmp_path).items == []
    os.utime(folder / "tokens.json", (long_ago, long_ago))
    assert gc(tmp_path, unfinished_days=None).items == []
    assert gc(tmp_path, unfinished_days=30).items == []
    (item,) = gc(tmp_path).items
    assert item.reason == "token ids that nobody read for 20 days"
    assert item.n_bytes > 0
    shared.get(lambda *_: pytest.fail("made again"))  # a use
    assert gc(tmp_path).items == []
    os.utime(folder / "tokens.json", (long_ago, long_ago))
    assert gc(tmp_path, dry_run=False).items[0].removed
    assert not folder.exists()
