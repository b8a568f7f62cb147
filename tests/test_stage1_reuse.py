"""Stage 1 computes only what no cache of the same scorer holds; a miss says which cache comes nearest."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from store_forgery import forge
from tiny_world import TinyWorld, build_tiny_world
from transformers import AutoModelForCausalLM

import fpo.stage1_cache.build as build_module
import fpo.stage1_cache.score as score_module
from fpo.canonical import checked_json, parse_checked_json
from fpo.errors import CacheConflict, CacheDamaged, CacheMissing, RecipeError, SelfCheckError
from fpo.stage1_cache import CacheReport, build_caches, find_cache, recompute
from fpo.stage1_cache.recompute import feature_distances
from fpo.store import Cache, Column, Features, Groups, HiddenGram, Store, TokenLogps, open_cache, pull, verify
from fpo.store.format.encoding import ColumnRows, encode_shard
from fpo.store.format.manifest import parse_record, recipe_facts, record_name, shard_name

pytestmark = pytest.mark.usefixtures("private_memory")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), n_train=44, n_test=12)


def built(world: TinyWorld, store: Path, split: str, **sections: object) -> CacheReport:
    data = {"split": split, "eval_split": None}
    (report,) = build_caches(world.recipe(data=data, **sections), store)
    assert verify(store, report.cache.key).ok
    return report


def whole(cache: Cache) -> Groups:
    groups = Groups.concat([cache.shard(sid) for sid in range(len(cache.shard_groups))])
    return groups.take(np.argsort(groups.group_id))


def forbid_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "load_model", lambda *_: pytest.fail("the model was loaded"))


def test_growing_a_dataset_by_a_tenth_scores_a_tenth(world: TinyWorld, tmp_path: Path) -> None:
    old = built(world, tmp_path, "train[:40]")
    new = built(world, tmp_path, "train")
    assert (old.reused, old.scored) == (0, 80)
    assert (new.reused, new.scored) == (80, 8)
    grown, before = whole(new.cache), whole(old.cache)
    for name in ("completion_digest", "ref_logps"):
        assert np.array_equal(getattr(grown, name)[:80], getattr(before, name))
    # The four new ones are what a cache built from nothing says.
    alone = whole(built(world, tmp_path / "alone", "train").cache)
    np.testing.assert_allclose(grown.token_logps, alone.token_logps, atol=1e-5)
    assert np.array_equal(grown.columns[0].indices, alone.columns[0].indices)
    np.testing.assert_allclose(grown.columns[0].acts, alone.columns[0].acts, rtol=1e-4, atol=1e-6)


def test_mixing_and_filtering_cached_datasets_loads_no_model(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [built(world, tmp_path, split).cache.key for split in ("train", "test")]
    forbid_the_model(monkeypatch)
    mixed = built(world, tmp_path, "test[:6]+train[8:]", cache={"shard_pairs": 9, "seed": 5})
    assert (mixed.reused, mixed.scored, mixed.tokens_scored) == (84, 0, 0)
    folder = Store(tmp_path).folder(mixed.cache.key)
    counts: dict[str, int] = {}
    for sid in range(mixed.built_shards):
        name = record_name(sid)
        record = parse_record(folder.read(name, 10**6), mixed.cache.key, sid, name)
        assert record.provenance["rows"]["scored"] == 0
        assert "device" not in record.provenance
        for key, count in record.provenance["rows"]["reused"].items():
            counts[key] = counts.get(key, 0) + count
    assert counts == {sources[0]: 72, sources[1]: 12}


@contextmanager
def stopped_at_the_second_shard() -> Iterator[None]:
    """What is built within scores one shard and is interrupted as it begins to score the next."""
    score, calls = score_module.ReferenceScorer.score, []

    def stop_at_the_second(*args: object, **kwargs: object) -> list[Column]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_module.ReferenceScorer, "score", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_what_is_reused_decides_the_bytes_not_who_resumes(world: TinyWorld, tmp_path: Path) -> None:
    """A process stopped in the middle of a shard that is half copied: the next one writes what one alone writes."""
    for name in ("once", "twice"):
        built(world, tmp_path / name, "train[:30]")
    once = built(world, tmp_path / "once", "train").cache
    with stopped_at_the_second_shard():
        built(world, tmp_path / "twice", "train")
    twice = built(world, tmp_path / "twice", "train")
    assert twice.cache.digest == once.digest
    assert twice.built_shards < len(once.shard_groups)


def test_a_damaged_source_is_not_copied_from_and_is_named(world: TinyWorld, tmp_path: Path) -> None:
    old = built(world, tmp_path, "train[:40]").cache
    path = Store(tmp_path).path(old.key) / "shards/000001.zarr.zip"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    new = built(world, tmp_path, "train")
    # The column's shard is whole, but whose rows it holds stands in the base's.
    assert (new.reused, new.scored) == (2 * (40 - old.shard_groups[1]), 2 * (4 + old.shard_groups[1]))
    assert any("000001.zarr.zip" in problem for problem in new.reuse_problems)


def test_numbers_of_a_pulled_cache_do_not_enter_one_that_is_built_here(world: TinyWorld, tmp_path: Path) -> None:
    """The same scorer, right tokens, log-probs twice what they are: all that the stranger's cache holds is scored."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    old = built(world, theirs, "train[:40]").cache
    for sid in range(len(old.shard_groups)):
        groups = old.shard(sid)
        wrong = dataclasses.replace(
            groups, token_logps=2 * groups.token_logps, ref_logps=2 * groups.ref_logps, columns=()
        )
        data = encode_shard(wrong, old.key, sid, recipe_facts(old.recipe).bounds)
        forge(theirs / old.key, data, sid)
    assert verify(theirs, old.key).ok
    pull(theirs, old.key, ours)
    new = built(world, ours, "train")
    assert (new.reused, new.scored, new.foreign_shards) == (0, 88, 0)
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
    before = {sid: (tmp_path / cache.key / shard_name(sid)).read_bytes() for sid in range(len(cache.shard_groups))}
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

    def nudged(*args: object, **kwargs: object) -> list[Column]:
        logps, *rest = score(*args, **kwargs)
        assert isinstance(logps, TokenLogps)
        return [TokenLogps(logps.splits, np.nextafter(logps.logps, np.float32(-9))), *rest]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_module.ReferenceScorer, "score", nudged)
        with pytest.raises(CacheConflict, match="the cache would get another output address; restore the shard"):
            build_caches(world.recipe(data={"split": "train", "eval_split": None}), tmp_path, rebuild=True)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "facts",
    [{}, {"self_check": 3}, {"self_check": []}, {"self_check": {"hookpoint": "\x1b[2J", "checked": False}}],
    ids=str,
)
def test_a_hit_whose_manifest_says_of_the_self_check_what_nobody_writes_is_refused(
    world: TinyWorld, tmp_path: Path, facts: dict[str, object]
) -> None:
    key = built(world, tmp_path, "test").cache.key
    (manifest,) = (tmp_path / key).glob("columns/*/manifest.json")
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
    assert report.left_out == ()
    built(world, tmp_path, "train[:40]", cache={"top_logits": 3})
    assert recompute(recipe, honest, 4, seed=0).left_out == ("top 3 logits",)
    (column,) = honest.columns
    for sid in range(len(honest.shard_groups)):
        rows = column.sealed.shard(sid)
        assert isinstance(rows, ColumnRows)
        features = rows.column
        assert isinstance(features, Features)
        lies = {
            "scaled": {"acts": 1.5 * features.acts},
            "moved": {"indices": features.indices ^ np.uint32(1)},
            "tail": {"tail_sq": 50 * features.tail_sq + 1},
        }
        wrong = dataclasses.replace(features, **lies[change])
        if change == "moved":
            wrong = _ascending(wrong)
        data = encode_shard(
            dataclasses.replace(rows, column=wrong), column.sealed.key, sid, recipe_facts(column.sealed.recipe).bounds
        )
        forge(tmp_path / honest.key / "columns" / column.sealed.key, data, sid)
    forged = open_cache(tmp_path, honest.key)
    with pytest.raises(CacheDamaged, match=r"shard \d+: the activations of group \d+, completion \d of 2, at model"):
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
        splits = np.array([0, 2, 2], np.uint64)
        return Features(splits, indices, acts, np.array([3, 0], np.uint32), np.array([tail, 0], np.float32))

    assert feature_distances(kept(3, 0.25), kept(5, 0.25)).tolist() == [0, 0]
    # Nothing was cut: the feature is 0 on the other side. sqrt(2 * 0.5^2) of sqrt(2^2 + 0.5^2).
    np.testing.assert_allclose(feature_distances(kept(3, 0), kept(5, 0)), [(0.5 / 4.25) ** 0.5, 0])


def test_a_miss_names_the_nearest_cache_before_anything_is_scored(world: TinyWorld, tmp_path: Path) -> None:
    first = built(world, tmp_path, "train")
    assert first.nearest is None
    told = []
    recipe = world.recipe(data={"eval_split": None}, cache={"seed": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_module, "load_model", lambda *_: pytest.fail("it was told too late") if not told else 1 / 0)
        # Nothing is to be scored: the other order's rows are copied.
        build_caches(recipe, tmp_path, on_miss=lambda split, near: told.append((split, near)))
    ((split, near),) = told
    assert split == "train"
    assert near is not None
    assert near.key == first.cache.key
    assert "groups.seed: 0 -> 3  (the same groups in another order)" in [str(one) for one in near.differences]


def test_the_names_of_what_a_cache_was_made_from_are_found_again(world: TinyWorld, tmp_path: Path) -> None:
    key = built(world, tmp_path, "train").cache.key
    summary = Store(tmp_path).summary(key)
    weights = summary.recipe["scorer"]["reference"]["weights"][:8]
    assert summary.reference == f"{world.root / 'model'} [{weights}]"
    assert str(world.root / "sae") in summary.columns[0].label
    assert summary.data == f"{world.root / 'pairs'} train"
    json.dumps(summary.inputs)


class Checks:
    """In place of the self-check: counts, or refuses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        monkeypatch.setattr(build_module._LazyScorer, "self_check", self._check)

    def _check(self, *_: object) -> dict[str, object]:
        self.made += 1
        if self.made > 1:
            raise SelfCheckError("again")
        return {"hookpoint": "model.layers.1", "checked": True, "fvu": 0.25}


def checked(world: TinyWorld) -> dict[str, object]:
    return {"features": [{**world.raw_recipe()["features"][0], "self_check": True}]}


def test_a_cache_made_by_copying_alone_says_what_its_sources_say_of_the_sae(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = Checks(monkeypatch)
    whole_set = built(world, tmp_path, "train", **checked(world))
    forbid_the_model(monkeypatch)
    part = built(world, tmp_path, "train[:20]", **checked(world))
    assert part.self_checks == whole_set.self_checks
    assert part.self_checks[0].fvu == "0.25"
    assert checks.made == 1


def test_a_source_that_was_never_checked_does_not_pass_for_checked(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(world, tmp_path, "train")
    checks = Checks(monkeypatch)
    part = built(world, tmp_path, "train[:20]", **checked(world))
    assert (checks.made, part.scored) == (1, 0)


def test_stopped_before_sealing_the_next_process_says_the_same_of_the_sae(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Checks(monkeypatch)
    cache = built(world, tmp_path, "train", **checked(world)).cache
    for manifest in Store(tmp_path).path(cache.key).rglob("manifest.json"):
        manifest.unlink()
    forbid_the_model(monkeypatch)
    again = built(world, tmp_path, "train", **checked(world))
    assert again.cache.digest == cache.digest
    assert again.built_shards == 0


def rows_of(world: TinyWorld) -> list[dict[str, object]]:
    return [json.loads(line) for line in (world.root / "pairs" / "train.jsonl").read_text().splitlines()]


def variant(world: TinyWorld, root: Path, name: str, rows: list[dict[str, object]]) -> dict[str, object]:
    """The data section of a file with these rows."""
    (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": str(root / f"{name}.jsonl"), "split": "train", "eval_split": None}


EVERYTHING = {"top_logits": 2, "prompt_features": True, "hidden_gram": True}


def test_relabelled_repaired_filtered_and_listed_data_scores_nothing(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and every column are copied, whoever is preferred now and in whatever group a completion stands."""
    store = tmp_path / "store"
    old = whole(built(world, store, "train", cache=EVERYTHING).cache)
    forbid_the_model(monkeypatch)
    rows = rows_of(world)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    listed = [
        {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]], "scores": [1.0, 4.5]} for row in rows
    ]
    unpaired = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
    for name, data, n in (
        ("swapped", swapped, 88),
        ("half", swapped[::2], 44),
        ("lists", listed, 88),
        ("kto", unpaired, 44),
    ):
        (report,) = build_caches(world.recipe(data=variant(world, tmp_path, name, data), cache=EVERYTHING), store)
        assert (name, report.scored, report.reused) == (name, 0, n)
        assert verify(store, report.cache.key).ok
        if name == "swapped":
            new, flip = whole(report.cache), np.arange(88) ^ 1
            assert np.array_equal(new.ref_logps, old.ref_logps[flip])
            _features, _prompts, _top, gram = new.columns
            for column, before, order in zip(new.columns, old.columns, (flip, None, flip, None), strict=True):
                expected = before if order is None else before.take(order)
                for array in (*column.ENTRIES, *column.ROWS):
                    if not isinstance(column, HiddenGram):
                        assert np.array_equal(getattr(column, array), getattr(expected, array)), array
            # Row by row and column by column the other way round.
            assert isinstance(gram, HiddenGram)
            assert isinstance(old.columns[3], HiddenGram)
            theirs = old.columns[3].products.reshape(-1, 2, 2)
            assert np.array_equal(gram.products.reshape(-1, 2, 2), theirs[:, ::-1, ::-1])
        if name == "lists":
            assert whole(report.cache).score.reshape(-1, 2).tolist() == [[4.5, 1.0]] * 44


def test_a_third_completion_scores_the_third_ones_alone(world: TinyWorld, tmp_path: Path) -> None:
    store = tmp_path / "store"
    built(world, store, "train")
    lists = [
        {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"], f" w{number % 90} w7 w{number % 7}"],
            "ranks": [1, 3, 2],
        }
        for number, row in enumerate(rows_of(world))
    ]
    data = variant(world, tmp_path, "lists", lists)
    (report,) = build_caches(world.recipe(data=data), store)
    assert (report.scored, report.reused) == (44, 88)
    (alone,) = build_caches(world.recipe(data=data), tmp_path / "alone")
    assert (alone.scored, alone.cache.key) == (132, report.cache.key)
    mixed, fresh = whole(report.cache), whole(alone.cache)
    np.testing.assert_allclose(mixed.token_logps, fresh.token_logps, atol=1e-5)
    assert np.array_equal(mixed.columns[0].indices, fresh.columns[0].indices)


def test_columns_come_one_by_one_and_cover_what_asks_for_less(world: TinyWorld, tmp_path: Path) -> None:
    """From no column to two hookpoints: the base is scored once, and a recipe that a column covers scores nothing."""
    feature = world.raw_recipe()["features"][0]
    plain = built(world, tmp_path, "train", features=[], objective={"name": "dpo"})
    assert (plain.base_built, plain.columns) == (True, ())
    first = built(world, tmp_path, "train")
    assert (first.cache.key, first.base_built, first.scored) == (plain.cache.key, False, 88)
    assert [column.built for column in first.columns] == [True]
    with pytest.MonkeyPatch.context() as patch:
        forbid_the_model(patch)
        for top_k in (16, 8, 1):
            less = built(world, tmp_path, "train", features=[{**feature, "top_k": top_k}], objective={"k": 1})
            assert (less.built_shards, less.columns[0].key) == (0, first.columns[0].key)
        # What the eight largest of sixteen are, and what is left of the rest.
        less = built(world, tmp_path, "train", features=[{**feature, "top_k": 8}])
    alone = built(world, tmp_path / "alone", "train", features=[{**feature, "top_k": 8}])
    cut, scored = whole(less.cache).columns[0], whole(alone.cache).columns[0]
    assert isinstance(cut, Features)
    assert isinstance(scored, Features)
    for name in ("splits", "indices", "acts", "active"):
        assert np.array_equal(getattr(cut, name), getattr(scored, name)), name
    np.testing.assert_allclose(cut.tail_sq, scored.tail_sq, rtol=1e-5, atol=1e-9)
    more = [{**feature, "top_k": "all"}, {**feature, "hookpoint": "model.layers.2"}]
    both = built(world, tmp_path, "train", features=more, objective={"hookpoints": ["model.layers.1"]})
    assert [column.built for column in both.columns] == [True, True]
    assert len(both.cache.held_columns()) == 3
    assert both.cache.digest == plain.cache.digest


def test_a_base_without_a_column_answers_with_how_to_add_it(world: TinyWorld, tmp_path: Path) -> None:
    built(world, tmp_path, "train", features=[], objective={"name": "dpo"})
    recipe = world.recipe(data={"eval_split": None})
    with pytest.raises(CacheMissing, match=r"has no column of features at model\.layers\.1, top 16 .*fpo cache RECIPE"):
        find_cache(recipe, tmp_path)
    assert find_cache(world.recipe(objective={"name": "dpo"}), tmp_path).columns == ()


def test_a_column_killed_half_way_is_finished_with_the_same_bytes(world: TinyWorld, tmp_path: Path) -> None:
    """The base is there; the process that adds a column stops at its second shard, the next one goes on."""
    whole_column = built(world, tmp_path / "once", "train").columns[0].key
    built(world, tmp_path / "twice", "train", features=[], objective={"name": "dpo"})
    with stopped_at_the_second_shard():
        built(world, tmp_path / "twice", "train")
    report = built(world, tmp_path / "twice", "train")
    assert (report.built_shards, report.columns[0].key) == (2, whole_column)
    for once in sorted((tmp_path / "once").glob("*/columns/*/shards/*")):
        assert (tmp_path / "twice" / once.relative_to(tmp_path / "once")).read_bytes() == once.read_bytes()


def test_groups_of_any_size_and_masked_tokens_are_cached_as_a_plain_forward_has_them(
    world: TinyWorld, tmp_path: Path
) -> None:
    """k = 1, 2, 4 and 9 completions, an empty prompt, completions of one token: every log-prob from a forward alone."""
    rng = np.random.default_rng(3)
    rows = []
    for number, k in enumerate((1, 2, 4, 9, 3, 2)):
        words = [" " + " ".join(rng.choice([f"w{n}" for n in range(90)], rng.integers(1, 6))) for _ in range(k)]
        rows.append({"prompt": "" if number == 4 else "w1 w2 w3", "completions": words, "scores": list(range(k))})
    (report,) = build_caches(
        world.recipe(data=variant(world, tmp_path, "groups", rows), cache=EVERYTHING), tmp_path / "s"
    )
    groups = whole(report.cache)
    assert groups.n_completions.tolist() == [1, 2, 4, 9, 3, 2]
    assert groups.score.tolist()[3:7] == [3.0, 2.0, 1.0, 0.0]
    model = AutoModelForCausalLM.from_pretrained(world.root / "model").eval()
    bounds = groups.splits.astype(int)
    segment = completion = 0
    for n in groups.n_completions.tolist():
        prompt = groups.input_ids[bounds[segment] : bounds[segment + 1]]
        for at in range(segment + 1, segment + 1 + n):
            tokens = groups.input_ids[bounds[at] : bounds[at + 1]]
            ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))[None]
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0].log_softmax(-1)
            here = np.arange(max(len(prompt), 1), ids.shape[1])
            expected = logps[here - 1, ids[0, here]].numpy()
            scored = slice(groups.scored_splits[completion], groups.scored_splits[completion + 1])
            np.testing.assert_allclose(groups.token_logps[scored], expected, atol=1e-5)
            completion += 1
        segment += n + 1


def test_groups_longer_than_a_forward_are_cut_behind_their_prompt(world: TinyWorld, tmp_path: Path) -> None:
    """A forward of 12 tokens where groups have up to 60: the same rows, and no forward of more than fits."""
    rng = np.random.default_rng(5)
    rows = [
        {
            "prompt": "w1 w2 w3",
            "completions": [" " + " ".join(rng.choice([f"w{n}" for n in range(90)], 4)) for _ in range(k)],
            "scores": list(range(k)),
        }
        for k in (1, 9, 2, 4)
    ]
    recipe = world.recipe(data=variant(world, tmp_path, "long", rows), cache=EVERYTHING)
    (wide,) = build_caches(recipe, tmp_path / "wide")
    sizes: list[int] = []
    score = score_module.ReferenceScorer._score_batch

    def noting(self: score_module.ReferenceScorer, groups: score_module.TokenGroups, *rest: object) -> list[Column]:
        sizes.append(len(groups.input_ids))
        return score(self, groups, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_module.ReferenceScorer, "_score_batch", noting)
        (narrow,) = build_caches(recipe, tmp_path / "narrow", batch_tokens=16)
    assert max(sizes) <= 16
    assert narrow.cache.key == wide.cache.key
    one, other = whole(narrow.cache), whole(wide.cache)
    np.testing.assert_allclose(one.token_logps, other.token_logps, atol=1e-5)
    for column, expected in zip(one.columns, other.columns, strict=True):
        assert np.array_equal(column.splits, expected.splits)
        for name in column.ENTRIES:
            np.testing.assert_allclose(getattr(column, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_a_column_too_wide_for_a_shard_is_refused_before_anything_is_scored(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_the_model(monkeypatch)
    monkeypatch.setattr("fpo.stage1_cache.identity.MAX_RAW_BYTES", 500)
    with pytest.raises(RecipeError, match=r"top 4 logits: the largest group would take 0 MiB of it, a shard holds 0"):
        build_caches(world.recipe(cache={"top_logits": 4}), tmp_path)
