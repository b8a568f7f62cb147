"""
The reader against bytes that nobody thought of, and whole caches of ragged groups against what was put into them.

Whatever the bytes: a cache is read as it was written, or refused by a CacheError, or (recipe, plan) by a ValueError.
"""

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_cases import (
    FEATURES,
    KEY,
    SIZES,
    SPECS,
    TOP_LOGITS,
    VOCAB,
    Part,
    World,
    arrays_in,
    column_bounds,
    column_rows,
    make_column,
    make_groups,
    make_recipe,
    ragged_sizes,
    same,
    tree,
    unmarked,
)
from store_forgery import cache_of, forge, forge_recipe, members_of, problems, read_all, shard_file

from fpo.canonical import canonical_json, checked_json, parse_checked_json
from fpo.errors import CacheError
from fpo.store import CacheWriter, open_cache, plan_shards, verify
from fpo.store.beside import column_recipe
from fpo.store.format.archive import pack
from fpo.store.format.columns import Features
from fpo.store.format.encoding import ColumnRows, decode_shard, encode_shard
from fpo.store.format.groups import Groups
from fpo.store.format.invariants import BaseBounds, Invalid
from fpo.store.format.manifest import recipe_facts

GROUPS = make_groups(SIZES, score_mask=True)
CASES = {
    "base": (GROUPS, BaseBounds(VOCAB, score_mask=True)),
    **{spec["kind"]: (column_rows(spec, GROUPS), column_bounds(spec)) for spec in SPECS},
}
"""What is held -> the rows of a shard, and the bounds that their recipe promises."""
SHARDS = {case: encode_shard(rows, KEY, 3, bounds) for case, (rows, bounds) in CASES.items()}
MEMBERS = {case: members_of(data) for case, data in SHARDS.items()}

cases = st.sampled_from(sorted(CASES))
fuzz = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
few = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def reads_as_written_or_is_refused(data, case):
    rows, bounds = CASES[case]
    try:
        found = decode_shard(data, KEY, 3, bounds)
    except Invalid:
        return
    assert same(found, rows)


@st.composite
def mutated(draw, original):
    """Some bytes changed, cut out, doubled, or put in, at a few places."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        end = min(start + draw(st.integers(0, 40)), len(data))
        kind = draw(st.sampled_from(["set", "cut", "double", "insert", "zero", "ones"]))
        piece = {
            "set": lambda n: draw(st.binary(min_size=n, max_size=n)),
            "cut": lambda n: b"",
            "double": lambda n, s=start, e=end: bytes(data[s:e]) * 2,
            "insert": lambda n: draw(st.binary(max_size=20)),
            "zero": bytes,
            "ones": lambda n: b"\xff" * n,
        }[kind](end - start)
        data[start:end] = piece
    return bytes(data)


@fuzz
@given(st.data())
def test_mutated_shards_are_refused(data):
    case = data.draw(cases)
    reads_as_written_or_is_refused(data.draw(mutated(SHARDS[case])), case)


@fuzz
@given(st.data())
def test_mutated_members_behind_a_valid_zip_are_refused_or_mean_the_same(data):
    case, changes = data.draw(cases), {}
    members = MEMBERS[case]
    for name in data.draw(st.lists(st.sampled_from(sorted(members)), min_size=1, max_size=3, unique=True)):
        changes[name] = data.draw(mutated(members[name]))
    reads_as_written_or_is_refused(pack(members | changes), case)


values = {
    "uint64": st.integers(0, 2**64 - 1) | st.integers(0, 40),
    "uint32": st.integers(0, 2**32 - 1) | st.integers(0, VOCAB),
    "uint8": st.integers(0, 255),
    "float32": st.floats(width=32) | st.floats(-9, 1, width=32),
}


@fuzz
@given(st.data())
def test_whatever_stands_in_the_arrays_the_invariants_hold_or_it_is_refused(data):
    """The checksum of every layer fits; only the values are a stranger's. What is read must be safe to compute with."""
    case = data.draw(cases)
    rows, bounds = CASES[case]
    rows = copy.deepcopy(rows)
    arrays = [array for array in arrays_in(rows).values() if array.size]
    for array in data.draw(st.lists(st.sampled_from(arrays), min_size=1, max_size=3)):
        place = data.draw(st.integers(0, array.size - 1))
        array.reshape(-1)[place] = data.draw(values[array.dtype.name])
    with pytest.MonkeyPatch.context() as unchecked:
        unchecked.setattr("fpo.store.format.encoding._check", lambda *_: None)
        forged = encode_shard(rows, KEY, 3, bounds)
    try:
        found = decode_shard(forged, KEY, 3, bounds)
    except Invalid:
        return
    if isinstance(found, Groups):
        assert same(found.take(np.arange(len(found))), found)
        assert found.input_ids.max() < VOCAB
        assert np.isfinite(found.token_logps).all()
        assert (found.counted >= 0).all()
    else:
        assert same(found.column.take(np.arange(len(found.column))), found.column)
        if isinstance(found.column, Features):
            assert found.column.indices.max(initial=0) < bounds.d_sae


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def edited(draw, body):
    """JSON with a few of its places set to anything, removed, or added."""
    changed = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 3))):
        node = changed
        while True:
            steps = sorted(node) if isinstance(node, dict) else list(range(len(node)))
            step = draw(st.sampled_from(steps)) if steps else None
            if step is None or not isinstance(node[step], (dict, list)) or draw(st.booleans()):
                break
            node = node[step]
        kind = draw(st.sampled_from(["set", "remove", "add"]))
        value = draw(json_values)
        if kind == "add" and isinstance(node, dict):
            node[draw(st.text(max_size=9))] = value
        elif kind == "add" or step is None:
            node.append(value) if isinstance(node, list) else None
        elif kind == "remove":
            del node[step]
        else:
            node[step] = value
    return changed


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("fuzz"))
    world.fill()
    return world


def trained(folder):
    """How many groups training gets, with the columns that it asked for."""
    cache = cache_of(folder)
    opened = open_cache(cache.parent, cache.name, columns=(FEATURES, TOP_LOGITS))
    return sum(len(opened.shard(sid)) for sid in range(len(opened.shard_groups)))


def refused_in_one_line(cache):
    with pytest.raises(CacheError) as caught:
        trained(cache)
    first = str(caught.value).split("\n")[0]
    assert first.isprintable()
    assert len(first) < 2000


def with_checksum(body):
    """As `checked_json` writes it, if it can; else as well as JSON can."""
    try:
        return checked_json({k: v for k, v in body.items() if k != "check"})
    except (TypeError, ValueError):
        return json.dumps(body, default=str).encode(errors="replace")


parts = st.sampled_from([None, 0, 1])
"""The base, the column that is cut finer, and the other one."""


@few
@given(data=st.data(), part=parts)
def test_edited_manifests_under_a_valid_checksum_are_refused_or_true(world, data, part):
    folder = Part(world, part).path
    original = (folder / "manifest.json").read_bytes()
    body = parse_checked_json(original)
    changed = data.draw(edited(body))
    try:
        (folder / "manifest.json").write_bytes(with_checksum(changed))
        try:
            assert trained(folder) == 5
            assert {k: v for k, v in changed.items() if k != "facts"} == {k: v for k, v in body.items() if k != "facts"}
        except CacheError:
            refused_in_one_line(folder)
        for problem in problems(folder):
            assert problem.isprintable()
    finally:
        (folder / "manifest.json").write_bytes(original)


@few
@given(data=st.data())
def test_any_recipe_is_refused_or_describes_a_cache_that_is_not_there(world, data):
    recipe = data.draw(edited(world.recipe))
    folder = Path(tempfile.mkdtemp())
    try:
        try:
            canonical_json(recipe)
        except (TypeError, ValueError):
            text = json.dumps(recipe, default=str, sort_keys=True, separators=(",", ":")).encode()
            cache = folder / hashlib.sha256(text).hexdigest()
            cache.mkdir()
            (cache / "recipe.json").write_bytes(text)
        else:
            cache = forge_recipe(folder, recipe)
            with suppress(ValueError):
                recipe_facts(recipe)
        refused_in_one_line(cache)
        assert problems(cache)
    finally:
        shutil.rmtree(folder)


@few
@given(data=st.data())
def test_any_recipe_of_a_column_is_left_out_or_describes_one_that_is_not_there(world, data):
    """It lies under the name that fits it, with a manifest that does not: named by verify, whatever it says."""
    recipe = data.draw(edited(world.column_recipe(0)))
    try:
        folder = forge_recipe(world.path / "columns", recipe)
    except (TypeError, ValueError, FileExistsError):  # no canonical JSON; or nothing was changed
        return
    try:
        try:
            assert read_all(world.path) == 5
        except CacheError as error:
            assert f"{folder.name}/manifest.json is damaged" in str(error)  # noqa: PT017 - or no error at all
        assert any(folder.name in problem for problem in problems(world.path))
    finally:
        shutil.rmtree(folder)


@few
@given(data=st.data(), part=parts)
def test_mutated_json_files_are_refused(world, data, part):
    folder = Part(world, part).path
    name = data.draw(st.sampled_from(["recipe.json", "manifest.json", "records/000001.json"]))
    original = (folder / name).read_bytes()
    changed = data.draw(mutated(original))
    try:
        (folder / name).write_bytes(changed)
        assert changed == original or any(name in problem for problem in problems(folder))
    finally:
        (folder / name).write_bytes(original)


@few
@given(data=st.data(), part=parts)
def test_whole_caches_with_forged_shards_are_refused_by_name(world, data, part):
    copied = shutil.copytree(world.path, Path(tempfile.mkdtemp()) / world.key)
    folder = copied / Part(world, part).path.relative_to(world.path)
    try:
        forge(folder, data.draw(mutated(SHARDS["base"])))
        with pytest.raises(CacheError, match=r"shards/000000\.zarr\.zip is damaged"):
            trained(copied)
    finally:
        shutil.rmtree(copied.parent)


# Round trips through a whole cache.


@st.composite
def datasets(draw):
    """Ragged groups, a mask or none, columns, plans of any shard size."""
    sizes = draw(ragged_sizes)
    ids = draw(st.lists(st.integers(0, 2**63), min_size=len(sizes), max_size=len(sizes), unique=True).map(sorted))
    groups = make_groups(sizes, ids, draw(st.integers(0, 9)), score_mask=draw(st.booleans()))
    n_tokens = np.array([prompt + sum(completions) for prompt, completions in sizes], np.int64)
    plan = plan_shards(
        n_tokens, groups.n_completions, seed=draw(st.integers(0, 2**64 - 1)), max_groups=draw(st.integers(1, 4))
    )
    specs = draw(st.lists(st.sampled_from(SPECS), max_size=2, unique_by=str))
    finer = draw(st.booleans())
    return groups.with_columns([make_column(spec, groups) for spec in specs]), plan, specs, finer


def write(folder, dataset, random):
    """Each base and column by two writers, in any order."""
    groups, plan, specs, finer = dataset
    base = dataclasses.replace(groups, columns=())
    key = fill(folder, make_recipe(base, [groups.group_id[rows] for rows in plan]), groups, plan, random, base.take)
    for n, spec in enumerate(specs):
        cut = [part for rows in plan for part in np.array_split(rows, 2 if finer and len(rows) > 1 else 1)]

        def rows_of(rows, n=n):
            taken = groups.take(rows)
            return ColumnRows(taken.group_id, len(taken.completion_digest), taken.columns[n])

        fill(folder, column_recipe(key, spec, [len(rows) for rows in cut]), groups, cut, random, rows_of)
    return key


def fill(folder, recipe, groups, plan, random, rows_of):
    writers = [CacheWriter(folder, recipe, [groups.group_id[rows] for rows in plan]) for _ in range(2)]
    order = writers[0].missing()
    random.shuffle(order)
    for sid in order:
        random.choice(writers).write(sid, rows_of(plan[sid]), {})
    writers[0].seal({})
    return writers[0].key


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(datasets(), st.randoms(use_true_random=False))
def test_a_whole_cache_gives_back_every_group(dataset, random):
    """Written in any order, by several writers; read by this package and by plain zarr."""
    groups, plan, specs, _ = dataset
    with tempfile.TemporaryDirectory() as folder:
        key = write(folder, dataset, random)
        cache = open_cache(folder, key, columns=specs)
        assert cache.shard_groups == [len(rows) for rows in plan]
        assert cache.n_groups == len(groups)
        for sid, rows in enumerate(plan):
            assert same(cache.shard(sid), groups.take(rows))
            with zarr.storage.ZipStore(shard_file(Path(folder) / key, sid), mode="r") as opened:
                group = zarr.open_group(opened, mode="r")
                assert np.array_equal(group["input_ids"][:], groups.take(rows).input_ids)
                assert np.array_equal(group["token_logps"][:], groups.take(rows).token_logps)
        report = verify(folder, key)
        assert (report.problems, report.groups, report.shards) == ([], len(groups), len(plan))
        assert len(report.columns) == len(specs)


@settings(deadline=None, max_examples=8)
@given(datasets(), st.randoms(use_true_random=False))
def test_the_same_groups_give_the_same_bytes_in_whatever_order_they_come(dataset, random):
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        first, second = write(one, dataset, random), write(other, dataset, random)
        assert unmarked(tree(Path(one) / first)) == unmarked(tree(Path(other) / second))


HARD_CASES = {
    "no groups": [],
    "a single group of one": [(3, (4,))],
    "one-token completions": [(5, (1, 1)), (1, (1,) * 9)],
    "no prompt, one-token completions: nothing is scored": [(0, (1, 1))],
    "an empty completion": [(2, (0, 1)), (0, (0, 1))],
    "a group that is longer than a shard should be": [(2000, (3000, 1)), (1, (1, 1))],
}


@pytest.mark.parametrize("sizes", HARD_CASES.values(), ids=HARD_CASES)
def test_the_hard_cases_come_back(tmp_path, sizes):
    groups = make_groups(sizes)
    n_tokens = np.array([prompt + sum(completions) for prompt, completions in sizes], np.int64)
    plan = plan_shards(n_tokens, groups.n_completions, seed=1, max_tokens=4000)
    dataset = groups.with_columns([make_column(spec, groups) for spec in SPECS]), plan, SPECS, False
    key = write(tmp_path, dataset, Random(0))
    cache = open_cache(tmp_path, key, columns=SPECS)
    assert all(same(cache.shard(sid), dataset[0].take(rows)) for sid, rows in enumerate(plan))
    assert verify(tmp_path, key).ok


def test_completions_without_features_come_back():
    """top_k 4 of 50, and not one feature active in any completion: an array without a chunk."""
    K = len(GROUPS.completion_digest)
    none = Features(np.zeros(K + 1, np.uint64), np.zeros(0, np.uint32), np.zeros(0, np.float32),
                    np.zeros(K, np.uint32), np.zeros(K, np.float32))  # fmt: skip
    rows = ColumnRows(GROUPS.group_id, K, none)
    data = encode_shard(rows, KEY, 0, column_bounds(FEATURES))
    assert same(decode_shard(data, KEY, 0, column_bounds(FEATURES)), rows)
    assert "indices/c/0" not in members_of(data)


# Coverage-guided: the campaign only.


@pytest.mark.campaign
@pytest.mark.parametrize("target", ["shard", "column", "members", "column_members", "manifest", "recipe"])
def test_atheris_finds_nothing(tmp_path, target):
    """libFuzzer behind Python's coverage, for a bounded time: store_fuzz_target.py says what counts as a find."""
    pytest.importorskip("atheris")
    here = Path(__file__).parent
    seconds = int(os.environ.get("FPO_FUZZ_SECONDS", "30"))
    env = {**os.environ, "PYTHONWARNINGS": ""}
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    options = [f"-max_total_time={seconds}", "-max_len=20000", "-rss_limit_mb=2048", "-print_final_stats=1"]
    command = [sys.executable, str(here / "store_fuzz_target.py"), target, str(corpus), *options]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    stats = dict(line[6:].split(": ") for line in done.stderr.splitlines() if line.startswith("stat::"))
    print(f"atheris {target}: {stats['number_of_executed_units'].strip()} runs in {seconds} s")
