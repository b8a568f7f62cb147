"""Stage 1 computes only what no cache of the same scorer holds; a miss says which cache comes nearest."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from store_forgery import forge
from tiny_world import TinyWorld, build_tiny_world

import fpo.stage1_cache.build as build_module
import fpo.stage1_cache.score as score_module
from fpo.canonical import checked_json, parse_checked_json
from fpo.errors import CacheConflict, CacheDamaged, SelfCheckError
from fpo.stage1_cache import CacheReport, build_caches, recompute
from fpo.stage1_cache.recompute import feature_distances
from fpo.store import Cache, Features, Pairs, Store, open_cache, pull, verify
from fpo.store.format.encoding import encode_shard
from fpo.store.format.manifest import parse_record, recipe_facts, record_name, shard_name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), n_train=44, n_test=12)


@pytest.fixture(autouse=True)
def private_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def built(world: TinyWorld, store: Path, split: str, **sections: object) -> CacheReport:
    data = {"split": split, "eval_split": None}
    (report,) = build_caches(world.recipe(data=data, **sections), store)
    assert verify(store, report.cache.key).ok
    return report


def whole(cache: Cache) -> Pairs:
    pairs = Pairs.concat([cache.shard(sid) for sid in range(len(cache.shard_pairs))])
    return pairs.take(np.argsort(pairs.pair_id))


def forbid_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "load_model", lambda *_: pytest.fail("the model was loaded"))


def test_growing_a_dataset_by_a_tenth_scores_a_tenth(world: TinyWorld, tmp_path: Path) -> None:
    old = built(world, tmp_path, "train[:40]")
    new = built(world, tmp_path, "train")
    assert (old.pairs_reused, old.pairs_scored) == (0, 40)
    assert (new.pairs_reused, new.pairs_scored) == (40, 4)
    grown, before = whole(new.cache), whole(old.cache)
    for name in ("pair_digest", "ref_logps"):
        assert np.array_equal(getattr(grown, name)[:40], getattr(before, name))
    # The four new ones are what a cache built from nothing says.
    alone = whole(built(world, tmp_path / "alone", "train").cache)
    np.testing.assert_allclose(grown.token_logps, alone.token_logps, atol=1e-5)
    assert np.array_equal(grown.features[0].indices, alone.features[0].indices)
    np.testing.assert_allclose(grown.features[0].acts, alone.features[0].acts, rtol=1e-4, atol=1e-6)


def test_mixing_and_filtering_cached_datasets_loads_no_model(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [built(world, tmp_path, split).cache.key for split in ("train", "test")]
    forbid_the_model(monkeypatch)
    mixed = built(world, tmp_path, "test[:6]+train[8:]", cache={"shard_pairs": 9, "seed": 5})
    assert (mixed.pairs_reused, mixed.pairs_scored, mixed.tokens_scored) == (42, 0, 0)
    folder = Store(tmp_path).folder(mixed.cache.key)
    counts: dict[str, int] = {}
    for sid in range(mixed.built_shards):
        name = record_name(sid)
        record = parse_record(folder.read(name, 10**6), mixed.cache.key, sid, name)
        assert record.provenance["pairs"]["scored"] == 0
        assert "device" not in record.provenance
        for key, count in record.provenance["pairs"]["reused"].items():
            counts[key] = counts.get(key, 0) + count
    assert counts == {sources[0]: 36, sources[1]: 6}


def test_what_is_reused_decides_the_bytes_not_who_resumes(world: TinyWorld, tmp_path: Path) -> None:
    """A process stopped in the middle of a shard that is half copied: the next one writes what one alone writes."""
    for name in ("once", "twice"):
        built(world, tmp_path / name, "train[:30]")
    once = built(world, tmp_path / "once", "train").cache
    score, calls = score_module.ReferenceScorer.score, []

    def stop_at_the_second(*args: object, **kwargs: object) -> Pairs:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_module.ReferenceScorer, "score", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            built(world, tmp_path / "twice", "train")
    twice = built(world, tmp_path / "twice", "train")
    assert twice.cache.digest == once.digest
    assert twice.built_shards < len(once.shard_pairs)


def test_a_damaged_source_is_not_copied_from_and_is_named(world: TinyWorld, tmp_path: Path) -> None:
    old = built(world, tmp_path, "train[:40]").cache
    path = Store(tmp_path).path(old.key) / "shards/000001.zarr.zip"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    new = built(world, tmp_path, "train")
    assert (new.pairs_reused, new.pairs_scored) == (40 - old.shard_pairs[1], 4 + old.shard_pairs[1])
    assert any("000001.zarr.zip" in problem for problem in new.reuse_problems)


def test_numbers_of_a_pulled_cache_do_not_enter_one_that_is_built_here(world: TinyWorld, tmp_path: Path) -> None:
    """The same scorer, right tokens, log-probs twice what they are: all that the stranger's cache holds is scored."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    old = built(world, theirs, "train[:40]").cache
    for sid in range(len(old.shard_pairs)):
        pairs = old.shard(sid)
        wrong = dataclasses.replace(pairs, token_logps=2 * pairs.token_logps, ref_logps=2 * pairs.ref_logps)
        data = encode_shard(wrong, old.key, sid, recipe_facts(old.recipe).bounds)
        forge(theirs / old.key, data, sid)
    assert verify(theirs, old.key).ok
    pull(theirs, old.key, ours)
    new = built(world, ours, "train")
    assert (new.pairs_reused, new.pairs_scored, new.foreign_shards) == (0, 44, 0)
    assert any(old.key[:12] in problem for problem in new.reuse_problems)
    assert new.cache.digest == built(world, tmp_path / "alone", "train").cache.digest


@pytest.mark.parametrize("damage", ["flipped", "gone", "without a record"])
@pytest.mark.parametrize("made", ["scored", "half copied"])
def test_one_damaged_shard_is_told_on_a_hit_and_put_back(
    world: TinyWorld, tmp_path: Path, damage: str, made: str
) -> None:
    if made == "half copied":
        built(world, tmp_path, "train[:30]")
    cache = built(world, tmp_path, "train").cache
    # A cache that was built later and holds the same pairs does not change how a shard comes about.
    built(world, tmp_path, "train[:20]")
    before = {sid: (tmp_path / cache.key / shard_name(sid)).read_bytes() for sid in range(len(cache.shard_pairs))}
    path = tmp_path / cache.key / shard_name(1)
    flipped = bytearray(before[1])
    flipped[1000] ^= 4
    path.unlink()
    if damage == "flipped":
        path.write_bytes(flipped)
    if damage == "without a record":
        (tmp_path / cache.key / record_name(1)).unlink()
    recipe = world.recipe(data={"split": "train", "eval_split": None})
    with pytest.raises(CacheDamaged, match=r"000001\.zarr\.zip .*; put it back with: fpo cache RECIPE --rebuild"):
        build_caches(recipe, tmp_path)
    (report,) = build_caches(recipe, tmp_path, rebuild=True)
    assert (report.rebuilt_shards, report.built_shards, report.cache.digest) == (1, 0, cache.digest)
    assert {sid: (tmp_path / cache.key / shard_name(sid)).read_bytes() for sid in before} == before
    assert verify(tmp_path, cache.key).ok
    with pytest.MonkeyPatch.context() as patch:
        forbid_the_model(patch)
        assert build_caches(recipe, tmp_path, rebuild=True)[0].rebuilt_shards == 0


def test_a_shard_that_comes_out_otherwise_is_not_put_back(world: TinyWorld, tmp_path: Path) -> None:
    """Another machine's last bits would be another answer under the same address."""
    cache = built(world, tmp_path, "train").cache
    path = tmp_path / cache.key / shard_name(1)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    damaged, score = path.read_bytes(), score_module.ReferenceScorer.score

    def nudged(*args: object, **kwargs: object) -> Pairs:
        pairs = score(*args, **kwargs)
        return dataclasses.replace(pairs, token_logps=np.nextafter(pairs.token_logps, np.float32(-9)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_module.ReferenceScorer, "score", nudged)
        with pytest.raises(CacheConflict, match="the cache would get another output address; restore the shard"):
            build_caches(world.recipe(data={"split": "train", "eval_split": None}), tmp_path, rebuild=True)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "facts",
    [{}, {"self_check": 3}, {"self_check": [[]]}, {"self_check": [{"hookpoint": "\x1b[2J", "checked": False}]}],
    ids=str,
)
def test_a_hit_whose_manifest_says_of_the_self_check_what_nobody_writes_is_refused(
    world: TinyWorld, tmp_path: Path, facts: dict[str, object]
) -> None:
    key = built(world, tmp_path, "test").cache.key
    manifest = tmp_path / key / "manifest.json"
    manifest.write_bytes(checked_json(parse_checked_json(manifest.read_bytes()) | {"facts": facts}))
    with pytest.raises(CacheDamaged, match=r"manifest\.json says of the self-check what fpo cache does not") as caught:
        built(world, tmp_path, "test")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("change", ["scaled", "moved", "tail"])
def test_recomputing_refuses_activations_that_the_model_does_not_give(
    world: TinyWorld, tmp_path: Path, change: str
) -> None:
    """Every log-prob is right, and so is every checksum: only the features are a lie."""
    honest = built(world, tmp_path, "train[:40]").cache
    recipe = world.recipe(data={"split": "train[:40]", "eval_split": None})
    report = recompute(recipe, honest, 40, seed=0)
    assert report.worst_features < 1e-4
    for sid in range(len(honest.shard_pairs)):
        pairs = honest.shard(sid)
        features = pairs.features[0]
        lies = {
            "scaled": {"acts": 1.5 * features.acts},
            "moved": {"indices": features.indices ^ np.uint32(1)},
            "tail": {"tail_sq": 50 * features.tail_sq + 1},
        }
        wrong = dataclasses.replace(features, **lies[change])
        if change == "moved":
            wrong = _ascending(wrong)
        data = encode_shard(
            dataclasses.replace(pairs, features=(wrong,)), honest.key, sid, recipe_facts(honest.recipe).bounds
        )
        forge(tmp_path / honest.key, data, sid)
    forged = open_cache(tmp_path, honest.key)
    with pytest.raises(CacheDamaged, match=r"shard \d+: the activations of pair \d+, (chosen|rejected), at model"):
        recompute(recipe, forged, 40, seed=0)


def _ascending(features: Features) -> Features:
    splits = features.splits.astype(int)
    for start, end in itertools.pairwise(splits):
        order = np.argsort(features.indices[start:end])
        features.indices[start:end] = features.indices[start:end][order]
        features.acts[start:end] = features.acts[start:end][order]
    return features


def test_a_feature_that_noise_cut_from_one_side_is_no_distance() -> None:
    """Two equals at the cut: one side keeps feature 3, the other feature 5, both 0.5."""

    def kept(index: int, tail: float) -> Features:
        indices, acts = np.array([1, index], np.uint32), np.array([2.0, 0.5], np.float32)
        return Features(
            indices, acts, np.array([0, 2, 2], np.uint64), np.array([[3, 0]], np.uint32),
            np.array([[tail, 0]], np.float32),
        )  # fmt: skip

    assert feature_distances(kept(3, 0.25), kept(5, 0.25)).tolist() == [0, 0]
    # Nothing was cut: the feature is 0 on the other side. sqrt(2 * 0.5^2) of sqrt(2^2 + 0.5^2).
    np.testing.assert_allclose(feature_distances(kept(3, 0), kept(5, 0)), [(0.5 / 4.25) ** 0.5, 0])


def test_a_miss_names_the_nearest_cache_before_anything_is_scored(world: TinyWorld, tmp_path: Path) -> None:
    first = built(world, tmp_path, "train")
    assert first.nearest is None
    told = []
    feature = {**world.raw_recipe()["features"][0], "top_k": 8}
    recipe = world.recipe(data={"eval_split": None}, features=[feature])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_module, "load_model", lambda *_: pytest.fail("it was told too late") if not told else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_caches(recipe, tmp_path, on_miss=lambda split, near: told.append((split, near)))
    ((split, near),) = told
    assert split == "train"
    assert near is not None
    assert near.key == first.cache.key
    assert [str(difference) for difference in near.differences] == ["scorer.features[0].top_k: 16 -> 8"]


def test_the_names_of_what_a_cache_was_made_from_are_found_again(world: TinyWorld, tmp_path: Path) -> None:
    key = built(world, tmp_path, "train").cache.key
    summary = Store(tmp_path).summary(key)
    weights = summary.recipe["scorer"]["reference"]["weights"][:8]
    assert summary.reference == f"{world.root / 'model'} [{weights}]"
    assert str(world.root / "sae") in summary.features[0]
    assert summary.data == f"{world.root / 'pairs'} train"
    json.dumps(summary.inputs)


class Checks:
    """In place of the self-check: counts, or refuses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        monkeypatch.setattr(build_module._LazyScorer, "self_checks", self._check)

    def _check(self, *_: object) -> list[dict[str, object]]:
        self.made += 1
        if self.made > 1:
            raise SelfCheckError("again")
        return [{"hookpoint": "model.layers.1", "checked": True, "fvu": 0.25}]


def checked(world: TinyWorld) -> dict[str, object]:
    return {"features": [{**world.raw_recipe()["features"][0], "self_check": True}]}


def test_a_cache_made_by_copying_alone_says_what_its_sources_say_of_the_sae(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = Checks(monkeypatch)
    whole_set = built(world, tmp_path, "train", **checked(world)).cache
    forbid_the_model(monkeypatch)
    part = built(world, tmp_path, "train[:20]", **checked(world)).cache
    assert part.manifest.facts["self_check"] == whole_set.manifest.facts["self_check"]
    assert part.manifest.facts["self_check"][0]["fvu"] == "0.25"
    assert checks.made == 1


def test_a_source_that_was_never_checked_does_not_pass_for_checked(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(world, tmp_path, "train")
    checks = Checks(monkeypatch)
    part = built(world, tmp_path, "train[:20]", **checked(world))
    assert (checks.made, part.pairs_scored) == (1, 0)


def test_stopped_before_sealing_the_next_process_says_the_same_of_the_sae(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Checks(monkeypatch)
    cache = built(world, tmp_path, "train", **checked(world)).cache
    (Store(tmp_path).path(cache.key) / "manifest.json").unlink()
    forbid_the_model(monkeypatch)
    again = built(world, tmp_path, "train", **checked(world))
    assert again.cache.digest == cache.digest
    assert again.built_shards == 0
