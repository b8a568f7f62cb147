"""The judges' own code reads what `fpo generate` writes: AlpacaEval's, and FastChat's for MT-Bench."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from packaging.version import parse
from test_evaluation_generate import TURNS, lines

from fpo.evaluation.formats import file_of
from fpo.evaluation.generate import Generation
from fpo.evaluation.prompts import read_prompts

pytestmark = pytest.mark.oracle

CONFIG = """\
tiny:
  prompt_template: "tiny/prompt.txt"
  fn_completions: "test_completions"
  completions_kwargs:
    value: "Output (b)"
  fn_completion_parser: "regex_parser"
  completion_parser_kwargs:
    outputs_to_match:
      1: '(?i)output \\(a\\)'
      2: '(?i)output \\(b\\)'
  batch_size: 1
"""


def test_alpaca_evals_own_code_counts_our_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its annotator says "Output (b)" of every pair, whichever stands there: what matters is that pairs are found."""
    pytest.importorskip("openai")  # which it brings along; itself it does not import without the stand-in
    # setuptools 81 left it out; alpaca-eval 0.6 asks it for versions.
    stand_in = SimpleNamespace(
        parse_version=parse, get_distribution=lambda name: SimpleNamespace(version=version(name))
    )
    monkeypatch.setitem(sys.modules, "pkg_resources", stand_in)  # type: ignore[arg-type]
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    evaluate: Any = importlib.import_module("alpaca_eval.main").evaluate
    asked = [{"instruction": f"What is {n}?", "dataset": "koala"} for n in range(6)]
    prompts = read_prompts(str(lines(tmp_path / "eval.jsonl", asked)), "train", as_text=False)
    files = {}
    for name in ("mine", "other"):
        rows = [Generation(n, 0, [f"{name} says {n}"], [3], [True]) for n in range(6)]
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(file_of("alpaca-eval", prompts, rows, name, 0.0, len))
    config = tmp_path / "tiny"
    config.mkdir()
    (config / "configs.yaml").write_text(CONFIG)
    (config / "prompt.txt").write_text("<|im_start|>user\n{instruction}\n(a) {output_1}\n(b) {output_2}<|im_end|>\n")
    board, annotations = evaluate(
        model_outputs=str(files["mine"]),
        reference_outputs=str(files["other"]),
        annotators_config=str(config),
        precomputed_leaderboard=None,
        fn_metric="get_winrate",
        sort_by="win_rate",
        output_path=None,
        caching_path=None,
        is_return_instead_of_print=True,
    )
    assert len(annotations) == 6
    assert {(row["instruction"], row["output_1"], row["output_2"]) for row in annotations} == {
        (f"What is {n}?", f"other says {n}", f"mine says {n}") for n in range(6)
    }
    assert board.index.tolist() == ["mine"]
    assert board["n_total"].tolist() == [6]


def test_fastchats_own_code_finds_every_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loader and its check; of what it imports and we have no use for stand-ins suffice."""
    pytest.importorskip("fastchat")
    for name in ("anthropic", "fastchat.model", "fastchat.model.model_adapter"):
        module = ModuleType(name)
        module.__dict__.update(get_conversation_template=None, ANTHROPIC_MODEL_LIST=(), OPENAI_MODEL_LIST=())
        monkeypatch.setitem(sys.modules, name, module)
    common: Any = importlib.import_module("fastchat.llm_judge.common")
    source = lines(tmp_path / "question.jsonl", [{**turn, "category": "writing"} for turn in TURNS])
    prompts = read_prompts(str(source), "train", as_text=False)
    rows = [Generation(n, 0, [f"first {n}", f"second {n}"], [2, 2], [True, True]) for n in range(2)]
    folder = tmp_path / "model_answer"
    folder.mkdir()
    (folder / "mine.jsonl").write_text(file_of("mt-bench", prompts, rows, "mine", 0.0, len))
    questions = common.load_questions(str(source), None, None)
    answers = common.load_model_answers(str(folder))
    common.check_data(questions, answers, {}, ["mine"], {})
    assert answers["mine"][82]["choices"][0]["turns"] == ["first 1", "second 1"]
    judge = SimpleNamespace(
        model_name="none",
        prompt_template={
            "prompt_template": "{question_1}|{answer_1}|{question_2}|{answer_2}",
            "system_prompt": "",
            "type": "single",
            "output_format": "[[rating]]",
        },
    )
    monkeypatch.setattr(common, "get_conversation_template", lambda _: _Conversation())
    monkeypatch.setattr(common, "OPENAI_MODEL_LIST", ("none",))
    monkeypatch.setattr(common, "chat_completion_openai", lambda *_, **__: "[[7]]")
    rating, prompt, _ = common.run_judge_single(questions[0], answers["mine"][81], judge, None, multi_turn=True)
    assert rating == 7
    assert prompt == "w1 w2|first 0|w3|second 0"
    assert json.dumps(answers)  # plain JSON throughout


class _Conversation:
    roles = ("user", "assistant")

    def set_system_message(self, _: str) -> None:
        pass

    def append_message(self, *_: Any) -> None:
        pass
