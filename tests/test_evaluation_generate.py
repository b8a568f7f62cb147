"""Generation: exact sampling that depends on nothing beside a prompt, resumable, in the files that judges read."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import TinyWorld, build_tiny_world
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fpo.cli import app
from fpo.errors import DataError, ModelError, RunError
from fpo.evaluation.formats import check_format, file_of, token_counter
from fpo.evaluation.generate import Generation, generate
from fpo.evaluation.prompts import Encoder, Prompt, read_prompts
from fpo.evaluation.sampling import Sampling, Written, complete, uniforms
from fpo.evaluation.speakers import speaker_of
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
TURNS = [{"question_id": 81, "turns": ["w1 w2", "w3"]}, {"question_id": 82, "turns": ["w4 w5 w6 w7", "w8 w9"]}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), 12, 6)


@pytest.fixture(scope="module")
def model(world: TinyWorld) -> Any:
    return AutoModelForCausalLM.from_pretrained(world.root / "model").eval()


@pytest.fixture
def tokenizer(world: TinyWorld) -> Any:
    return AutoTokenizer.from_pretrained(world.root / "model")


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def some_prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 90, size)) for size in rng.integers(1, 12, count)]
    return [Prompt((text,), {"prompt": text}) for text in texts]


def engine_of(model: Any, tokenizer: Any) -> Any:
    return lambda *arguments: complete(model, tokenizer, *arguments)


def numbers_of(count: int, longest: int, seed: int = 0) -> np.ndarray:
    return np.stack([uniforms(seed, row, 0, 0, longest) for row in range(count)])


@pytest.mark.parametrize(
    ("settings", "kept"), [({"temperature": 0.5}, 97), ({"temperature": 2.0, "top_k": 7}, 7)], ids=["all", "top-k"]
)
def test_a_token_is_drawn_as_often_as_it_is_probable(
    model: Any, tokenizer: Any, settings: dict[str, Any], kept: int
) -> None:
    """Pearson's statistic over the tokens expected 5 times or more: chi-squared, beyond df + 5 sqrt(2 df) never."""
    prompt, count = [5, 9, 31], 4000
    sampling = Sampling(max_new_tokens=1, **settings)
    written = complete(model, tokenizer, [prompt] * count, numbers_of(count, 1), sampling)
    drawn = torch.tensor([one.tokens[0] for one in written]).bincount(minlength=97).double()
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double() / sampling.temperature
    out = logits.argsort(descending=True)[kept:]
    logits[out] = -torch.inf
    expected = logits.softmax(-1) * count
    assert drawn[out].sum() == 0
    often = expected >= 5
    statistic = float(((drawn - expected)[often] ** 2 / expected[often]).sum())
    df = int(often.sum()) - 1
    assert df >= 5
    assert statistic < df + 5 * (2 * df) ** 0.5


def test_the_nucleus_is_the_fewest_tokens_with_so_much_probability(model: Any, tokenizer: Any) -> None:
    prompt = [5, 9, 31]
    with torch.no_grad():
        probabilities = (model(torch.tensor([prompt])).logits[0, -1] / 0.3).softmax(-1)
    order = probabilities.argsort(descending=True)
    nucleus = int((probabilities[order].cumsum(0) < 0.6).sum()) + 1
    sampling = Sampling(max_new_tokens=1, temperature=0.3, top_p=0.6)
    written = complete(model, tokenizer, [prompt] * 500, numbers_of(500, 1), sampling)
    assert {one.tokens[0] for one in written} == set(order[:nucleus].tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_depends_on_no_other_prompt(
    model: Any, tokenizer: Any, tmp_path: Path, temperature: float
) -> None:
    """In batches of 1, 3 and 16; another seed draws others."""
    engine, prompts = engine_of(model, tokenizer), some_prompts(10)

    def rows(batch_size: int, seed: int = 0) -> list[Generation]:
        chosen = Sampling(8, temperature, seed=seed)
        part = tmp_path / f"{batch_size}-{seed}"
        return generate(prompts, engine, tokenizer, chosen, part, samples=2, batch_size=batch_size)

    alone = rows(1)
    assert alone == rows(3) == rows(16)
    assert [(row.row, row.sample) for row in alone] == [(row, sample) for row in range(10) for sample in (0, 1)]
    first, second = alone[::2], alone[1::2]
    same = [one.completions == other.completions for one, other in zip(first, second, strict=True)]
    assert all(same) if temperature == 0 else not any(same)
    assert (rows(16, seed=1) == alone) is (temperature == 0)
    if temperature == 0:
        ids = tokenizer(prompts[0].turns[0], return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert alone[0].completions == [tokenizer.decode(expected, skip_special_tokens=True)]


def test_a_completion_ends_with_the_token_that_ends_it(model: Any, tokenizer: Any) -> None:
    """Which stands among its tokens, and what pads the row behind it does not."""
    numbers = numbers_of(40, 60)
    written = complete(model, tokenizer, [[5, 9]] * 40, numbers, Sampling(60, temperature=1.0))
    ended = [one for one in written if one.ended]
    assert 5 < len(ended) < 40
    assert all(tokenizer.eos_token_id not in one.tokens[:-1] for one in written)
    assert all((one.tokens[-1] == tokenizer.eos_token_id) is one.ended for one in written)
    assert all(len(one.tokens) == 60 for one in written if not one.ended)


def test_the_models_own_taste_in_sampling_does_not_enter(model: Any, tokenizer: Any) -> None:
    """A generation config may recommend a temperature, a nucleus and a longest length."""
    before = complete(model, tokenizer, [[5, 9]], numbers_of(1, 12), Sampling(12, temperature=1.5))
    config = model.generation_config
    try:
        config.update(do_sample=True, temperature=0.1, top_k=3, top_p=0.2, max_length=5)
        after = complete(model, tokenizer, [[5, 9]], numbers_of(1, 12), Sampling(12, temperature=1.5))
        assert config.temperature == 0.1  # and is left as it is
    finally:
        config.update(do_sample=None, temperature=None, top_k=None, top_p=None, max_length=None)
    assert before == after


def test_a_killed_run_goes_on_where_it_was(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Killed in the third batch, its last line torn: what is there stays, the result is that of one run."""
    prompts, sampling, batches = some_prompts(9), Sampling(6, temperature=1.0), []

    def killed(*arguments: Any) -> Any:
        batches.append(len(arguments[0]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return complete(model, tokenizer, *arguments)

    whole = generate(prompts, engine_of(model, tokenizer), tokenizer, sampling, tmp_path / "whole", batch_size=2)
    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        generate(prompts, killed, tokenizer, sampling, part, batch_size=2)
    part.write_bytes(part.read_bytes() + b'{"row": 3, "sam')
    batches.append(0)
    assert generate(prompts, killed, tokenizer, sampling, part, batch_size=2) == whole
    assert batches == [2, 2, 2, 0, 2, 2, 1]
    lines_of = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines_of[:-2]))  # the last batch is of one row, so that before it loses one of its two
    batches.append(0)
    assert generate(prompts, killed, tokenizer, sampling, part, batch_size=2) == whole
    assert batches[-2:] == [2, 1]  # asked whole again, in the batch that it was in
    with pytest.raises(RunError, match=r"begun with prompts '9, sha256 .*now it is '9, sha256"):
        generate([*prompts[1:], prompts[0]], killed, tokenizer, sampling, part, batch_size=2)
    with pytest.raises(RunError, match=r"begun with temperature 1\.0, now it is 0\.5"):
        generate(prompts, killed, tokenizer, Sampling(6, temperature=0.5), part, batch_size=2)


def test_a_second_turn_goes_on_behind_the_models_own_first(tokenizer: Any, tmp_path: Path) -> None:
    """What is asked, as text: both turns with the answer to the first between them."""
    tokenizer.chat_template = TEMPLATE
    prompts = read_prompts(str(lines(tmp_path / "q.jsonl", [*TURNS, {"turns": ["w10"]}])), "train", as_text=False)
    asked: list[str] = []

    def engine(batch: Any, numbers: Any, sampling: Any) -> list[Written]:
        asked.extend(tokenizer.decode(ids) for ids in batch)
        return [Written([14, 15, 2], ended=True) for _ in batch]

    rows = generate(prompts, engine, tokenizer, Sampling(5), tmp_path / "part", batch_size=3)
    answer = tokenizer.decode([14, 15])
    # "u" and "a" are in no vocabulary of 90 words.
    first = ["<unk> w4 w5 w6 w7 <unk>", "<unk> w1 w2 <unk>", "<unk> w10 <unk>"]
    second = [f"{first[0]} {answer} <unk> w8 w9 <unk>", f"{first[1]} {answer} <unk> w3 <unk>"]
    assert asked == [*first, *second]
    assert [row.completions for row in rows] == [[answer] * 2, [answer] * 2, [answer]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "w1 w2"}, [{"role": "user", "content": "w1 w2"}]),
        ({"prompt": [{"role": "user", "content": "w1"}], "instruction": "no"}, [{"role": "user", "content": "w1"}]),
        ({"instruction": "w3"}, [{"role": "user", "content": "w3"}]),
        ({"turns": [{"content": "w4"}]}, [{"role": "user", "content": "w4"}]),
        (
            {"messages": [{"role": "system", "content": "w0"}, {"role": "user", "content": "w1"}]},
            [{"role": "system", "content": "w0"}, {"role": "user", "content": "w1"}],
        ),
    ],
)
def test_every_layout_of_prompts_is_read(row: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    (prompt,) = read_prompts(str(lines(tmp_path / "p.jsonl", [row])), "train", as_text=False)
    assert prompt.turns == (expected,)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "w1"}, "row 0: none of messages, turns, prompt, instruction says what is asked"),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, "row 0: its messages do not end with the user's turn"),
        ({"turns": [3]}, "row 0: a turn is text, not 3"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_row(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(str(lines(tmp_path / "p.jsonl", [row])), "train", as_text=False)


def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    prompts = some_prompts(4)
    longest = max(len(tokenizer(prompt.turns[0])["input_ids"]) for prompt in prompts)
    with pytest.raises(DataError, match=f"more than the model's 64 positions; lower it to {64 - longest}"):
        generate(prompts, engine_of(model, tokenizer), tokenizer, Sampling(64), tmp_path / "part", room=64)
    asked = [Prompt(([{"role": "user", "content": "w1"}],), {})]
    with pytest.raises(DataError, match="has no chat template, so nobody can speak in turns; --text"):
        generate(asked, engine_of(model, tokenizer), tokenizer, Sampling(4), tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_files_are_those_that_judges_read() -> None:
    """Row by row as their own code writes and reads them; style is counted outside of blocks of code."""
    text = "# Head\n## Sub\n1. one\n- two\n* three\n**bold** __too__\n```\n# code\n- code\n```\n"
    row, count = Generation(0, 0, [text], [40], [True]), len
    prompt = Prompt(([{"role": "user", "content": "w1"}],), {"instruction": "w1", "uid": "u7", "dataset": "koala"})
    alpaca = json.loads(file_of("alpaca-eval", [prompt], [row], "mine", 5.0, count))
    assert alpaca == [{"dataset": "koala", "instruction": "w1", "output": text, "generator": "mine"}]
    (arena,) = map(json.loads, file_of("arena-hard", [prompt], [row], "mine", 5.0, count).splitlines())
    assert {name: arena[name] for name in ("uid", "model", "messages", "tstamp")} == {
        "uid": "u7",
        "model": "mine",
        "messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": {"answer": text}}],
        "tstamp": 5.0,
    }
    assert arena["metadata"] == {
        "token_len": len(text),
        "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 1, "unordered": 2},
        "bold_count": {"**": 1, "__": 1},
    }
    question = Prompt(([{"role": "user", "content": "w1"}],) * 2, {"question_id": 81})
    both = Generation(0, 0, ["one", "two"], [2, 2], [True, True])
    (bench,) = map(json.loads, file_of("mt-bench", [question], [both], "mine", 5.0, count).splitlines())
    assert {**bench, "answer_id": ""} == {
        "question_id": 81,
        "answer_id": "",
        "model_id": "mine",
        "choices": [{"index": 0, "turns": ["one", "two"]}],
        "tstamp": 5.0,
    }
    with pytest.raises(DataError, match="--format mt-bench: row 0 has no question_id"):
        file_of("mt-bench", [prompt], [row], "mine", 5.0, count)
    with pytest.raises(DataError, match="has 2 turns"):
        file_of("alpaca-eval", [question._replace(row={"instruction": "w1"})], [both], "mine", 5.0, count)


def test_a_format_that_cannot_hold_what_is_asked_is_refused_before_a_model_speaks() -> None:
    one = Prompt(("w1",), {"instruction": "w1"})
    check_format("alpaca-eval", [one], 1)
    check_format("jsonl", [one], 5)
    with pytest.raises(DataError, match="--samples 2: alpaca-eval holds one completion of each prompt"):
        check_format("alpaca-eval", [one], 2)
    with pytest.raises(DataError, match="--format mt-bench: row 1 has no question_id"):
        check_format("mt-bench", [one._replace(row={"question_id": 81}), one], 1)
    with pytest.raises(DataError, match="row 0 has 2 turns"):
        check_format("alpaca-eval", [one._replace(turns=("w1", "w2"))], 1)


def test_arena_hard_counts_by_tiktoken_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the other formats never ask for; missing, or without its vocabulary, one line says so."""

    def unreached(name: str) -> Any:
        raise ConnectionError("no network")

    for stand_in, message in ((None, "pip install tiktoken"), (unreached, "ConnectionError.*TIKTOKEN_CACHE_DIR")):
        module = None if stand_in is None else SimpleNamespace(encoding_for_model=stand_in)
        monkeypatch.setitem(sys.modules, "tiktoken", module)  # type: ignore[arg-type]
        token_counter("jsonl")
        with pytest.raises(DataError, match=message):
            token_counter("arena-hard")
    words = SimpleNamespace(encode=lambda text, disallowed_special: text.split())
    module = SimpleNamespace(encoding_for_model={"gpt-4o": words}.__getitem__)
    monkeypatch.setitem(sys.modules, "tiktoken", module)  # type: ignore[arg-type]
    assert token_counter("arena-hard")("three words here") == 3


def test_a_text_is_not_ended_before_the_model_goes_on(tokenizer: Any) -> None:
    """By a tokenizer that ends every text: stage 1 takes what a prompt shares with its completions."""
    plain = Encoder(tokenizer).tokens("w1 w2", 0)
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    ending = TemplateProcessing(single=f"{bos[0]} $A {eos[0]}", special_tokens=[bos, eos])
    tokenizer.backend_tokenizer.post_processor = ending
    assert tokenizer("w1 w2")["input_ids"] == [*plain, eos[1]]
    assert Encoder(tokenizer).tokens("w1 w2", 0) == plain


@pytest.mark.parametrize(
    "policy",
    [{}, {"lora": {"r": 4}}, {"prompt": {"kind": "embeddings", "virtual_tokens": 4, "text": "w5 w6 w7 w8"}}],
    ids=["whole", "lora", "soft-prompt"],
)
def test_a_runs_policy_speaks_as_peft_and_transformers_open_it(
    world: TinyWorld, tmp_path: Path, policy: dict[str, Any]
) -> None:
    """In a batch with longer prompts; of a checkpoint, too."""
    peft = pytest.importorskip("peft")
    training = {"learning_rate": 1e-2, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    recipe = world.recipe(features=[], objective={"name": "dpo"}, policy=policy, training=training)
    build_caches(recipe, world.store)
    align(recipe, find_cache(recipe, world.store), tmp_path / "run", False)
    prompts = some_prompts(5)
    for checkpoint, folder in ((None, tmp_path / "run"), (2, tmp_path / "run/checkpoint-2")):
        speaker = speaker_of(str(tmp_path / "run"), checkpoint, None, "transformers")
        part = tmp_path / f"part-{checkpoint}"
        rows = generate(prompts, speaker.engine, speaker.tokenizer, Sampling(6), part, batch_size=5, room=speaker.room)
        opener = peft.AutoPeftModelForCausalLM if policy else AutoModelForCausalLM
        opened = opener.from_pretrained(folder).eval()
        for prompt, row in zip(prompts, rows, strict=True):
            ids = speaker.tokenizer(prompt.turns[0], return_tensors="pt")
            ids.pop("token_type_ids", None)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Position ids are not supported")
                written = opened.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
            assert row.completions == [speaker.tokenizer.decode(written, skip_special_tokens=True)]
    assert speaker.room == 64 - (4 if "prompt" in policy else 0)


def test_vllm_is_asked_for_the_same_by_its_own_words(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in of its documented interface; where it is missing one line says so."""
    with pytest.raises(ModelError, match="vllm is not installed here"):
        speaker_of(str(world.root / "model"), None, None, "vllm")
    asked: list[Any] = []

    class Engine:
        def __init__(self, **options: Any) -> None:
            asked.append(options)

        def generate(self, prompts: Any, settings: Any, **options: Any) -> Any:
            asked.append((prompts, settings, options))
            one = SimpleNamespace(token_ids=(7, 2), finish_reason="stop")
            return [SimpleNamespace(outputs=[one]) for _ in prompts]

    stand_in = SimpleNamespace(LLM=Engine, SamplingParams=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)  # type: ignore[arg-type]
    speaker = speaker_of(str(world.root / "model"), None, "bfloat16", "vllm")
    written = speaker.engine([[1, 5], [6]], numbers_of(2, 3), Sampling(3, 0.7, 0.9, None))
    assert written == [Written([7, 2], ended=True)] * 2
    assert asked[0] == {"model": str(world.root / "model"), "dtype": "bfloat16", "enable_lora": False}
    prompts, settings, options = asked[1]
    assert prompts == [{"prompt_token_ids": [1, 5]}, {"prompt_token_ids": [6]}]
    seeds = [one.pop("seed") for one in settings]
    assert len(set(seeds)) == 2
    assert settings == [{"max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 0}] * 2
    assert options == {"use_tqdm": False, "lora_request": None}


def test_the_command_writes_a_file_and_leaves_nothing_else(world: TinyWorld, tmp_path: Path) -> None:
    source = lines(tmp_path / "prompts.jsonl", [{"prompt": "w1 w2"}, {"prompt": "w3"}])
    given = ["generate", str(world.root / "model"), "--prompts", str(source), "--text", "--max-new-tokens", "5"]
    output = tmp_path / "out" / "rows.jsonl"
    done = CliRunner().invoke(app, [*given, "--output", str(output)])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["row"], row["prompt"], row["generator"]) for row in rows] == [
        (0, "w1 w2", "model"),
        (1, "w3", "model"),
    ]
    assert [path.name for path in output.parent.iterdir()] == ["rows.jsonl"]
    told = CliRunner().invoke(app, [*given, "--output", str(tmp_path / "told.jsonl"), "--json"])
    mean = sum(row["tokens"][0] for row in rows) / 2
    assert json.loads(told.stdout) == {
        "output": str(tmp_path / "told.jsonl"),
        "prompts": 2,
        "completions": 2,
        "mean_tokens": mean,
        "ended": sum(row["ended"][0] for row in rows) / 2,
    }
    again = CliRunner().invoke(app, [*given, "--output", str(output)])
    assert isinstance(again.exception, RunError)
    wrong = CliRunner().invoke(app, [*given, "--output", str(tmp_path / "x"), "--format", "alpaca"])
    assert wrong.exit_code == 2


def test_a_template_that_asks_for_the_date_gets_that_of_training(tokenizer: Any, tmp_path: Path) -> None:
    """Not the wall clock's: the prompt would be another one tomorrow."""
    tokenizer.chat_template = "{{ strftime_now('w%d') }} {% for m in messages %}{{ m.content }} {% endfor %}"
    asked: list[str] = []

    def engine(batch: Any, numbers: Any, sampling: Any) -> list[Written]:
        asked.extend(tokenizer.decode(ids) for ids in batch)
        return [Written([14, 2], ended=True) for _ in batch]

    prompts = [Prompt(([{"role": "user", "content": "w1"}],), {"prompt": "w1"})]
    generate(prompts, engine, tokenizer, Sampling(5), tmp_path / "part", today="2026-11-24")
    assert asked == ["w24 w1"]
