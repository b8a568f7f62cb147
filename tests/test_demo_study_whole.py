"""A study of two methods and two seeds in a miniature world: killed and begun again, and added up by other means."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fpo.demo.autoencoder import AutoencoderSettings
from fpo.demo.build import WorldSettings, build_world
from fpo.demo.language_model import LanguageModelSettings
from fpo.demo.preferences import PreferenceSettings
from fpo.demo.study import page, run, summary
from fpo.demo.study.plan import ABLATIONS, METHODS, Place

pytestmark = pytest.mark.long

MINIATURE = WorldSettings(
    vocab_size=700,
    tokenizer_stories=400,
    # As many layers as the plan's feature term needs.
    language_model=LanguageModelSettings(
        hidden_size=48, intermediate_size=96, layers=4, steps=70, batch_size=8, heldout_stories=40
    ),
    autoencoder=AutoencoderSettings(layer=3, d_sae=96, k=8, stories=60, steps=60, batch_size=128, heldout_stories=20),
    preferences=PreferenceSettings(train_pairs=48, test_pairs=16),
)
GRIDS = {"fpo": {"beta": (15.0,), "alpha": (20.0, 200.0)}, "fpo_0": {"beta": (15.0, 50.0)}}
TWO = tuple(replace(method, grid=GRIDS[method.name]) for method in METHODS if method.name in GRIDS)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """The plan of two methods, two seeds and one ablation; processes get their work from here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "LAYERS", ())
        patch.setattr(run, "FPO", TWO[0])
        patch.setattr(run, "OTHER_RATES", (3e-4,))
        patch.setattr(run, "cached", lambda place: run.recipe(place, TWO[0].fixed, top_k="all"))
        for module in (run, summary):
            patch.setattr(module, "METHODS", TWO)
            patch.setattr(module, "SEEDS", (0, 1))
            patch.setattr(module, "ABLATIONS", ABLATIONS[:1], raising=False)
        patch.setattr(run, "FEWER_SEEDS", (0,))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("study")
    build_world(root / "world", MINIATURE)
    place = Place(root / "world", root / "study")
    run.study(place, processes=2)
    return place


def results(place: Place) -> dict[str, Any]:
    """Every file of results, by its place; without how long it took."""
    files = sorted([*place.root.rglob("held_out.json"), *place.root.rglob("spoken.json"), place.chosen])
    read = {str(file.relative_to(place.root)): json.loads(file.read_text()) for file in files}
    for found in read.values():
        found.pop("seconds", None)
    return read


def test_a_killed_study_goes_on_to_what_an_uninterrupted_one_says(whole: Place, tmp_path: Path) -> None:
    """
    What a kill leaves: a run that was not begun, one that was begun and not trained, one that was trained and not
    measured, one that did not speak. The others are left as they are.
    """
    place = Place(whole.world, tmp_path / "study")
    shutil.copytree(whole.root, place.root)
    missing, begun, trained, silent, *others = sorted(place.root.glob("methods/*"))
    shutil.rmtree(missing)
    for name in ("held_out.json", "spoken.json"):
        (begun / name).unlink()
        (trained / name).unlink()
    for name in ("model.safetensors", "config.json", "metrics.jsonl"):
        (begun / name).unlink()
    facts = json.loads((begun / "run.json").read_text())
    (begun / "run.json").write_text(json.dumps(facts | {"complete": False}))
    (silent / "spoken.json").unlink()
    before = {file: file.stat().st_mtime_ns for other in others for file in other.iterdir()}
    assert results(place) != results(whole)

    run.study(place, processes=2)

    assert results(place) == results(whole)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_the_summary_says_what_the_run_folders_say(whole: Place) -> None:
    """Means by the standard library, from the files alone."""
    told = summary.summary(whole)
    assert [one["name"] for one in told["methods"]] == ["fpo", "fpo_0"]
    folders = list(whole.root.glob("*/*/spoken.json"))
    counts = {"done": len(folders), "methods": 4, "one_rate": 4, "ablations": 1}
    assert {name: told["runs"][name] for name in counts} == counts
    for one in told["methods"]:
        choice = told["chosen"][one["name"]]
        folders = [
            whole.root / "methods" / run.named(method, choice["objective"], choice["rate"], seed)
            for method in TWO
            for seed in (0, 1)
            if method.name == one["name"]
        ]
        spoken = [json.loads((folder / "spoken.json").read_text()) for folder in folders]
        held_out = [json.loads((folder / "held_out.json").read_text()) for folder in folders]
        assert one["gold"]["value"] == pytest.approx(
            statistics.mean([value for run in spoken for value in run["gold"]])
        )
        assert one["kl"]["value"] == pytest.approx(statistics.mean([value for run in spoken for value in run["kl"]]))
        assert one["entropy"]["value"] == pytest.approx(statistics.mean(run["entropy"] for run in spoken))
        margins = [value for run in held_out for value in run["margins"]]
        right = statistics.mean(float(margin > 0) + 0.5 * (margin == 0) for margin in margins)
        assert one["accuracy"]["value"] == pytest.approx(right)


def test_tuning_takes_the_surest_margin_of_what_it_tried(whole: Place) -> None:
    """Again from the files: the mean of margins over their standard deviation."""
    best = json.loads(whole.chosen.read_text())
    for method in TWO:
        tried = {}
        for file in whole.root.glob(f"methods/{method.name}__*__seed=0/held_out.json"):
            margins = json.loads(file.read_text())["margins"]
            tried[file.parent.name] = statistics.mean(margins) / statistics.stdev(margins)
        choice = best[method.name]
        assert len(tried) == 3
        assert max(tried, key=tried.__getitem__) == run.named(method, choice["objective"], choice["rate"], 0)


def test_the_page_is_brought_up_to_the_summary(whole: Place, tmp_path: Path) -> None:
    target = tmp_path / "study.md"
    target.write_text("Mine.\n\n<!-- table methods -->\n<!-- end -->\n")
    arguments = [str(target), "--world", str(whole.world), "--study", str(whole.root)]
    assert page.main(arguments) == 0
    text = target.read_text()
    assert text.startswith("Mine.\n")
    assert "| FPO, alpha 0 |" in text
    assert (tmp_path / "study" / "one-rate.svg").is_file()
    assert json.loads((tmp_path / "study" / "summary.json").read_text())["methods"][0]["name"] == "fpo"
