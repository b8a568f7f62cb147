"""Which tokens count: what the assistant said, what no tool said, by tags or turn by turn, in characters one by one."""

from __future__ import annotations

import re
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fpo.errors import DataError
from fpo.recipe import Data
from fpo.stage1_cache.tokenise import TokenisedGroups, tokenise

# < and > stand for the special tokens of a turn; the tool's turn groups outputs that follow each other, as Qwen's does.
PLAIN = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<u:{% endif %}[{{ m.content }}]"
    "{% if loop.last or loop.nextitem.role != 'tool' %}>{% endif %}"
    "{% else %}<{{ m.role[0] }}:{{ m.content }}>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a:{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<a:{% generation %}{{ m.content }}>{% endgeneration %}"
    "{% else %}<{{ m.role[0] }}:{{ m.content }}>{% endif %}{% endfor %}{% if add_generation_prompt %}<a:{% endif %}"
)
# Says less of an answer once more follows, as templates do that drop past thoughts.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role[0] }}:{% if m.role == 'assistant' and loop.last %}?{% endif %}{{ m.content }}>"
    "{% endfor %}{% if add_generation_prompt %}<a:{% endif %}"
)


def characters() -> PreTrainedTokenizerFast:
    """A token for each character: masks can be read beside the text."""
    vocabulary = {chr(code): code for code in range(32, 127)} | {"é": 200, "😀": 201, "\0": 0}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="\0"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="\0")


def said(*turns: str) -> list[dict[str, str]]:
    """u:hello is what the user says, a: the assistant, t: a tool."""
    roles = {"u": "user", "a": "assistant", "t": "tool", "i": "ipython"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def tokenised(completion: list[Any], template: str, max_length: int | None = None, **options: Any) -> TokenisedGroups:
    rows = [{"prompt": said("u:hi"), "completions": [completion], "scores": [1.0]}]
    return tokenise(Dataset.from_list(rows), characters(), max_length, chat_template=template, **options)


def shown(found: TokenisedGroups) -> str:
    """The completions' text, with a dot for every token that does not count."""
    tokens = "".join(chr(code) for code in found.input_ids[found.lengths_of_prompts[0] :])
    mask = [1] * len(tokens) if found.score_mask is None else found.score_mask.tolist()
    return "".join(letter if counts else "." for letter, counts in zip(tokens, mask, strict=True))


TALK = said("a:one", "u:why", "a:two", "u:go on", "a:three")
TOOLS = said("a:call", "t:42", "t:7", "a:it is 42")


def test_a_whole_completion_counts_unless_a_tool_speaks():
    """<u:hi><a: is the prompt."""
    found = tokenised(TALK, PLAIN)
    assert shown(found) == "one><u:why><a:two><u:go on><a:three>"
    assert found.score_mask is None


@pytest.mark.parametrize("template", [PLAIN, TAGGED])
def test_the_assistants_turns_alone_count_with_the_end_of_each_and_without_headers(template):
    found = tokenised(TALK, template, score="assistant")
    assert shown(found) == "one>" + "." * len("<u:why><a:") + "two>" + "." * len("<u:go on><a:") + "three>"


@pytest.mark.parametrize("template", [PLAIN, TAGGED])
@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([1, 1], "one>................................"),
        ([2, 2], "..............two>.................."),
        ([2, None], "..............two>............three>"),
        ([3, 9], "..............................three>"),
    ],
)
def test_a_range_of_turns_counts(template, turns, expected):
    assert shown(tokenised(TALK, template, score="assistant", turns=turns)) == expected


def test_what_tools_say_never_counts():
    """Two outputs in one turn, whose frame the template writes; beside the assistant's turns it counts no more."""
    assert shown(tokenised(TOOLS, PLAIN)) == "call><u:[..][.]><a:it is 42>"
    assert shown(tokenised(TOOLS, PLAIN, score="assistant")) == "call>" + "." * len("<u:[42][7]><a:") + "it is 42>"
    assert shown(tokenised(said("a:x", "i:out", "a:y"), FORGETFUL)) == "x><i:...><a:?y>"


def test_a_single_answer_counts_whole_and_needs_no_mask():
    assert tokenised(said("a:one"), PLAIN, score="assistant").score_mask is None
    assert tokenised(said("a:one"), TAGGED, score="assistant").score_mask is None


def test_the_mask_is_cut_with_the_tokens():
    """The prompt <u:hi><a: has 9 tokens, one> has 4, <u:why><a: has 10."""
    assert shown(tokenised(TALK, PLAIN, max_length=9 + 4 + 8, score="assistant")) == "one>" + 8 * "."
    assert shown(tokenised(TALK, PLAIN, max_length=9 + 4 + 10 + 3, score="assistant")) == "one>" + 10 * "." + "two"


def test_a_completion_in_which_nothing_counts_is_left_out_of_its_group():
    rows = [
        {"prompt": said("u:hi"), "completions": [said("a:one"), TALK, said("u:no")], "scores": [3.0, 2.0, 1.0]},
        {"prompt": said("u:hi"), "completions": [said("a:one")], "scores": [3.0]},
    ]
    found = tokenise(
        Dataset.from_list(rows), characters(), None, chat_template=PLAIN, score="assistant", turns=[2, None]
    )
    assert found.n_completions.tolist() == [1]
    assert found.score.tolist() == [2.0]
    assert found.drops.left_out["nothing_counts"].count == 2
    assert found.drops.dropped["nothing_counts"].rows == [1]


def test_a_pair_is_dropped_with_a_side_in_which_nothing_counts():
    rows = [{"prompt": said("u:hi"), "chosen": TALK, "rejected": said("a:one")}] * 2
    rows[1] = {"prompt": said("u:hi"), "chosen": TALK, "rejected": TALK}
    found = tokenise(Dataset.from_list(rows), characters(), None, chat_template=PLAIN, score="assistant", turns=[2, 2])
    assert found.group_id.tolist() == [1]
    assert found.drops.dropped["nothing_counts"].rows == [0]


def test_rows_without_a_mask_count_whole_beside_one_that_has_one():
    """Prompts have tokens here, so every token of a completion is scored."""
    rows = [{"prompt": said("u:hi"), "completion": one, "label": True} for one in (said("a:x"), TOOLS, said("a:y"))]
    found = tokenise(Dataset.from_list(rows), characters(), None, chat_template=PLAIN)
    assert found.score_mask is not None
    assert len(found.score_mask) == found.lengths_of_completions.sum()
    assert found.score_mask.tolist() == [1] * 2 + [c != "." for c in "call><u:[..][.]><a:it is 42>"] + [1] * 2


def test_a_template_that_renders_past_turns_otherwise_is_refused_by_row():
    with pytest.raises(DataError, match=r"row 0: the chat template renders the first 2 messages otherwise") as error:
        tokenised(TALK, FORGETFUL, score="assistant")
    assert "\n" not in str(error.value)
    assert "{% generation %}" in str(error.value)


def test_a_tools_output_that_is_written_twice_is_refused_by_row():
    twice = "{% for m in messages %}{{ m.content }}{% if m.role == 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"row 0: .* does not render what a tool says \(message 2\) in one place"):
        tokenised(TOOLS, twice)


def test_turns_need_a_tag_for_each():
    half = TAGGED.replace("m.role == 'assistant'", "m.role == 'assistant' and not loop.last")
    with pytest.raises(DataError, match=r"row 0: data\.turns: the chat template marks 2 pieces .* has 3 turns"):
        tokenised(TALK, half, score="assistant", turns=[1, 2])


def test_text_has_no_turns():
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match=r"data\.score: assistant needs messages"):
        tokenise(rows, characters(), None, score="assistant")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"turns": [1, 2]}, "set data.score: assistant"),
        ({"turns": [3, 2], "score": "assistant"}, "data.turns: [3, 2]: the first turn, then the last"),
        ({"turns": [None, 2], "score": "assistant"}, "data.turns: [None, 2]: the first turn"),
    ],
)
def test_turns_that_cannot_be_meant_are_refused_in_the_recipe(fields, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Data(source="rows.jsonl", **fields)
    assert Data(source="rows.jsonl", score="assistant", turns=[2, None]).turns == [2, None]
