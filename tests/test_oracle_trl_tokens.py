"""
Our tokens against those of TRL's own `DPOTrainer` and `KTOTrainer`, id by id. Needs the `oracles` extra.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fpo.errors import DataError
from fpo.stage1_cache.read import extract_prompt, read_groups
from fpo.stage1_cache.tokenise import tokenise

pytestmark = [
    pytest.mark.oracle,
    # TRL and torch announce their own deprecations; they are not what is compared here.
    pytest.mark.filterwarnings("default"),
]

DATA = Path(__file__).parents[2] / "shared/data"
FILES = [
    "llms_from_scratch.str.jsonl",
    "hh_harmless_test.str.jsonl",
    "hh_harmless_raw_test.jsonl.gz",
    "hh_short512.messages.jsonl",
    "orca_dpo_val.messages.jsonl",
    "orca_dpo_val.implicit.jsonl",
    "lf_dpo_en_demo.messages.jsonl",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a thought that the rendered conversation does not have, and the content is
# stripped: the encoded prompt is no prefix of prompt + completion.
THINKING = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] <think>{% endif %}"
)
# Names tools and a switch of its own.
TOOLS = (
    "{% if tools %}tools:{% for t in tools %} {{ t.function.name }}{% endfor %}\n{% endif %}"
    "{% if shout %}LOUD {% endif %}" + CHATML
)


def tiny_model(vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return LlamaForCausalLM(config)


def trl_tokens(dataset: Dataset, tokenizer: Any, max_length: int | None, folder: Path) -> list[list[int]]:
    """Prompt, chosen and rejected ids of every pair that TRL trains on, as its collator hands them over."""
    trl = pytest.importorskip("trl")
    arguments = trl.DPOConfig(output_dir=str(folder), max_length=max_length, use_cpu=True, bf16=False, report_to=[])
    trainer = trl.DPOTrainer(
        model=tiny_model(len(tokenizer)),
        ref_model=tiny_model(len(tokenizer)),
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    parts = []
    for sides in collated(trainer, ["prompt_ids", "chosen_ids", "rejected_ids"]):
        half = len(sides) // 2
        for (prompt, chosen), (other, rejected) in zip(sides[:half], sides[half:], strict=True):
            assert prompt == other
            parts += [prompt, chosen, rejected]
    return parts


def trl_unpaired_tokens(dataset: Dataset, tokenizer: Any, max_length: int | None, folder: Path) -> list[list[int]]:
    """Prompt and completion ids of every row that TRL's KTO trains on; this loss needs no mismatched completions."""
    trl = pytest.importorskip("trl")
    arguments = trl.KTOConfig(
        output_dir=str(folder),
        max_length=max_length,
        use_cpu=True,
        bf16=False,
        report_to=[],
        loss_type="apo_zero_unpaired",
    )
    trainer = trl.KTOTrainer(
        model=tiny_model(len(tokenizer)),
        ref_model=tiny_model(len(tokenizer)),
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    batches = collated(trainer, ["prompt_ids", "completion_ids", "label"])
    return [part for sides in batches for side in sides for part in side]


def collated(trainer: Any, columns: list[str]) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Prompt and completion ids of each sequence, a batch at a time, as the collator hands them over."""
    for rows in trainer.train_dataset.select_columns(columns).iter(batch_size=128):
        examples = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        batch = trainer.data_collator(examples)
        sides = []
        for ids, attended, completion in zip(
            *(batch[name].numpy() for name in ("input_ids", "attention_mask", "completion_mask")), strict=True
        ):
            start = int(((attended == 1) & (completion == 0)).sum())
            whole = ids[attended == 1].tolist()
            sides.append((whole[:start], whole[start:]))
        yield sides


def our_tokens(dataset: Dataset, tokenizer: Any, max_length: int | None) -> list[list[int]]:
    try:
        ours = tokenise(dataset, tokenizer, max_length)
    except DataError as error:
        assert "is left to score" in str(error)  # noqa: PT017 (nothing left is a result here)
        return []
    return [part.tolist() for part in np.split(ours.input_ids, ours.splits[1:-1].astype(np.int64))]


def compare(dataset: Dataset, tokenizer: Any, max_length: int | None, folder: Path) -> None:
    """Equal ids, but for the pairs that TRL keeps with a completion of which no token can be scored."""
    torch.set_num_threads(1)
    theirs = trl_tokens(dataset, tokenizer, max_length, folder)
    triples = [theirs[i : i + 3] for i in range(0, len(theirs), 3)]
    scored = [t for t in triples if all(len(t[0]) + len(side) > 1 and side for side in t[1:])]
    assert [part for triple in scored for part in triple] == our_tokens(dataset, tokenizer, max_length)
    print(f"\n{len(scored):,} pairs, {sum(map(len, theirs)):,} tokens equal ({len(triples):,} kept by TRL)")


def compare_unpaired(dataset: Dataset, tokenizer: Any, max_length: int | None, folder: Path) -> None:
    torch.set_num_threads(1)
    theirs = trl_unpaired_tokens(dataset, tokenizer, max_length, folder)
    couples = [theirs[i : i + 2] for i in range(0, len(theirs), 2)]
    scored = [couple for couple in couples if sum(map(len, couple)) > 1 and couple[1]]
    assert [part for couple in scored for part in couple] == our_tokens(dataset, tokenizer, max_length)
    print(f"\n{len(scored):,} rows, {sum(map(len, theirs)):,} tokens equal ({len(couples):,} kept by TRL)")


def unpaired(pairs: Dataset) -> Dataset:
    """Each side of a pair as a row of its own, chosen and rejected by turns."""
    rows = []
    for pair in pairs:
        prompt, *sides = (
            (pair["prompt"], pair["chosen"], pair["rejected"])
            if "prompt" in pair
            else extract_prompt(pair["chosen"], pair["rejected"])
        )
        if prompt:
            rows += [{"prompt": prompt, "completion": side, "label": not place} for place, side in enumerate(sides)]
    return Dataset.from_list(rows)


def load(name: str) -> Any:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is absent")
    return AutoTokenizer.from_pretrained(path)


def merging_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges " pear" across a prompt that ends in a space, with BOS in front or not."""
    text = ["pick a pear", "pick a pearl", "an apple or a pear", "a peach", "<s></s>"] * 4
    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="</s>"
    )


@pytest.mark.parametrize("max_length", [None, 64, 256, 1024])
@pytest.mark.parametrize("tokenizer_name", ["models/stories260K", "tokenizers/gpt2"])
@pytest.mark.parametrize("name", FILES)
def test_real_pairs_have_the_tokens_of_trl(name, tokenizer_name, max_length, tmp_path):
    tokenizer = load(tokenizer_name)
    if not (DATA / "pairs" / name).exists():
        pytest.skip(f"{name} is absent")
    tokenizer.chat_template = CHATML if "gpt2" in tokenizer_name else THINKING
    compare(read_groups(str(DATA / "pairs" / name), "train").dataset, tokenizer, max_length, tmp_path)


@pytest.mark.parametrize("tokenizer_name", ["models/stories260K", "tokenizers/gpt2"])
@pytest.mark.parametrize("name", ["llama3", "gemma", "gemma3", "qwen2_5", "qwen3", "qwen3_5_think", "phi3"])
def test_templates_of_real_families_give_the_tokens_of_trl(name, tokenizer_name, tmp_path):
    """Their own special tokens are text to these tokenizers, so that much merges at every boundary."""
    tokenizer = load(tokenizer_name)
    path = DATA / "pairs" / "lf_dpo_en_demo.messages.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is absent")
    trl = pytest.importorskip("trl")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    rows = read_groups(str(path), "train").dataset
    if name == "gemma":  # refuses a system role
        rows = rows.filter(lambda row: all(message["role"] != "system" for message in row["prompt"]))
    assert len(rows) > 100
    compare(rows, tokenizer, 1024, tmp_path)


@pytest.mark.parametrize(("tokenizer_name", "max_length"), [("models/stories260K", 1024), ("tokenizers/gpt2", 256)])
@pytest.mark.parametrize("name", FILES)
def test_real_completions_have_the_tokens_of_trls_kto(name, tokenizer_name, max_length, tmp_path):
    tokenizer = load(tokenizer_name)
    if not (DATA / "pairs" / name).exists():
        pytest.skip(f"{name} is absent")
    tokenizer.chat_template = CHATML if "gpt2" in tokenizer_name else THINKING
    rows = unpaired(read_groups(str(DATA / "pairs" / name), "train").dataset)
    compare_unpaired(rows, tokenizer, max_length, tmp_path)


TEXTS = [
    {"prompt": "pick a", "chosen": " pear", "rejected": " peach"},
    {"prompt": "pick a ", "chosen": "pear", "rejected": "peach"},  # the space merges into " pear"
    {"prompt": "pick a pear", "chosen": "l", "rejected": " or a peach</s>"},  # "pearl" takes the prompt's end
    {"prompt": "", "chosen": "pear", "rejected": "peach"},
    {"prompt": "", "chosen": "", "rejected": "peach"},  # only the end token
    {"prompt": "pick", "chosen": "", "rejected": ""},
    {"prompt": "<s>pick", "chosen": " pear", "rejected": " pear"},
    {"prompt": "\n\nÄpfel 🍎", "chosen": "🍐\n", "rejected": "é"},
]


@pytest.mark.parametrize("max_length", [None, 2, 3, 5, 8])
@pytest.mark.parametrize("bos", [True, False])
def test_awkward_texts_have_the_tokens_of_trl(bos, max_length, tmp_path):
    compare(Dataset.from_list(TEXTS), merging_tokenizer(bos), max_length, tmp_path)


def test_implicit_prompts_of_text_have_the_tokens_of_trl(tmp_path):
    rows = [
        {"chosen": "pick a pear", "rejected": "pick a peach"},
        {"chosen": "pick a ", "rejected": "pick a pear"},  # one begins the other
        {"chosen": "a pear", "rejected": "a pear"},  # identical
        {"chosen": "pear", "rejected": "apple"},  # nothing shared
    ]
    compare(Dataset.from_list(rows), merging_tokenizer(bos=True), None, tmp_path)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


MESSAGES = [
    {
        "prompt": [said("user", "pick a fruit")],
        "chosen": [said("assistant", "pear")],
        "rejected": [said("assistant", "peach")],
    },
    {
        "prompt": [said("system", "be brief"), said("user", " a? "), said("assistant", "an apple")],
        "chosen": [said("assistant", "or a pear"), said("user", "no"), said("assistant", "a peach")],
        "rejected": [said("assistant", "")],
    },
]


@pytest.mark.parametrize("max_length", [None, 70, 130])
@pytest.mark.parametrize("template", [CHATML, THINKING, TOOLS])
def test_messages_with_tools_and_template_arguments_have_the_tokens_of_trl(template, max_length, tmp_path):
    tool = {"type": "function", "function": {"name": "basket"}}
    extras: list[dict[str, Any]] = [
        {"tools": '[{"type": "function", "function": {"name": "basket"}}]'},
        {"tools": [tool]},
        {"chat_template_kwargs": {"shout": True}},
        {},
    ]
    for extra in extras:
        tokenizer = merging_tokenizer(bos=True)
        tokenizer.chat_template = template
        compare(Dataset.from_list([{**row, **extra} for row in MESSAGES]), tokenizer, max_length, tmp_path)


@pytest.mark.parametrize("max_length", [None, 3, 5])
def test_awkward_texts_alone_have_the_tokens_of_trls_kto(max_length, tmp_path):
    compare_unpaired(unpaired(Dataset.from_list(TEXTS)), merging_tokenizer(bos=True), max_length, tmp_path)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "gemma3", "phi3"])
def test_tagged_templates_mark_the_tokens_that_transformers_says(name):
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    talk = [said("assistant", "an apple"), said("user", "no"), said("assistant", "a pear"), said("user", "and")]
    talk.append(said("assistant", "a peach"))
    rows = Dataset.from_list([{"prompt": [said("user", "pick a fruit")], "completion": talk, "label": True}])
    tokenizer = load("tokenizers/gpt2")
    tagged = tokenise(rows, tokenizer, None, chat_template=str(folder / f"{name}_training.jinja"), score="assistant")
    theirs = tokenizer.apply_chat_template(
        [said("user", "pick a fruit"), *talk],
        chat_template=(folder / f"{name}_training.jinja").read_text(),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    start = int(tagged.lengths_of_prompts[0])
    assert tagged.input_ids.tolist() == theirs["input_ids"]
    assert tagged.score_mask.tolist() == theirs["assistant_masks"][start:]
