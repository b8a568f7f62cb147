"""Pairs to token ids by TRL's rules, on tokenizers small enough to follow by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fpo.errors import DataError, ModelError
from fpo.scoring import template_text
from fpo.stage1_cache.drops import EXAMPLES, DropReport
from fpo.stage1_cache.read import extract_prompt, read_groups
from fpo.stage1_cache.tokenise import TokenisedGroups, tokenise, tokenizer_identity

PAIRS = Path(__file__).parents[2] / "shared/data/pairs"
STORIES = Path(__file__).parents[2] / "shared/data/models/stories260K"

BOS, EOS, A, B, C, SPACE, AB = range(7)
CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}b{% endif %}"


def letters(bos: bool = True, dummy_prefix: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """a, b, c, a space (written ▁ with the dummy prefix) and one merge: a + b is one token."""
    space = "▁" if dummy_prefix else " "
    vocab = {"<s>": BOS, "</s>": EOS, "a": A, "b": B, "c": C, space: SPACE, "ab": AB}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    inner.add_special_tokens(["<s>", "</s>"])
    if dummy_prefix:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **({"bos_token": "<s>", "eos_token": "</s>"} | special))


def text(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def messages(prompt: list[str], chosen: list[str], rejected: list[str]) -> dict[str, object]:
    def turns(contents: list[str], role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content} for content in contents]

    return {
        "prompt": turns(prompt, "user"),
        "chosen": turns(chosen, "assistant"),
        "rejected": turns(rejected, "assistant"),
    }


def parts(pairs: TokenisedGroups) -> list[list[int]]:
    return [part.tolist() for part in np.split(pairs.input_ids, pairs.splits[1:-1].astype(np.int64))]


def test_text_gets_bos_in_front_and_the_end_token_behind():
    pairs = tokenise(Dataset.from_list([text("c", "a", "b b")]), letters(bos=True), None)
    assert parts(pairs) == [[BOS, C], [A, EOS], [B, SPACE, B, EOS]]


def test_a_token_merged_across_the_boundary_belongs_to_the_completions():
    """
    prompt            <s> c a            c + a
    prompt + chosen   <s> c ab </s>      shares <s> c
    prompt + rejected <s> c a c </s>     shares <s> c a; the shorter of both is the prompt
    """
    pairs = tokenise(Dataset.from_list([text("ca", "b", "c")]), letters(), None)
    assert parts(pairs) == [[BOS, C], [AB, EOS], [A, C, EOS]]
    assert pairs.drops.noted["prompt_tail_moved"].rows == [0]


def test_without_bos_an_empty_prompt_has_no_token():
    pairs = tokenise(Dataset.from_list([text("", "a", "bc")]), letters(bos=False), None)
    assert parts(pairs) == [[], [A, EOS], [B, C, EOS]]
    assert (pairs.lengths_of_prompts.tolist(), pairs.lengths_of_completions.tolist()) == ([0], [2, 3])


def test_the_dummy_prefix_stands_before_the_prompt_only():
    pairs = tokenise(Dataset.from_list([text("a", " b", "c")]), letters(dummy_prefix=True), None)
    assert parts(pairs) == [[BOS, SPACE, A], [SPACE, B, EOS], [C, EOS]]


def test_a_completion_that_ends_with_the_end_token_gets_no_second():
    pairs = tokenise(Dataset.from_list([text("c", "a</s>", "")]), letters(), None)
    assert parts(pairs) == [[BOS, C], [A, EOS], [EOS]]


def test_max_length_cuts_the_end_of_prompt_and_completion():
    """<s> c | a c a </s>  and  <s> c | b </s>, at 4 tokens: the first loses two, the second fits."""
    pairs = tokenise(Dataset.from_list([text("c", "aca", "b")]), letters(), max_length=4)
    assert parts(pairs) == [[BOS, C], [A, C], [B, EOS]]
    assert pairs.drops.noted.keys() == {"chosen_truncated"}
    other_way = tokenise(Dataset.from_list([text("c", "b", "aca")]), letters(), max_length=4)
    assert parts(other_way) == [[BOS, C], [B, EOS], [A, C]]
    assert other_way.drops.noted.keys() == {"rejected_truncated"}


def test_a_prompt_that_fills_max_length_is_dropped_and_pair_ids_keep_the_row_number():
    rows = [text("c", "a", "b"), text("cc", "a", "b"), text("ccc", "a", "b"), text("", "a", "b")]
    pairs = tokenise(Dataset.from_list(rows), letters(), max_length=3)
    assert pairs.group_id.tolist() == [0, 3]  # <s> c and <s> leave room; <s> c c is 3 tokens already
    assert pairs.drops.dropped["prompt_fills_max_length"].rows == [1, 2]
    assert (pairs.drops.read, pairs.drops.kept) == (4, 2)


def test_a_completion_without_a_scored_token_is_dropped():
    rows = [text("", "", "a"), text("", "a", "b"), text("c", "", "a")]
    pairs = tokenise(Dataset.from_list(rows), letters(bos=False), None)
    assert pairs.group_id.tolist() == [1, 2]  # after c, the end token alone is a scored token
    assert pairs.drops.dropped["no_scored_token"].rows == [0]


def test_a_template_that_renders_nothing_for_a_completion_drops_the_pair():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [messages(["c"], [""], ["a"]), messages(["c"], ["b"], ["a"])]
    pairs = tokenise(Dataset.from_list(rows), letters(), None, chat_template=template)
    assert parts(pairs) == [[C], [B], [A]]
    assert pairs.drops.dropped["empty_completion"].rows == [0]


def test_messages_are_rendered_with_the_generation_prompt_and_without_special_tokens():
    """
    prompt            "c " + "b"      c ␣ b
    prompt + chosen   "c " + "ba "    c ␣ b a ␣      the generation prompt b is shared with this one,
    prompt + rejected "c " + "c "     c ␣ c ␣        not with this one: it leaves the prompt
    """
    row = messages(["c"], ["ba"], ["c"])
    pairs = tokenise(Dataset.from_list([row]), letters(bos=True), None, chat_template=CHAT)
    assert parts(pairs) == [[C, SPACE], [B, A, SPACE], [C, SPACE]]
    assert pairs.drops.noted["prompt_tail_moved"].count == 1


def test_an_implicit_prompt_gives_the_tokens_of_the_explicit_one():
    explicit = messages(["c", "b"], ["a"], ["b"])
    implicit = {side: explicit["prompt"] + explicit[side] for side in ("chosen", "rejected")}
    tokens = [tokenise(Dataset.from_list([row]), letters(), None, chat_template=CHAT) for row in (explicit, implicit)]
    assert parts(tokens[0]) == parts(tokens[1])


def test_messages_that_share_no_turn_are_dropped():
    shared = messages(["c"], ["a"], ["b"])
    rows = [
        {side: shared["prompt"] + shared[side] for side in ("chosen", "rejected")},
        {side: shared[side] for side in ("chosen", "rejected")},
    ]
    pairs = tokenise(Dataset.from_list(rows), letters(), None, chat_template=CHAT)
    assert pairs.group_id.tolist() == [0]
    assert pairs.drops.dropped["no_shared_prompt"].rows == [1]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("ab c", "ab b", ("ab", " c", " b")),  # the space belongs to the completions
        ("abc", "abb", ("ab", "c", "b")),
        ("ab", "abc", ("a", "b", "bc")),  # one begins the other
        ("ab", "ab", ("a", "b", "b")),
        ("ab ", "c", ("", "ab ", "c")),  # TRL would make "ab" the prompt of both
        ("", "c", ("", "", "c")),
    ],
)
def test_the_implicit_prompt_of_text(chosen, rejected, expected):
    assert extract_prompt(chosen, rejected) == expected


def test_identical_and_repeated_and_doubled_are_counted_and_kept():
    rows = [text("c", "a", "a"), text("c", "ca", "cb"), text("<s>c", "a", "b"), text("c", "a", "b")]
    pairs = tokenise(Dataset.from_list(rows), letters(), None)
    assert len(pairs) == 4
    found = {what: finding.rows for what, finding in pairs.drops.noted.items()}
    assert found == {"identical": [0], "prompt_repeated": [1], "bos_doubled": [2]}


def test_a_side_that_says_nothing_is_noted():
    pairs = tokenise(Dataset.from_list([text("c", "", "b"), text("c", "a", " "), text("c", "a", "b")]), letters(), None)
    assert pairs.drops.noted["empty_side"].rows == [0, 1]
    rows = [messages(["c"], [""], ["a"]), messages(["c"], ["a"], ["b"])]
    pairs = tokenise(Dataset.from_list(rows), letters(), None, chat_template=CHAT)
    assert pairs.drops.noted["empty_side"].rows == [0]


def test_the_report_says_where_the_prompts_come_from():
    """<s> c and <s> c c are 5 tokens in two prompts."""
    rows = Dataset.from_list([text("c", "a", "b"), text("cc", "a", "b")])
    report = tokenise(rows, letters(), None).drops
    report.of_columns("question", ["id", "source"])
    assert report.prompt_line() == "column question, 2.5 tokens on average; columns not used: id, source"
    assert DropReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    report = tokenise(rows.remove_columns("prompt"), letters(), None).drops
    assert report.prompt_line() == "implicit (what chosen and rejected share), 1.0 tokens on average"


def test_the_report_counts_all_rows_and_shows_the_first_few():
    rows = [text("c" * 9, "a", "b")] * 7 + [text("c", "a", "b")]
    report = tokenise(Dataset.from_list(rows), letters(), max_length=5, batch_size=3).drops
    assert report.lines() == [
        "1 of 8 pairs kept",
        "  dropped 7: the prompt alone fills max_length (row 0, 1, 2, 3, 4, ...)",
    ]
    assert json.loads(json.dumps(report.as_dict()))["dropped"]["prompt_fills_max_length"]["count"] == 7
    assert len(report.dropped["prompt_fills_max_length"].rows) == EXAMPLES


@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_the_batch_size_changes_nothing(batch_size):
    rows = [text("ca", "b" * n, "c" * (5 - n)) for n in range(5)]
    expected = tokenise(Dataset.from_list(rows), letters(), 6, batch_size=5)
    assert parts(tokenise(Dataset.from_list(rows), letters(), 6, batch_size=batch_size)) == parts(expected)


def test_the_arrays_have_the_types_of_the_cache():
    pairs = tokenise(Dataset.from_list([text("c", "a", "b")]), letters(), None)
    assert [a.dtype for a in (pairs.group_id, pairs.input_ids, pairs.splits)] == [
        np.uint64,
        np.uint32,
        np.uint64,
    ]


def test_nothing_left_says_why():
    with pytest.raises(DataError, match=r"(?s)no pair is left.*prompt alone fills max_length"):
        tokenise(Dataset.from_list([text("ccc", "a", "b")]), letters(), max_length=2)


def test_text_needs_an_end_token_and_messages_a_template():
    with pytest.raises(DataError, match="no end token"):
        tokenise(Dataset.from_list([text("c", "a", "b")]), letters(eos_token=None), None)
    with pytest.raises(DataError, match="no chat template"):
        tokenise(Dataset.from_list([messages(["c"], ["a"], ["b"])]), letters(), None)


def test_a_row_that_the_template_refuses_is_named():
    template = "{% if messages | length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}a"
    rows = [messages(["c"], ["a"], ["b"]), messages(["c", "c"], ["a"], ["b"])]
    with pytest.raises(DataError, match=r"row 1: the chat template refuses.*user user assistant.*must alternate"):
        tokenise(Dataset.from_list(rows), letters(), None, chat_template=template)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ range(10 ** 9) | list }}", "too big"),
        ("{{ 'a' * (10 ** 15) }}", "MemoryError"),
        ("{{ messages[0].content.nothing.more }}", "no attribute"),
        ("{{ [1][5] + 1 }}", ""),
        ("{{ 'é'.encode('ascii') }}", "ordinal"),
    ],
)
def test_a_template_that_fails_is_one_line_with_its_row(template, said):
    rows = Dataset.from_list([messages(["c"], ["a"], ["b"])])
    with pytest.raises(DataError, match=f"row 0: the chat template refuses.*{said}") as error:
        tokenise(rows, letters(), None, chat_template=template)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }}", "{{ a b }}", "{% nosuchtag %}"])
def test_a_template_that_is_no_jinja_is_refused_before_the_rows(template):
    rows = Dataset.from_list([messages(["c"], ["a"], ["b"])])
    with pytest.raises(DataError, match=r"the chat template is no valid Jinja: line 1: ") as error:
        tokenise(rows, letters(), None, chat_template=template)
    assert "row" not in str(error.value)


def test_tools_and_template_arguments_reach_the_template():
    template = "{% for t in tools or [] %}{{ t.name }}{% endfor %}{{ extra }}{{ messages[-1].content }}"
    row = messages(["c"], ["a"], ["b"]) | {
        "tools": '[{"name": "b"}]',
        "chat_template_kwargs": {"extra": "ca"},
    }
    pairs = tokenise(Dataset.from_list([row]), letters(), None, chat_template=template)
    assert parts(pairs) == [[B, C], [A, A], [AB]]


def test_a_template_that_a_row_brings_gets_the_recipes_date_too():
    row = messages(["c"], ["a"], ["b"])
    row["chat_template_kwargs"] = {"chat_template": "{{ 'c' * (strftime_now('%d') | int) }}{{ messages[-1].content }}"}
    pairs = tokenise(Dataset.from_list([row]), letters(), None, chat_template=CHAT, today="2024-07-03")
    assert parts(pairs) == [[C] * 3, [A], [B]]


def test_template_arguments_that_act_on_tokens_are_refused():
    row = messages(["c"], ["a"], ["b"]) | {"chat_template_kwargs": {"max_length": 3}}
    with pytest.raises(DataError, match="row 0, column 'chat_template_kwargs': 'max_length'"):
        tokenise(Dataset.from_list([row]), letters(), None, chat_template=CHAT)


def test_a_chat_template_is_a_text_or_the_path_of_one(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHAT)
    assert template_text(str(tmp_path / "chat.jinja")) == template_text(CHAT) == CHAT
    with pytest.raises(DataError, match=r"no such file, nearest is chat\.jinja"):
        template_text(str(tmp_path / "chta.jinja"))


def test_the_identity_of_a_tokenizer_moves_with_its_files_and_the_template(tmp_path):
    letters().save_pretrained(tmp_path)
    before = tokenizer_identity(str(tmp_path))
    assert json.loads(json.dumps(before)) == before
    assert "tokenizer.json" in before["files"]
    assert tokenizer_identity(str(tmp_path)) == before
    assert tokenizer_identity(str(tmp_path), chat_template=CHAT) != before
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    assert tokenizer_identity(str(tmp_path)) != before


def test_the_identity_needs_tokenizer_files(tmp_path):
    with pytest.raises(ModelError, match="none of its files"):
        tokenizer_identity(str(tmp_path))


def real(name: str) -> Dataset:
    if not (PAIRS / name).exists():
        pytest.skip(f"{name} is absent")
    return read_groups(str(PAIRS / name), "train").dataset


def test_real_transcripts_with_empty_answers_are_kept_and_counted():
    # The four empty answers (86, 516, 925, 1103) begin the other side, and so does one cut short (1609).
    pairs = tokenise(real("hh_harmless_raw_test.jsonl.gz"), letters_of(STORIES), None)
    assert pairs.drops.noted["one_begins_other"].rows == [86, 516, 925, 1103, 1609]
    assert len(pairs) == pairs.drops.read == 2312


def test_real_transcripts_whose_prompts_differ_share_the_part_before():
    dataset = real("hh_harmless_raw_test.jsonl.gz")
    for row in (1254, 1688, 1950, 1952, 2036):
        prompt, chosen, rejected = extract_prompt(dataset[row]["chosen"], dataset[row]["rejected"])
        assert prompt + chosen == dataset[row]["chosen"]
        assert prompt + rejected == dataset[row]["rejected"]
        assert "\n\nAssistant:" in prompt
        assert chosen[0] != rejected[0] or chosen[1] != rejected[1]


def test_real_implicit_and_explicit_prompts_agree():
    tokenizer = letters_of(STORIES)
    both = [
        tokenise(real(f"orca_dpo_val.{kind}.jsonl"), tokenizer, 512, chat_template=CHAT)
        for kind in ("messages", "implicit")
    ]
    for name in ("group_id", "n_completions", "input_ids", "splits", "score", "weight"):
        np.testing.assert_array_equal(getattr(both[0], name), getattr(both[1], name))


def test_real_duplicates_have_the_same_tokens_and_are_all_kept():
    pairs = tokenise(real("lf_dpo_en_demo.messages.jsonl"), letters_of(STORIES), None, chat_template=CHAT)
    ids = parts(pairs)
    distinct = {tuple(map(tuple, ids[3 * p : 3 * p + 3])) for p in range(len(pairs))}
    assert (len(pairs), len(distinct)) == (300, 295)


def letters_of(folder: Path) -> PreTrainedTokenizerFast:
    if not folder.exists():
        pytest.skip(f"{folder.name} is absent")
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(autouse=True)
def _cache_in_a_temporary_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
