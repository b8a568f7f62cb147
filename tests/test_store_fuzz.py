"""
The reader against bytes that nobody thought of, and whole caches of ragged pairs against what was put into them.

Whatever the bytes: a cache is read as it was written, or refused by a CacheError, or (recipe, plan) by a ValueError.
"""

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_cases import (
    HOOKPOINTS,
    KEY,
    LENGTHS,
    VOCAB,
    World,
    make_pairs,
    make_recipe,
    ragged_lengths,
    same,
    tree,
    unmarked,
)
from store_forgery import forge, forge_recipe, members_of, problems, read_all, shard_file

from fpo.canonical import canonical_json, checked_json, parse_checked_json
from fpo.errors import CacheError
from fpo.store import CacheWriter, open_cache, plan_shards, verify
from fpo.store.format.archive import pack, unpack
from fpo.store.format.encoding import decode_shard, encode_shard
from fpo.store.format.invariants import Bounds, Invalid
from fpo.store.format.manifest import recipe_facts

BOUNDS = Bounds(VOCAB, ((50, 4), (9, None)), 2)
PAIRS = make_pairs(LENGTHS)
SHARD = encode_shard(PAIRS, KEY, 3, BOUNDS)
MEMBERS = {name: bytes(data) for name, data in unpack(SHARD).items()}

fuzz = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
few = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def reads_as_written_or_is_refused(data):
    try:
        found = decode_shard(data, KEY, 3, BOUNDS)
    except Invalid:
        return
    assert same(found, PAIRS)


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
@given(mutated(SHARD))
def test_mutated_shards_are_refused(data):
    reads_as_written_or_is_refused(data)


@fuzz
@given(st.data())
def test_mutated_members_behind_a_valid_zip_are_refused_or_mean_the_same(data):
    changes = {}
    for name in data.draw(st.lists(st.sampled_from(sorted(MEMBERS)), min_size=1, max_size=3, unique=True)):
        changes[name] = data.draw(mutated(MEMBERS[name]))
    reads_as_written_or_is_refused(pack(MEMBERS | changes))


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
    pairs = copy.deepcopy(PAIRS)
    arrays = [
        pairs.pair_id,
        pairs.splits,
        pairs.input_ids,
        pairs.token_logps,
        pairs.ref_logps,
        pairs.top_logits.indices,
    ]
    for features in pairs.features:
        arrays += [features.indices, features.acts, features.splits, features.active, features.tail_sq]
    for array in data.draw(st.lists(st.sampled_from(arrays), min_size=1, max_size=3)):
        place = data.draw(st.integers(0, array.size - 1))
        array.reshape(-1)[place] = data.draw(values[array.dtype.name])
    with pytest.MonkeyPatch.context() as unchecked:
        unchecked.setattr("fpo.store.format.encoding.check_pairs", lambda *_: None)
        forged = encode_shard(pairs, KEY, 3, BOUNDS)
    try:
        found = decode_shard(forged, KEY, 3, BOUNDS)
    except Invalid:
        return
    whole = found.take(np.arange(len(found)))
    assert same(whole, found)
    assert found.input_ids.max() < VOCAB
    assert np.isfinite(found.token_logps).all()
    for features, (d_sae, _) in zip(found.features, BOUNDS.features, strict=True):
        assert features.indices.max(initial=0) < d_sae


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


def refused_in_one_line(cache):
    with pytest.raises(CacheError) as caught:
        read_all(cache)
    first = str(caught.value).split("\n")[0]
    assert first.isprintable()
    assert len(first) < 2000


def with_checksum(body):
    """As `checked_json` writes it, if it can; else as well as JSON can."""
    try:
        return checked_json({k: v for k, v in body.items() if k != "check"})
    except (TypeError, ValueError):
        return json.dumps(body, default=str).encode(errors="replace")


@few
@given(data=st.data())
def test_edited_manifests_under_a_valid_checksum_are_refused_or_true(world, data):
    (key,) = world.store.keys()
    cache = world.store.path(key)
    original = (cache / "manifest.json").read_bytes()
    body = parse_checked_json(original)
    changed = data.draw(edited(body))
    try:
        (cache / "manifest.json").write_bytes(with_checksum(changed))
        try:
            assert read_all(cache) == 5
            assert {k: v for k, v in changed.items() if k != "facts"} == {k: v for k, v in body.items() if k != "facts"}
        except CacheError:
            refused_in_one_line(cache)
        for problem in problems(cache):
            assert problem.isprintable()
    finally:
        (cache / "manifest.json").write_bytes(original)


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
def test_mutated_json_files_are_refused(world, data):
    (key,) = world.store.keys()
    cache = world.store.path(key)
    name = data.draw(st.sampled_from(["recipe.json", "manifest.json", "records/000001.json"]))
    original = (cache / name).read_bytes()
    changed = data.draw(mutated(original))
    try:
        (cache / name).write_bytes(changed)
        assert changed == original or any(name in problem for problem in problems(cache))
    finally:
        (cache / name).write_bytes(original)


@few
@given(data=mutated(SHARD))
def test_whole_caches_with_forged_shards_are_refused_by_name(world, data):
    (key,) = world.store.keys()
    copied = shutil.copytree(world.store.path(key), Path(tempfile.mkdtemp()) / key)
    try:
        forge(copied, data)
        with pytest.raises(CacheError, match=r"shards/000000\.zarr\.zip is damaged"):
            read_all(copied)
    finally:
        shutil.rmtree(copied.parent)


# Round trips through a whole cache.


@st.composite
def datasets(draw):
    """Ragged pairs, hookpoints, extras, a plan of any shard size."""
    hookpoints = draw(st.sampled_from([(), HOOKPOINTS, HOOKPOINTS[:1]]))
    top_logits = draw(st.integers(0, 2))
    lengths = draw(ragged_lengths)
    ids = draw(st.lists(st.integers(0, 2**63), min_size=len(lengths), max_size=len(lengths), unique=True).map(sorted))
    pairs = make_pairs(lengths, ids, draw(st.integers(0, 9)), hookpoints, top_logits)
    sizes = np.zeros(len(pairs), np.int64)
    plan = plan_shards(pairs.lengths, sizes, seed=draw(st.integers(0, 2**64 - 1)), max_pairs=draw(st.integers(1, 4)))
    recipe = make_recipe(pairs, [pairs.pair_id[rows] for rows in plan], hookpoints, top_logits)
    return pairs, plan, recipe


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(datasets(), st.randoms(use_true_random=False))
def test_a_whole_cache_gives_back_every_pair(dataset, random):
    """Written in any order, by several writers; read by this package and by plain zarr."""
    pairs, plan, _ = dataset
    with tempfile.TemporaryDirectory() as folder:
        key = write(folder, dataset, random)
        cache = open_cache(folder, key)
        assert cache.shard_pairs == [len(rows) for rows in plan]
        assert cache.n_pairs == len(pairs)
        for sid, rows in enumerate(plan):
            assert same(cache.shard(sid), pairs.take(rows))
            with zarr.storage.ZipStore(shard_file(Path(folder) / key, sid), mode="r") as opened:
                group = zarr.open_group(opened, mode="r")
                assert np.array_equal(group["input_ids"][:], pairs.take(rows).input_ids)
                assert np.array_equal(group["token_logps"][:], pairs.take(rows).token_logps)
        report = verify(folder, key)
        assert (report.problems, report.pairs, report.shards) == ([], len(pairs), len(plan))


def write(folder, dataset, random):
    pairs, plan, recipe = dataset
    ids = [pairs.pair_id[rows] for rows in plan]
    writers = [CacheWriter(folder, recipe, ids) for _ in range(2)]
    order = writers[0].missing()
    random.shuffle(order)
    for sid in order:
        random.choice(writers).write(sid, pairs.take(plan[sid]), {})
    writers[0].seal({})
    return writers[0].key


@settings(deadline=None, max_examples=10)
@given(datasets(), st.randoms(use_true_random=False))
def test_the_same_pairs_give_the_same_bytes_in_whatever_order_they_come(dataset, random):
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        first, second = write(one, dataset, random), write(other, dataset, random)
        assert unmarked(tree(Path(one) / first)) == unmarked(tree(Path(other) / second))


HARD_CASES = {
    "no pairs": [],
    "a single pair": [(3, 4, 2)],
    "one-token completions": [(5, 1, 1), (1, 1, 1)],
    "no prompt, one-token completions: nothing is scored": [(0, 1, 1)],
    "an empty completion": [(2, 0, 1), (0, 0, 1)],
    "a pair that is longer than a shard should be": [(2000, 3000, 1), (1, 1, 1)],
}


@pytest.mark.parametrize("lengths", HARD_CASES.values(), ids=HARD_CASES)
@pytest.mark.parametrize("hookpoints", [(), ((7, 3),), HOOKPOINTS], ids=len)
def test_the_hard_cases_come_back(tmp_path, lengths, hookpoints):
    pairs = make_pairs(lengths, hookpoints=hookpoints)
    plan = plan_shards(pairs.lengths, np.zeros(len(pairs), np.int64), seed=1, max_tokens=4000)
    recipe = make_recipe(pairs, plan, hookpoints)
    writer = CacheWriter(tmp_path, recipe, plan)
    for sid in writer.missing():
        writer.write(sid, pairs.take(plan[sid]), {})
    writer.seal({})
    cache = open_cache(tmp_path, writer.key)
    assert all(same(cache.shard(sid), pairs.take(rows)) for sid, rows in enumerate(plan))
    assert verify(tmp_path, writer.key).ok


def test_completions_without_features_come_back(tmp_path):
    """top_k 4 of 50, and not one feature active in any completion."""
    pairs = make_pairs(LENGTHS, hookpoints=((50, 4),))
    (features,) = pairs.features
    none = type(features)(
        features.indices[:0],
        features.acts[:0],
        np.zeros_like(features.splits),
        np.zeros_like(features.active),
        np.zeros_like(features.tail_sq),
    )
    pairs = type(pairs)(**{**pairs.__dict__, "features": (none,)})
    plan = [np.arange(5)]
    writer = CacheWriter(tmp_path, make_recipe(pairs, plan, ((50, 4),)), plan)
    writer.write(0, pairs, {})
    writer.seal({})
    assert same(open_cache(tmp_path, writer.key).shard(0), pairs)
    assert "features/0/indices/c/0" not in members_of(shard_file(writer.folder.root).read_bytes())


# Coverage-guided: the campaign only.


@pytest.mark.campaign
@pytest.mark.parametrize("target", ["shard", "members", "manifest", "recipe"])
def test_atheris_finds_nothing(tmp_path, target):
    """libFuzzer behind Python's coverage, for a bounded time: store_fuzz_target.py says what counts as a find."""
    pytest.importorskip("atheris")
    here = Path(__file__).parent
    seconds = int(os.environ.get("FPO_FUZZ_SECONDS", "30"))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "PYTHONWARNINGS": ""}
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    options = [f"-max_total_time={seconds}", "-max_len=20000", "-rss_limit_mb=2048", "-print_final_stats=1"]
    command = [sys.executable, str(here / "store_fuzz_target.py"), target, str(corpus), *options]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    stats = dict(line[6:].split(": ") for line in done.stderr.splitlines() if line.startswith("stat::"))
    print(f"atheris {target}: {stats['number_of_executed_units'].strip()} runs in {seconds} s")
