"""What is told of the data before any forward: bad rows, lengths, margins, overlap; by command, manifest and page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_world import TinyWorld, build_tiny_world
from transformers import AutoTokenizer
from typer.testing import CliRunner

from fpo.cli import app
from fpo.errors import DataError
from fpo.stage1_cache import build_caches, look_at_data
from fpo.stage1_cache.drops import BINS, DropReport, Spread

pytestmark = pytest.mark.usefixtures("private_memory")

PAIR = {"prompt": "w1 w2", "chosen": " w10", "rejected": " w11 w12"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), 30, 6)


def split(world: TinyWorld, rows: list[dict[str, Any]], folder: Path, **data: Any) -> DropReport:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = {"source": str(path), "split": "train", "eval_split": None, **data}
    return look_at_data(world.recipe(features=[], objective={"name": "dpo"}, data=given))[0].drops


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_bad_rows_are_refused_or_left_out_with_their_numbers(world: TinyWorld, tmp_path: Path) -> None:
    rows = [PAIR, {**PAIR, "chosen": None}, {**PAIR, "prompt": "w3"}, {**PAIR, "rejected": None, "prompt": None}]
    with pytest.raises(DataError, match=r"rows.jsonl, row 3, column 'prompt': missing or null"):
        split(world, rows, tmp_path)
    report = split(world, rows, tmp_path, on_bad_row="drop")
    assert (report.read, report.kept) == (4, 2)
    assert report.dropped["bad_row"].rows == [1, 3]


def test_bad_scores_and_bad_lists_are_left_out_too(world: TinyWorld, tmp_path: Path) -> None:
    scored = [{**PAIR, "score_chosen": value, "score_rejected": 1.0} for value in (2.0, None, 3.0)]
    assert split(world, scored, tmp_path, on_bad_row="drop").dropped["bad_row"].rows == [1]
    lists = [{"prompt": "w1", "completions": [" w2", " w3"], "scores": scores} for scores in ([1, 2], [1], [2, 1])]
    assert split(world, lists, tmp_path, on_bad_row="drop").dropped["bad_row"].rows == [1]


def test_what_a_chat_template_refuses_is_left_out_too(world: TinyWorld, tmp_path: Path) -> None:
    turns = [[{"role": role, "content": "w1"}] for role in ("user", "oracle", "user")]
    rows = [{"prompt": turn, "chosen": messages("w2"), "rejected": messages("w3")} for turn in turns]
    template = (
        "{% for m in messages %}{% if m.role == 'oracle' %}{{ raise_exception('no oracles') }}{% endif %}"
        "{{ m.content + ' ' }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"row 1.*no oracles"):
        split(world, rows, tmp_path, chat_template=template)
    report = split(world, rows, tmp_path, chat_template=template, on_bad_row="drop")
    assert report.dropped["bad_row"].rows == [1]
    assert report.kept == 2


def test_lengths_and_margins_are_those_of_the_rows(world: TinyWorld, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = {"prompt": rng.integers(1, 9, 50), "chosen": rng.integers(1, 20, 50), "rejected": rng.integers(1, 6, 50)}
    scores = rng.normal(size=(50, 2)).round(3)
    rows = [
        {
            **{part: " ".join(["w1"] * n) for part, n in zip(sizes, counts, strict=True)},
            "score_chosen": scores[row, 0],
            "score_rejected": scores[row, 1],
        }
        for row, counts in enumerate(zip(*sizes.values(), strict=True))
    ]
    for row in rows:
        row["chosen"], row["rejected"] = f" w2 {row['chosen']}", f" w3 {row['rejected']}"
    report = split(world, rows, tmp_path)
    # A prompt has BOS before it, a completion its first word and EOS.
    expected = {name: counts + (1 if name == "prompt" else 2) for name, counts in sizes.items()}
    for name, counts in expected.items():
        spread = report.spreads[f"{name} tokens"]
        assert [float(q) for q in spread.quantiles] == [
            np.sort(counts)[round(q * 49)] for q in (0.0, 0.05, 0.5, 0.95, 1.0)
        ]
        edges = np.array(spread.edges, dtype=float)
        assert len(edges) == BINS + 1
        assert sum(spread.counts) == 50
        assert spread.counts[-1] == ((counts >= edges[-2]) & (counts <= edges[-1])).sum()
    assert report.spreads["chosen tokens"].edges == report.spreads["rejected tokens"].edges
    margins = np.abs(scores[:, 0] - scores[:, 1])
    assert float(report.spreads["score margin"].quantiles[-1]) == pytest.approx(margins.max(), rel=1e-5)
    assert report.noted["score_against"].count == (scores[:, 0] < scores[:, 1]).sum()


def test_ties_are_noted_and_scores_that_say_nothing_have_no_histogram(world: TinyWorld, tmp_path: Path) -> None:
    tied = split(world, [{**PAIR, "score_chosen": 2, "score_rejected": 2}] * 2, tmp_path)
    assert tied.noted["tied"].rows == [0, 1]
    assert tied.spreads["score margin"].quantiles == ["0"] * 5
    assert "score margin" not in split(world, [PAIR], tmp_path).spreads
    assert Spread.of(np.array([np.nan])) is None


def test_the_command_the_manifest_and_the_page_say_the_same(world: TinyWorld, tmp_path: Path) -> None:
    source = tmp_path / "pairs"
    source.mkdir()
    rows = (world.root / "pairs" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (source / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (source / "test.jsonl").write_text("\n".join([rows[4], rows[7], json.dumps(PAIR)]) + "\n", encoding="utf-8")
    recipe = world.recipe_file(features=[], objective={"name": "dpo"}, data={"source": str(source)})
    page = tmp_path / "data.html"
    said = CliRunner().invoke(app, ["data", str(recipe), "--html", str(page)], catch_exceptions=False)
    assert "noted 2: the training split holds them too" in said.stdout
    assert "prompt " in said.stdout
    told = json.loads(CliRunner().invoke(app, ["data", str(recipe), "--json"], catch_exceptions=False).stdout)
    held = re.search(
        r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL
    )
    assert held is not None
    assert json.loads(held[1]) == told
    assert [one["trained_on"] for one in told] == [0, 2]
    loaded = world.recipe(features=[], objective={"name": "dpo"}, data={"source": str(source)})
    caches = build_caches(loaded, tmp_path / "store")
    assert [report.cache.manifest.facts["drops"] for report in caches] == [one["drops"] for one in told]
    tokenizer = AutoTokenizer.from_pretrained(world.root / "model")
    longest = max(len(tokenizer(json.loads(row)["chosen"])["input_ids"]) for row in rows)
    assert float(told[0]["drops"]["spreads"]["chosen tokens"]["quantiles"][-1]) == longest
