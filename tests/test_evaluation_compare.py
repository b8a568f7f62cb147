"""Runs beside each other: what tells their recipes apart, what they came to, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fpo.commands.compare import compare_command
from fpo.commands.comparison_page import comparison_page, runs_table
from fpo.errors import RunError
from fpo.evaluation.compare import CURVES, POINTS, Estimate, compare, run_names, thinned
from fpo.recipe import dump_recipe, load_recipe

DEMO = Path(__file__).parents[1] / "recipes" / "demo.yaml"
FACTS = {
    "manifest_digest": "0", "store": "caches", "reference": {}, "columns": [], "held_out": None, "pairs_per_step": 4,
    "steps": 80, "seconds": 20.0, "cost": {"tokens": 3000, "peak_bytes": 2**30},
}  # fmt: skip


def run(folder: Path, *overrides: str, evaluation: dict[str, Any] | None = None, rows: int = 0, **facts: Any) -> Path:
    """A run folder as far as it is compared."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(DEMO, list(overrides))))
    (folder / "run.json").write_text(json.dumps({**FACTS, "cache": "c", "complete": True, **facts}))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    lines = [json.dumps({"step": step, "loss": 1 / step, "eval_loss": 0.0}) + "\n" for step in range(1, rows + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def evaluated(accuracy: float, **more: Any) -> dict[str, Any]:
    interval = {"value": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05}
    return {"eval_rewards/accuracies": accuracy, "intervals": {"eval_rewards/accuracies": interval}, **more}


def test_only_what_differs_between_recipes_is_said(tmp_path: Path) -> None:
    one = run(tmp_path / "one")
    two = run(tmp_path / "two", "objective.alpha=7", "training.learning_rate=1e-3")
    found = compare([one, two])
    assert found.fields == ("objective.alpha", "training.learning_rate")
    assert [one.settings for one in found.runs] == [
        {"objective.alpha": 20.0, "training.learning_rate": 1e-4},
        {"objective.alpha": 7.0, "training.learning_rate": 1e-3},
    ]


def test_what_one_recipe_leaves_to_the_default_equals_what_another_says(tmp_path: Path) -> None:
    """Trainer's seed is 42."""
    assert compare([run(tmp_path / "a"), run(tmp_path / "b", "training.seed=42")]).fields == ()


def test_of_different_objectives_only_chosen_fields_are_said(tmp_path: Path) -> None:
    """FPO's alpha, beta and k are chosen in the demo's recipe; its distance and the divergence of DPO are defaults."""
    found = compare([run(tmp_path / "fpo"), run(tmp_path / "dpo", "objective={name: dpo}")])
    assert found.fields[0] == "objective.name"
    assert set(found.fields) == {"objective.name", *(f"objective.{name}" for name in ("alpha", "beta", "k"))}
    assert found.runs[1].settings["objective.alpha"] is None


def test_measures_come_with_their_intervals_where_an_evaluation_has_them(tmp_path: Path) -> None:
    samples = {"kl": {"value": 2.0, "low": 1.5, "high": 2.5}}
    new = run(tmp_path / "new", evaluation=evaluated(0.7, own_samples=samples, pairs=200))
    old = run(tmp_path / "old", evaluation={"eval_rewards/accuracies": 0.6})
    found = compare([new, old])
    assert found.runs[0].measures["accuracy"] == Estimate(0.7, pytest.approx(0.65), pytest.approx(0.75))
    assert found.runs[0].measures["kl"] == Estimate(2.0, 1.5, 2.5)
    assert found.runs[1].measures == {"accuracy": Estimate(0.6)}
    assert (found.runs[0].held_out, found.runs[1].held_out) == (200, None)
    assert found.runs[0].tokens_per_second == 150


def test_what_makes_a_comparison_doubtful_is_noted(tmp_path: Path) -> None:
    folders = [
        run(tmp_path / "a", evaluation=evaluated(0.7, pairs=200)),
        run(tmp_path / "b", evaluation=evaluated(0.7, pairs=100), cache="d"),
        run(tmp_path / "c", complete=False, cost=None, seconds=None, steps=None),
    ]
    assert compare(folders).notes == (
        "not finished: c",
        "not evaluated, do so with fpo evaluate RUN: c",
        "they were trained from 2 caches: on other pairs, or from other references",
        "they were evaluated on different pairs: 100, 200",
    )
    assert compare(folders[:1]).notes == ()


def test_runs_are_called_by_the_end_of_their_path_that_tells_them_apart() -> None:
    assert run_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert run_names([Path("/x/a/one"), Path("/x/b/two")]) == ["one", "two"]


def test_a_run_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    assert len(compare([folder, tmp_path / "." / "a", folder / ".." / "a"]).runs) == 1


def test_a_curve_is_the_mean_of_each_stretch() -> None:
    """Up to step 2: (4 + 2) / 2; from there to 4 one value; nothing up to 6."""
    rows = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}, {"step": 7, "eval_loss": 9.0}]
    assert thinned(rows, "loss", [2, 4, 6, 8]) == ([2, 4], [3.0, 1.0])


def test_curves_of_long_and_short_runs_stand_on_the_same_steps(tmp_path: Path) -> None:
    folders = [run(tmp_path / "long", rows=1000), run(tmp_path / "short", rows=10), run(tmp_path / "none")]
    long, short = compare(folders, with_curves=True).curves["loss"]
    assert len(long.steps) == POINTS
    assert long.steps[-1] == 1000
    assert short.steps == long.steps[:1]
    assert short.values == [pytest.approx(sum(1 / step for step in range(1, 11)) / 10, rel=1e-3)]
    assert compare(folders).curves == {}


def test_a_table_has_settings_first_and_a_dash_for_what_is_not_known(tmp_path: Path) -> None:
    one = run(tmp_path / "one", evaluation=evaluated(0.7))
    two = run(tmp_path / "two", "objective.alpha=7")
    assert runs_table(compare([one, two])).text() == (
        "run  alpha       reward accuracy  time  tokens/s   memory\n"
        "one     20  0.700 [0.650, 0.750]  20 s       150  1.0 GiB\n"
        "two      7                     -  20 s       150  1.0 GiB"
    )


def test_a_page_names_the_best_run_and_those_within_its_interval(tmp_path: Path) -> None:
    folders = [run(tmp_path / f"at-{value}", evaluation=evaluated(value)) for value in (0.6, 0.7, 0.68)]
    page = comparison_page(compare(folders, with_curves=True))
    assert page.lead.startswith(
        "at-0.7 ranks 0.700 [0.650, 0.750] of the held-out pairs right, the most of all; 1 more lie"
    )
    assert page.data == compare(folders, with_curves=True).facts()


def test_runs_that_know_little_still_have_a_page(tmp_path: Path) -> None:
    page = comparison_page(compare([run(tmp_path / "a", complete=False, cost=None, seconds=None)], with_curves=True))
    assert page.lead.startswith("None of them has been evaluated.")
    assert [section.title for section in page.sections] == ["Runs"]
    assert "One run: a" in page.html()


def test_the_page_of_twenty_runs_is_a_small_file(tmp_path: Path) -> None:
    """Every measure and every curve, with as many digits as runs write."""
    known = {"value": 0.123456789012345, "low": 0.0123456789012345, "high": 0.23456789012345678}
    parts = {"own_samples": {"kl": known}, "displacement": {"both_fall": known, "chosen": known, "rejected": known}}
    folders = [
        run(tmp_path / f"objective.alpha={n}", f"objective.alpha={n}", evaluation=evaluated(1 / (n + 2), **parts))
        for n in range(20)
    ]
    for n, folder in enumerate(folders):
        rows = [{"step": step, **dict.fromkeys(CURVES, -1 / (step + n + 2))} for step in range(1, 301)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = comparison_page(compare(folders, with_curves=True)).html()
    assert page.count("<figure>") == 4 + len(CURVES)
    assert len(page.encode()) < 300_000


@pytest.mark.parametrize(
    ("file", "text", "error"),
    [
        ("evaluation.json", "{", "not JSON .*write it again with: fpo evaluate"),
        ("run.json", "[", "not JSON"),
        ("run.json", None, "no run here"),
    ],
)
def test_a_folder_that_is_no_run_is_named(tmp_path: Path, file: str, text: str | None, error: str) -> None:
    folder = run(tmp_path / "a")
    (folder / file).unlink(missing_ok=True)
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(RunError, match=error):
        compare([folder])


def test_the_command_prints_the_table_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    folders = [run(tmp_path / "one", evaluation=evaluated(0.7), rows=5), run(tmp_path / "two", "objective.alpha=7")]
    compare_command(folders, html=tmp_path / "page.html")
    out = capsys.readouterr().out
    assert out.startswith("run  alpha       reward accuracy")
    assert out.endswith(
        f"\n\nnote        not evaluated, do so with fpo evaluate RUN: two\npage        {tmp_path / 'page.html'}\n"
    )
    assert "Held-out reward accuracy" in (tmp_path / "page.html").read_text()
    compare_command(folders, as_json=True)
    assert json.loads(capsys.readouterr().out) == compare(folders, with_curves=True).facts()


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        compare_command([run(tmp_path / "one")], html=tmp_path / "nowhere" / "page.html")
