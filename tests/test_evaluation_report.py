"""`fpo features` on a cache: parts of the data, pairs with token heat, steering rows, and what is printed."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from feature_pairs import pairs_of
from tiny_world import TinyWorld, build_tiny_world

from fpo import cli
from fpo.errors import CacheConflict, CacheMissing, DataError, FpoError
from fpo.evaluation.breakdown import data_column, sources, topics
from fpo.evaluation.examples import ExampleReader
from fpo.evaluation.feature_report import FeatureReport, Question, feature_columns, feature_report
from fpo.evaluation.gaps import feature_gaps
from fpo.evaluation.labels import Label, Names
from fpo.evaluation.pairs import read_gaps, read_pairs
from fpo.evaluation.steering import SteerRow, steer_rows, steer_target, write_steer_rows
from fpo.evaluation.top_pairs import TopPairs
from fpo.stage1_cache import build_caches, find_cache
from fpo.store import Cache

OPTIONS = {"shard_pairs": 16, "prompt_features": True}
EVIL = "<script>alert(1)</script>\x1b[31mred\u202e"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """40 pairs of three sources; features of completions and prompts, few enough to be cut."""
    world = build_tiny_world(tmp_path_factory.mktemp("world"), 40, 4)
    path = world.root / "pairs" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "source": f"s{n % 3}"}) + "\n" for n, row in enumerate(rows)))
    build_caches(world.recipe(cache=OPTIONS), world.store)
    (world.root / "recipe.yaml").write_text(yaml.safe_dump(world.raw_recipe(cache=OPTIONS)), encoding="utf-8")
    return world


@pytest.fixture
def cache(world: TinyWorld) -> Cache:
    """Of the training split."""
    return find_cache(world.recipe(cache=OPTIONS), world.store)


@pytest.fixture
def fpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object, expect: int = 0) -> str:
        """What a command prints to stdout, or to stderr where it fails."""
        monkeypatch.setattr(sys, "argv", ["fpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        assert (end.value.code or 0) == expect, printed.err
        return printed.err if expect else printed.out

    return run


def report_of(cache: Cache, **question: Any) -> FeatureReport:
    (spec,) = feature_columns(cache)
    pairs = read_pairs(cache)
    return feature_report(cache, spec, pairs, Question(**{"top": 3, **question}), Names({3: Label(EVIL, "x")}))


def test_a_topic_is_where_its_prompts_have_the_feature() -> None:
    """Prompt feature 5 fires for 2 of 10, and there alone feature 2 of completions has a gap; 0 is no topic."""
    rng = np.random.default_rng(0)
    P = 200
    about = np.arange(P) % 10 < 2
    of_prompts = np.zeros((P, 8), np.float32)
    of_prompts[:, 0] = 1
    of_prompts[about, 5] = rng.random(about.sum()) + 0.1
    of_prompts[about, 6] = 1  # the same topic by another feature
    acts = rng.random((P, 2, 8)).astype(np.float32)
    acts[about, 0, 2] += 1
    cache = pairs_of(acts, of_prompts=of_prompts, shards=3)
    pairs = read_pairs(cache)
    (topic,) = topics(cache, 1, 8, pairs)
    assert topic.name == "5"
    assert topic.rows.tolist() == about.tolist()
    whole, part = feature_gaps(cache, 0, 8, [pairs, pairs.among(topic.rows)])
    gap = (acts[:, 0, 2] - acts[:, 1, 2]).astype(np.float64)
    assert part.gap.value[2] == pytest.approx(gap[about].mean(), rel=1e-5)
    assert whole.gap.value[2] == pytest.approx(gap.mean(), rel=1e-5)
    assert part.n_pairs == 40


def test_sources_are_the_values_of_a_column_of_the_data(world: TinyWorld, cache: Cache) -> None:
    names = data_column(world.recipe(cache=OPTIONS), cache, "source")
    pairs = read_pairs(cache)
    parts = sources(pairs, names)
    assert [(part.name, int(part.rows.sum())) for part in parts] == [("s0", 14), ("s1", 13), ("s2", 13)]
    assert all((pairs.group_id[part.rows] % 3 == int(part.name[1])).all() for part in parts)
    with pytest.raises(DataError, match="no column 'sorce'"):
        data_column(world.recipe(cache=OPTIONS), cache, "sorce")
    with pytest.raises(CacheConflict, match="not that of cache"):
        data_column(world.recipe(cache=OPTIONS, data={"max_length": 8}), cache, "source")


def test_top_pairs_are_the_largest_gaps_of_different_prompts() -> None:
    rng = np.random.default_rng(1)
    acts, prompt = rng.random((60, 2, 4)).astype(np.float32), rng.integers(0, 20, 60)
    cache = pairs_of(acts, prompt, shards=4)
    pairs = read_pairs(cache)
    tops = TopPairs(pairs, np.array([3, 1]), np.array([-1, 1]), 5)
    for shard in tops.watching(read_gaps(cache, 0, pairs)):
        assert len(shard.own)
    for feature, lean in ((3, -1), (1, 1)):
        leaning = lean * (acts[:, 0, feature] - acts[:, 1, feature]).astype(np.float64)
        best = sorted({one: max(leaning[prompt == one]) for one in set(prompt.tolist())}.values(), reverse=True)[:5]
        found = tops.found()[feature]
        np.testing.assert_allclose([lean * (top.chosen - top.rejected) for top in found], best, rtol=1e-5)
        assert len({int(pairs.prompt[top.pair]) for top in found}) == 5


def test_the_heat_of_a_pair_adds_up_to_what_the_cache_says(world: TinyWorld, cache: Cache) -> None:
    """Of every pair that is shown: the mean of a completion's heat is its cached activation, wherever that was kept."""
    report = report_of(cache, examples=2, recipe=world.recipe(cache=OPTIONS))
    shown = [(one, side) for own in report.examples.values() for one in own for side in ("chosen", "rejected")]
    assert len(shown) > 12
    for example, side in shown:
        passage, cached = getattr(example, side), getattr(example, f"{side}_cached")
        if cached:
            assert passage.act == pytest.approx(cached, rel=1e-4)
        assert passage.act == pytest.approx(sum(passage.heat) / (passage.of - 1), rel=1e-5)  # short: all of it is shown
        assert len(passage.tokens) == len(passage.heat) == passage.of
        assert passage.heat[-1] == 0


def test_a_shown_pair_is_the_text_of_the_data(world: TinyWorld, cache: Cache) -> None:
    report = report_of(cache, examples=1, recipe=world.recipe(cache=OPTIONS))
    rows = [json.loads(line) for line in (world.root / "pairs" / "train.jsonl").read_text().splitlines()]
    for example in [one for own in report.examples.values() for one in own]:
        row = rows[example.group_id]
        assert row["prompt"] in example.prompt
        for side in ("chosen", "rejected"):
            text = "".join(getattr(example, side).tokens)
            assert row[side].split() == text.replace("<eos>", "").split()[1:]  # behind the prompt's last token


def test_another_reference_shows_no_pairs(world: TinyWorld, cache: Cache, tmp_path: Path) -> None:
    other = build_tiny_world(tmp_path, 4, 2, family="gpt2")
    (spec,) = feature_columns(cache)
    with pytest.raises(CacheConflict, match="does not score as cache"):
        ExampleReader(other.recipe(), cache, spec)


def test_a_report_holds_parts_and_says_how_much_is_cut(world: TinyWorld, cache: Cache) -> None:
    report = report_of(cache)
    assert (report.pairs, report.prompts, report.top_k) == (40, len(set(read_pairs(cache).prompt.tolist())), 16)
    assert report.lost_any[0] > 0
    assert {part.kind for part in report.parts} == {"topic"}
    shown = [row.feature for row in report.features]
    assert all({one.feature for one in part.features} >= set(shown) for part in report.parts)
    assert [row.leans for row in report.features] == sorted(row.leans for row in report.features)
    assert all((row.gap > 0) == (row.leans == "chosen") and row.low < row.gap < row.high for row in report.features)


def test_no_features_and_another_hookpoint_are_refused(cache: Cache) -> None:
    with pytest.raises(CacheMissing, match=r"no features at model.layers.7; it has them at model.layers.1"):
        feature_columns(cache, "model.layers.7")


def test_the_command_prints_what_its_json_says(world: TinyWorld, cache: Cache, fpo: Any) -> None:
    arguments = ["features", cache.key[:8], "--store", world.store, "--top", 4]
    (report,) = json.loads(fpo(*arguments, "--json"))
    printed = fpo(*arguments)
    for row in report["features"]:
        assert f"{row['feature']}" in printed
        assert f"{row['gap']:+.3g}" in printed
        assert f"{row['low']:+.3g} to {row['high']:+.3g}" in printed
    for part in ("length", "features", "both"):
        auc = report["prediction"][part]["auc"]
        assert f"{part} {auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})" in printed
    assert "no pairs are shown; with --recipe" in printed


def test_a_label_stays_text_in_a_terminal(world: TinyWorld, cache: Cache, fpo: Any, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps({"index": str(n), "description": EVIL}) + "\n" for n in range(48)))
    printed = fpo("features", cache.key, "--store", world.store, "--labels", path)
    assert "<script>" in printed
    assert "\x1b" not in printed
    assert "\u202e" not in printed


class Cells(HTMLParser):
    """The rows of every table of a page: exact values where a cell has one, else its words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.elements: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(dict(attrs).get("data-v") or "")
            self._inside = self.tables[-1][-1][-1] == ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.tables[-1][-1][-1] += data


def numbers_of(value: Any) -> set[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        return set().union(*map(numbers_of, value.values()))
    if isinstance(value, list):
        return set().union(*map(numbers_of, value))
    return {float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def test_every_number_of_the_page_is_one_of_its_json(world: TinyWorld, cache: Cache, fpo: Any, tmp_path: Path) -> None:
    """Exact values of all cells of all tables; the data in the page is what --json prints."""
    path = tmp_path / "page.html"
    arguments = ["--store", world.store, "--recipe", world.root / "recipe.yaml", "--by", "source", "--html", path]
    facts = json.loads(fpo("features", cache.key, *arguments, "--json"))
    page = path.read_text(encoding="utf-8")
    data = page.split('type="application/json" id="data">')[1].split("</script>")[0]
    assert json.loads(data) == facts
    topics_shown = {float(part["name"]) for part in facts[0]["parts"] if part["kind"] == "topic"}
    known, seen = numbers_of(facts) | topics_shown, 0
    for table in Cells(page).tables:
        for row in table[1:]:
            for cell in row:
                with contextlib.suppress(ValueError):
                    assert float(cell) in known, (cell, row)
                    seen += 1
    assert seen > 300
    assert all(f'id="pairs-model.layers.1-{row["feature"]}"' in page for row in facts[0]["features"])


def test_a_label_stays_text_on_a_page(world: TinyWorld, cache: Cache, fpo: Any, tmp_path: Path) -> None:
    path, labels = tmp_path / "page.html", tmp_path / "labels.jsonl"
    plain = tmp_path / "plain.html"
    labels.write_text("".join(json.dumps({"index": str(n), "description": EVIL}) + "\n" for n in range(48)))
    arguments = ["features", cache.key, "--store", world.store, "--html"]
    fpo(*arguments, path, "--labels", labels)
    fpo(*arguments, plain)
    page = path.read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\x1b" not in page
    assert "\u202e" not in page.split('type="application/json"')[0]
    scripts = [Cells(one.read_text(encoding="utf-8")).elements.count("script") for one in (path, plain)]
    assert scripts[0] == scripts[1]


def test_examples_and_sources_need_a_recipe(world: TinyWorld, cache: Cache, fpo: Any) -> None:
    said = fpo("features", cache.key, "--store", world.store, "--examples", 2, expect=1)
    assert said.startswith("error: --examples needs --recipe")
    assert "--by needs --recipe" in fpo("features", cache.key, "--store", world.store, "--by", "source", expect=1)


def test_by_and_examples_with_the_recipe(world: TinyWorld, cache: Cache, fpo: Any) -> None:
    recipe = world.root / "recipe.yaml"
    arguments = ["--store", world.store, "--recipe", recipe, "--by", "source", "--top", 2, "--json"]
    (report,) = json.loads(fpo("features", cache.key, *arguments))
    assert {part["name"] for part in report["parts"] if part["kind"] == "source"} == {"s0", "s1", "s2"}
    assert {len(own) for own in report["examples"].values()} == {3}


def test_steering_with_an_sae_of_this_machine_is_refused_before_anything_is_read(
    world: TinyWorld, cache: Cache, fpo: Any, tmp_path: Path
) -> None:
    path = tmp_path / "steer.csv"
    assert "none of the hub" in fpo("features", cache.key, "--store", world.store, "--steer", path, expect=1)
    assert not path.exists()


def steered(sae: str, form: str) -> list[SteerRow]:
    world_spec = {"hookpoint": "model.layers.12", "sae": {"config": {"format": form}}}
    from fpo.evaluation.feature_report import FeatureRow

    common = dict.fromkeys(FeatureRow._fields, None) | {"chosen": 0.6, "rejected": 0.2}
    common |= {"fires_chosen": 0.3, "fires_rejected": 0.1}
    rows = [
        FeatureRow(**common | {"feature": 7, "leans": "chosen", "z": 9.0, "label": "kind, warm"}),
        FeatureRow(**common | {"feature": 4, "leans": "rejected", "z": -5.0}),
    ]
    return steer_rows(rows, steer_target(world_spec, sae))


def test_steering_rows_are_those_that_lm_eval_reads(tmp_path: Path) -> None:
    """
    Columns as lm_eval/models/hf_steered.py has them; the hookpoint inside its `base_model`. What completions that have
    the feature carry of it: 0.6 / 0.3 of chosen, -0.2 / 0.1 of rejected. The surest stands last: lm-eval keeps that.
    """
    path = tmp_path / "steer.csv"
    write_steer_rows(steered("google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "gemma_scope"), path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    header = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,sae_id,description"
    assert path.read_text(encoding="utf-8").splitlines()[0] == header
    assert [(row["feature_index"], float(row["steering_coefficient"])) for row in rows] == [("4", -2.0), ("7", 2.0)]
    assert rows[1] | {"steering_coefficient": ""} == {
        "loader": "sae_lens",
        "action": "add",
        "sparse_model": "google/gemma-scope-2b-pt-res",
        "hookpoint": "layers.12",
        "feature_index": "7",
        "steering_coefficient": "",
        "head_index": "",
        "sae_id": "layer_12/width_16k/average_l0_82",
        "description": "kind, warm",
    }


def test_sparsify_is_loaded_by_the_folder_of_its_hookpoint() -> None:
    assert steered("EleutherAI/sae-llama-3-8b-32x/layers.12", "sparsify")[0][:4] == (
        "sparsify",
        "add",
        "EleutherAI/sae-llama-3-8b-32x",
        "layers.12",
    )


@pytest.mark.parametrize(
    ("sae", "form"), [("elsewhere/sae", "saelens"), ("my/sae/layers.3", "sparsify"), (str(Path(__file__)), "saelens")]
)
def test_what_lm_eval_could_not_load_is_refused(sae: str, form: str) -> None:
    with pytest.raises(FpoError, match="--steer: lm-eval"):
        steered(sae, form)
