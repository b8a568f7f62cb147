"""
What people get wrong, one row each: every mistake ends in one clear line that names the culprit and the next step, with
exit code 1 - or, where it is no mistake, in a report that says what was noticed.
"""

from __future__ import annotations

import gzip
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_model
from tiny_saes import random_sae, write_saelens
from tiny_world import TinyWorld, build_tiny_world
from tokenizers import AddedToken
from transformers import AutoTokenizer, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from fpo import cli

# What the libraries warn of is for the user to read; it is no failure of the commands.
pytestmark = pytest.mark.filterwarnings("default")

TEXT = {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5"}
CHAT = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"


@dataclass
class Bench:
    """A sound experiment, a folder to spoil it in, and the command line."""

    world: TinyWorld
    folder: Path

    def recipe(self, **sections: Any) -> str:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.world.raw_recipe(**sections)), encoding="utf-8")
        return str(path)

    def recipe_text(self, text: str | bytes) -> str:
        path = self.folder / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    def cache(self, *overrides: str) -> list[str]:
        return ["cache", self.recipe(), *sets(overrides)]

    def align(self, *overrides: str) -> list[str]:
        output = ["--output", str(self.folder / "run")]
        return ["align", self.recipe(), *output, *sets(["training.max_steps=2", *overrides])]

    def aligned(self, *overrides: str) -> Path:
        """A run of two steps, both saved."""
        with mock.patch.object(sys, "argv", ["fpo", *self.align("training.save_steps=1", *overrides)]):
            assert exit_code(cli.main) == 0
        return self.folder / "run"

    def pairs(self, content: str | bytes | list[Any], name: str = "pairs.jsonl", **data: Any) -> list[str]:
        """`fpo cache` on a data file of rows, or with just this content."""
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        (self.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        source = {"source": str(self.folder / name), "eval_split": None}
        return ["cache", self.recipe(data={**source, **data})]

    def singles(self) -> list[str]:
        """`fpo align` on data with one completion in each row, once its cache is built."""
        rows = [{"prompt": "w1", "completion": f"w{n}", "label": True} for n in (7, 8)]
        command = self.pairs(rows)
        with mock.patch.object(sys, "argv", ["fpo", *command]):
            assert exit_code(cli.main) == 0
        return ["align", command[1], "--output", str(self.folder / "run")]

    def messages(self, template: str | None = CHAT, roles: tuple[str, ...] = ("user",)) -> list[str]:
        opening = [{"role": role, "content": "w1"} for role in roles]
        sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        return self.pairs([{"prompt": opening, **sides}] * 3, chat_template=template)

    def model(self, spoil: Callable[[Path], Any]) -> str:
        """--set that names a copy of the model with something wrong."""
        folder = self.folder / "model"
        shutil.copytree(self.world.root / "model", folder)
        spoil(folder)
        return f"reference.model={folder}"

    def tokenizer(self, spoil: Callable[[Any], Any]) -> str:
        """--set that names a changed tokenizer."""
        tokenizer = AutoTokenizer.from_pretrained(self.world.root / "model")
        spoil(tokenizer)
        tokenizer.save_pretrained(self.folder / "tokenizer")
        return f"data.tokenizer={self.folder / 'tokenizer'}"

    def sae(self, d_in: int = 32, architecture: str = "jumprelu", **config: Any) -> str:
        write_saelens(self.folder / "sae", random_sae(seed=5, d_in=d_in, d_sae=48), architecture)
        edit_json(self.folder / "sae" / "cfg.json", **config)
        return f"features.0.sae={self.folder / 'sae'}"


def sets(overrides: Any) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def edit_json(path: Path, **changes: Any) -> None:
    kept = {name: value for name, value in json.loads(path.read_text()).items() if changes.get(name, 0) is not None}
    path.write_text(json.dumps({**kept, **{name: value for name, value in changes.items() if value is not None}}))


def edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def remove(folder: Path, *patterns: str) -> None:
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink()


@dataclass(frozen=True)
class Mistake:
    """What is done, and what must stand in the answer; `exit_code` 0: it is none, or only worth a note."""

    name: str
    command: Callable[[Bench], list[str]]
    says: tuple[str, ...]
    exit_code: int = 1
    never: tuple[str, ...] = field(default=())


def _refused(name: str, command: Callable[[Bench], list[str]], *says: str, never: tuple[str, ...] = ()) -> Mistake:
    return Mistake(name, command, says, 1, never)


def _works(name: str, command: Callable[[Bench], list[str]], *says: str) -> Mistake:
    return Mistake(name, command, says, 0)


def _gives_turns(value: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": "w1"}], "chosen": value, "rejected": value}


QUESTION = [{"question": f"w{n} w7", "chosen": f"w{n + 1} w5", "rejected": f"w{n} w6"} for n in range(20)]
SYSTEM = [{"system": "w9 w8", **row} for row in QUESTION]
MANY = [{**TEXT, "chosen": f" w{n}"} for n in range(1, 9)]

DATA = [
    _refused("the prompt is called question", lambda b: b.pairs(QUESTION), "data.columns: {prompt: question}", "lost"),
    _refused("orca layout without a chat template", lambda b: b.pairs(SYSTEM), "the data holds messages"),
    _refused(
        "orca layout, the prompt mapped",
        lambda b: b.pairs(SYSTEM, columns={"prompt": "question"}),
        "the text of column 'system'",
        "{prompt: question, system: null}",
    ),
    _works(
        "orca layout, all said",
        lambda b: b.pairs(SYSTEM, columns={"prompt": "question", "system": None}),
        "prompt      column question, 2.0 tokens on average; columns not used: system",
    ),
    _works(
        "a source column beside an implicit prompt",
        lambda b: b.pairs([{"source": "x", "chosen": f"w1 w{n}", "rejected": "w1 w3"} for n in range(4, 9)]),
        "prompt      implicit (what chosen and rejected share)",
        "columns not used: source",
    ),
    _refused("promt", lambda b: b.pairs([{"promt": "w1 w2", "chosen": "w3", "rejected": "w4"}]), "{prompt: promt}"),
    _refused(
        "response_a and response_b",
        lambda b: b.pairs([{"prompt": "w1", "response_a": "w2", "response_b": "w3"}]),
        "no column 'chosen'",
        "response_a, response_b",
        "data.columns",
    ),
    _refused(
        "alpaca",
        lambda b: b.pairs([{"instruction": "w1", "input": "", "output": "w3"}]),
        "no column 'chosen'",
        "instruction, input, output",
    ),
    _works(
        "kto",
        lambda b: b.pairs([{"prompt": "w1", "completion": "w2", "label": True}]),
        "1 of 1 completions kept",
    ),
    _refused(
        "kto without its labels",
        lambda b: b.pairs([{"prompt": "w1", "completion": "w2"}]),
        "no column 'label'",
        "prompt, completion",
    ),
    _refused(
        "rows inside one object",
        lambda b: b.pairs(json.dumps({"data": [TEXT]}), "pairs.json"),
        "its rows stand inside 'data'",
        never=("rename",),
    ),
    _refused(
        "sharegpt messages without a chat template",
        lambda b: b.pairs([_gives_turns([{"from": "gpt", "value": "w2"}])]),
        "the data holds messages",
    ),
    _refused(
        "chosen is one sharegpt object, without a chat template",
        lambda b: b.pairs([_gives_turns({"from": "gpt", "value": "w2"})]),
        "the data holds messages",
    ),
    _refused(
        "chosen is a struct of parquet",
        lambda b: (
            Dataset.from_list([{**TEXT, "chosen": {"text": "a", "model": "b"}}]).to_parquet(b.folder / "pairs.parquet"),
            ["cache", b.recipe(data={"source": str(b.folder / "pairs.parquet"), "eval_split": None})],
        )[1],
        "an object (text, model), not text or a list of messages",
    ),
    _refused(
        "chosen is a list of texts in parquet",
        lambda b: (
            Dataset.from_list([{**TEXT, "chosen": ["a", "b"]}]).to_parquet(b.folder / "pairs.parquet"),
            ["cache", b.recipe(data={"source": str(b.folder / "pairs.parquet"), "eval_split": None})],
        )[1],
        "row 0, column 'rejected': text, not a list; write one value per completion",
    ),
    _refused(
        "numbers as completions",
        lambda b: b.pairs([{**TEXT, "chosen": 1}]),
        "row 0, column 'chosen': the value 1, not text; write it in quotes",
        never=("row 0 holds",),
    ),
    _refused("a null cell", lambda b: b.pairs([TEXT, {**TEXT, "rejected": None}]), "row 1, column 'rejected'", "null"),
    _refused(
        "text and messages mixed",
        lambda b: b.pairs([TEXT, {**TEXT, "chosen": [{"role": "assistant", "content": "w1"}]}]),
        "row 1, column 'chosen': a list, where chosen of row 0 holds text",
    ),
    _refused(
        "not UTF-8",
        lambda b: b.pairs(json.dumps(TEXT).encode() + b'\n{"prompt": "p", "chosen": "\xe9", "rejected": "b"}\n'),
        "not UTF-8",
        "convert the file",
    ),
    _refused("a broken last line", lambda b: b.pairs(json.dumps(TEXT) + '\n{"prompt": "w1'), "line 2: not JSON"),
    _refused("an empty file", lambda b: b.pairs(""), "pairs.jsonl: the file is empty"),
    _refused("a file of blank lines", lambda b: b.pairs("\n\n"), "the file holds no rows, only 2 blank lines"),
    _refused("an empty slice", lambda b: b.pairs([TEXT], split="train[:0]"), "split 'train[:0]' has no rows; choose"),
    _works("an empty chosen", lambda b: b.pairs([TEXT, {**TEXT, "chosen": ""}]), "noted 1: a completion says nothing"),
    _works(
        "identical sides",
        lambda b: b.pairs([{**TEXT, "rejected": TEXT["chosen"]}]),
        "noted 1: chosen and rejected are the same tokens",
    ),
    _works(
        "one row",
        lambda b: b.pairs([{**TEXT, "prompt": "w8"}]),
        "1 of 1 pairs kept",
        "base        1 shard, ",
        "built       1 shard in",
    ),
    _works(
        "the training split is held out", lambda b: b.pairs(MANY, eval_split="train"), "noted 8: the training split"
    ),
    _works("duplicates", lambda b: b.pairs([*MANY, *MANY[:5]]), "noted 5: the same tokens as an earlier pair (row 8"),
    _works(
        "CSV with commas and quotes",
        lambda b: b.pairs('prompt,chosen,rejected\n"w1, w2","w3 ""w4""",w5\n', "pairs.csv"),
        "1 of 1 pairs kept",
    ),
    _works("a JSON array", lambda b: b.pairs(json.dumps(MANY), "pairs.json"), "8 of 8 pairs kept"),
    _works(
        "a compressed file",
        lambda b: b.pairs(gzip.compress(json.dumps(TEXT).encode()), "pairs.jsonl.gz"),
        "1 of 1 pairs kept",
    ),
    _refused("tsv", lambda b: b.pairs("prompt\tchosen\trejected\n", "pairs.tsv"), "not one of the formats .jsonl"),
    _refused("a script", lambda b: b.pairs("print()", "pairs.py"), "not one of the formats .jsonl"),
    _refused(
        "no such file",
        lambda b: (b.pairs([TEXT]), b.cache(f"data.source={b.folder / 'pears.jsonl'}"))[1],
        "no such file or folder (did you mean 'pairs.jsonl'?)",
    ),
    _refused(
        "a folder without the split",
        lambda b: (b.pairs([TEXT], "latin.jsonl"), b.cache(f"data.source={b.folder}"))[1],
        "no split 'train'; its splits: latin",
        never=("did you mean",),
    ),
    _refused(
        "a pair too long for the model, never cut",
        lambda b: b.pairs([TEXT, {**TEXT, "chosen": " w1" * 90}], max_length=None),
        "data.max_length: null cuts nothing, and row 1 has 94 tokens",
        "set it to 64 or less",
    ),
    _works(
        "a pair that is cut",
        lambda b: b.pairs([{**TEXT, "chosen": " w1" * 90}], max_length=32),
        "noted 1: chosen is cut at max_length",
    ),
    _refused(
        "the test split of a single file",
        lambda b: b.pairs([TEXT], split="test"),
        "a single file is the split 'train', not 'test'; ask for train",
    ),
    _refused("max_length 0", lambda b: b.cache("data.max_length=0"), "data.max_length: must be greater than 0, not 0"),
    _refused("max_length 1", lambda b: b.cache("data.max_length=1"), "no pair is left", "raise data.max_length"),
    _refused(
        "the default max_length on a model with fewer positions",
        lambda b: b.cache("data.max_length=1024"),
        "data.max_length: 1024 is more than the 64 positions of",
    ),
]

TOKENIZERS = [
    _refused(
        "messages and no chat template", lambda b: b.messages(None), "has no chat template", "set data.chat_template"
    ),
    _refused(
        "the template file is missing",
        lambda b: b.messages("chatml.jinja"),
        "'chatml.jinja': no such file",
        "give a Jinja template or the path of one",
    ),
    _refused(
        "the template refuses the system role",
        lambda b: b.messages("{{ raise_exception('no system role') }}", roles=("system", "user")),
        "row 0: the chat template refuses its messages (system user): no system role",
        "set another chat template",
    ),
    _refused(
        "the template has a syntax error",
        lambda b: b.messages("{% for m in messages %}{{ m.content }"),
        "chat",
        "template",
        never=("row 0", "remove the row"),
    ),
    _refused(
        "no end token",
        lambda b: b.cache(b.tokenizer(lambda t: setattr(t, "eos_token", None))),
        "has no end token (eos_token)",
        "another data.tokenizer",
    ),
    _works(
        "no pad token",
        lambda b: b.cache(b.tokenizer(lambda t: setattr(t, "pad_token", None))),
        "24 of 24 pairs kept",
    ),
    _works(
        "tokens added that no pair holds",
        lambda b: b.cache(b.tokenizer(lambda t: t.add_tokens(["<|im_start|>", "<|im_end|>"]))),
        "24 of 24 pairs kept",
    ),
    _refused(
        "tokens added that the model was not resized for",
        lambda b: (
            b.tokenizer(lambda t: t.add_tokens([AddedToken(f"<|t{n}|>") for n in range(9)])),
            b.pairs([{**TEXT, "chosen": " <|t8|>"}], tokenizer=str(b.folder / "tokenizer")),
        )[1],
        "data.tokenizer: it gives token 102",
        "knows 97 tokens",
    ),
    _refused(
        "no tokenizer files",
        lambda b: b.cache(b.model(lambda f: remove(f, "tokenizer*", "special*"))),
        "tokenizer",
        "data.tokenizer",
        never=("one of: \n",),
    ),
]

MODELS = [
    _refused(
        "pytorch_model.bin alone",
        lambda b: b.cache(b.model(lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"))),
        "no model.safetensors",
        "save_pretrained",
    ),
    _refused(
        "no config.json",
        lambda b: b.cache(b.model(lambda f: (f / "config.json").unlink())),
        "this folder has no config.json",
    ),
    _refused(
        "a truncated download",
        lambda b: b.cache(b.model(lambda f: cut(f / "model.safetensors"))),
        "model.safetensors is not a whole safetensors file",
        "download or convert it again",
    ),
    _refused(
        "a pointer of git LFS",
        lambda b: b.cache(
            b.model(lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"))
        ),
        "model.safetensors is not a whole safetensors file",
    ),
    _refused(
        "a tensor is missing",
        lambda b: b.cache(
            b.model(lambda f: edit_weights(f, lambda t: t.pop("model.layers.1.self_attn.q_proj.weight")))
        ),
        "lack 1 of the model's tensors",
        "model.layers.1.self_attn.q_proj.weight",
    ),
    _refused(
        "the config says untied, the files hold no head",
        lambda b: b.cache(b.model(lambda f: edit_weights(f, lambda t: t.pop("lm_head.weight")))),
        "lack 1 of the model's tensors, the first is lm_head.weight",
    ),
    _refused(
        "the config does not fit the weights",
        lambda b: b.cache(b.model(lambda f: edit_json(f / "config.json", intermediate_size=64))),
        "mlp",
        never=("ignore_mismatched_sizes", "report"),
    ),
    _refused(
        "NaN in the weights",
        lambda b: b.cache(
            b.model(lambda f: edit_weights(f, lambda t: t["model.layers.1.mlp.up_proj.weight"].fill(np.nan)))
        ),
        "NaN",
        never=("family cannot",),
    ),
    _refused(
        "an encoder",
        lambda b: (
            (
                BertModel(
                    BertConfig(
                        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
                    )
                ).save_pretrained(b.folder / "bert"),
                b.cache(
                    f"reference.model={b.folder / 'bert'}", f"data.tokenizer={b.world.root / 'model'}", "features=[]"
                ),
            )[1]
            + sets(["objective={name: dpo}"])
        ),
        "causal",
        never=("packed",),
    ),
    _refused(
        "an encoder and a decoder",
        lambda b: (
            (
                T5ForConditionalGeneration(
                    T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
                ).save_pretrained(b.folder / "t5"),
                b.cache(
                    f"reference.model={b.folder / 't5'}", f"data.tokenizer={b.world.root / 'model'}", "features=[]"
                ),
            )[1]
            + sets(["objective={name: dpo}"])
        ),
        "encoder",
        never=("<class",),
    ),
    _refused(
        "a hub id that is not reached",
        lambda b: b.cache("reference.model=gogle/gemma-2-2b"),
        "gogle/gemma-2-2b",
        "the hub is not reached",
    ),
    _refused(
        "a mistyped folder", lambda b: b.cache(f"reference.model={b.world.root / 'modle'}"), "nearest is", "model"
    ),
    _refused(
        "a LoRA folder as the model",
        lambda b: b.cache(b.model(lambda f: (f / "config.json").rename(f / "adapter_config.json"))),
        "this folder has no config.json",
    ),
    _refused(
        "an adapter that is none",
        lambda b: b.cache(f"reference.adapter={b.world.root / 'pairs'}"),
        "pairs: it has no adapter_config.json",
    ),
    _refused("the adapter of another model", lambda b: b.cache(f"reference.adapter={foreign_adapter(b)}"), "adapter"),
    _works(
        "tied weights",
        lambda b: (
            tiny_model("llama", tie_word_embeddings=True).save_pretrained(b.folder / "tied"),
            b.cache(f"reference.model={b.folder / 'tied'}", f"data.tokenizer={b.world.root / 'model'}"),
        )[1],
        "24 of 24 pairs kept",
    ),
    _refused("a variable of the shell", lambda b: b.cache("reference.model=$HOME/model"), "$HOME/model"),
    _works(
        "a folder under ~",
        lambda b: b.cache("reference.model=~/model"),
        "24 of 24 pairs kept",
    ),
]

SAES = [
    _refused(
        "another layer, by the SAE's own word",
        lambda b: b.cache(b.sae(hook_name="blocks.2.hook_resid_post"), "features.0.self_check=true"),
        "features[0].hookpoint",
        "says that it reads",
        "model.layers.1",
    ),
    _refused(
        "another layer, by its numbers",
        lambda b: b.cache("features.0.self_check=true", "features.0.hookpoint=model.layers.2"),
        "model.layers.2",
        "self_check",
    ),
    _refused("another width", lambda b: b.cache(b.sae(d_in=16)), "features[0].sae", "reads 16 numbers per", "gives 32"),
    _refused("a mistyped SAE folder", lambda b: b.cache(f"features.0.sae={b.world.root / 'saee'}"), "saee", "sae"),
    _refused("the folder above the SAE", lambda b: b.cache(f"features.0.sae={b.world.root}"), "no SAE"),
    _refused(
        "a layer that the model does not have",
        lambda b: b.cache("features.0.hookpoint=model.layers.9"),
        "features[0].hookpoint: ",
        "model.layers.9",
    ),
    _refused(
        "top_k above the SAE's features", lambda b: b.cache("features.0.top_k=99"), "99 is more than the SAE's 48"
    ),
    _refused("top_k 0", lambda b: b.cache("features.0.top_k=0"), "features[0].top_k: must be greater than 0"),
    _refused("top_logits above the vocabulary", lambda b: b.cache("cache.top_logits=98"), "more than the 97 tokens"),
]

RECIPES = [
    _refused("k above top_k", lambda b: b.cache("objective.k=17"), "objective.k: 17 features", "keeps top_k: 16"),
    _refused("alpha below 0", lambda b: b.cache("objective.alpha=-1"), "objective.alpha: must be greater than or eq"),
    _refused("beta 0", lambda b: b.cache("objective.beta=0"), "objective.beta: must be greater than 0, not 0"),
    _refused("beta in words", lambda b: b.cache("objective.beta=small"), "objective.beta: must be a valid number"),
    _refused(
        "beta in quotes", lambda b: b.cache("objective.beta='0.1'"), "objective.beta: must be a valid number, not"
    ),
    _refused("dtype fp32", lambda b: b.cache("reference.dtype=fp32"), "reference.dtype: 'fp32'", "float32"),
    _refused("dtype bf16", lambda b: b.cache("reference.dtype=bf16"), "reference.dtype: 'bf16'", "bfloat16"),
    _refused("indentation", lambda b: ["cache", b.recipe_text("data:\n  source: a\n split: b\n")], "line 3, column"),
    _refused("a tab", lambda b: ["cache", b.recipe_text("data:\n\tsource: a\n")], "line 2, column 1", "\\t"),
    _refused("a list", lambda b: ["cache", b.recipe_text("- data\n")], "a mapping of sections, this is a list"),
    _refused("empty", lambda b: ["cache", b.recipe_text("")], "the recipe is empty", never=("NoneType",)),
    _refused("twice", lambda b: ["cache", b.recipe_text("data: {}\nreference: {}\ndata: {}\n")], "line 3, column 1"),
    _refused(
        "not UTF-8 (recipe)", lambda b: ["cache", b.recipe_text(b"# caf\xe9\n")], "recipe.yaml: line 1: not UTF-8"
    ),
    _refused("an unknown section", lambda b: b.cache("dta.source=x"), "dta: no such field; nearest is data"),
    _refused("a section with a capital", lambda b: b.cache("Data.source=x"), "Data: no such field; nearest is data"),
    _refused("a date that is none", lambda b: b.cache("data.source=2026-99-99"), "is no timestamp", "in quotes"),
    _refused("flat", lambda b: ["cache", b.recipe_text("model: a\nsource: b\n")], "model: no such field", "reference"),
    _refused("features as a mapping", lambda b: b.cache("features={sae: a, hookpoint: b}"), "features: must be a list"),
    _refused("--set without a value", lambda b: b.cache("objective.beta"), "write it as section.field=value"),
    _refused("--set of a field that is not there", lambda b: b.cache("objective.betta=1"), "nearest is beta"),
    _refused(
        "no such recipe", lambda b: ["cache", b.recipe().replace("recipe", "recpie")], "nearest is", "recipe.yaml"
    ),
    _refused("columns turned round", lambda b: b.cache("data.columns={question: prompt}"), "write {prompt: question}"),
]

TRAINING = [
    _refused("an unknown argument", lambda b: b.align("training.learning_rte=1"), "nearest is learning_rate"),
    _refused("a negative learning rate", lambda b: b.align("training.learning_rate=-1"), "learning"),
    _refused("an optimizer of another package", lambda b: b.align("training.optim=adamw_8bit"), "bitsandbytes"),
    _refused("push_to_hub without a network", lambda b: b.align("training.push_to_hub=true"), "hub"),
    _refused("a mistyped optimizer", lambda b: b.align("training.optim=adamw_torhc"), "training.optim", "adamw_torch"),
    _refused(
        "a mistyped scheduler", lambda b: b.align("training.lr_scheduler_type=liner"), "lr_scheduler_type", "linear"
    ),
    _refused(
        "deepspeed is not installed",
        lambda b: b.align("training.deepspeed={zero_optimization: {stage: 2}}"),
        "deepspeed",
    ),
    _refused(
        "the loss becomes NaN", lambda b: b.align("training.learning_rate=1e9", "training.max_steps=9"), "not a number"
    ),
    _refused("no steps", lambda b: b.align("training.max_steps=0"), "max_steps"),
    _refused("no epochs", lambda b: b.align("training.max_steps=-1", "training.num_train_epochs=0"), "epochs"),
    _refused(
        "bf16 over a float32 reference", lambda b: b.align("training.bf16=true"), "reference.autocast", "bfloat16"
    ),
    _refused("fp16 over a float32 reference", lambda b: b.align("training.fp16=true"), "reference.autocast", "float16"),
    _refused(
        "bf16 without a device for it",
        lambda b: b.align("training.bf16=true", "training.use_cpu=false", "policy.same_arithmetic=false"),
        "bf16",
        "cpu",
    ),
    _refused("fp16 on a CPU", lambda b: b.align("training.fp16=true", "policy.same_arithmetic=false"), "fp16", "GPU"),
    _works(
        "a batch above the data", lambda b: b.align("training.per_device_train_batch_size=99"), "trained     2 steps"
    ),
]

RUNS = [
    _refused("no cache", lambda b: [*b.align(), "--store", str(b.folder / "none")], "build it with: fpo cache"),
    _refused("no cache of these pairs", lambda b: b.align("data.split=train[:5]"), "groups.digest", "build it with"),
    _refused(
        "no column of these features",
        lambda b: b.align("features.0.top_k=40"),
        "has no column of features at model.layers.1, top 40",
        "fpo cache",
    ),
    _refused(
        "a cache of single completions",
        lambda b: b.singles(),
        "the objective compares completions of a prompt, and cache ",
        "has 2 in 2 groups; name data with two or more completions in every row",
        never=("loading the policy",),
    ),
    _refused("the output is a file", lambda b: (written(b.folder / "run"), b.align())[1], "run"),
    _works(
        "the output holds a log of the scheduler",
        lambda b: ((b.folder / "run").mkdir(), written(b.folder / "run" / "slurm-1.log"), b.align())[2],
        "trained     2 steps",
    ),
    _refused(
        "the output is somebody's model",
        lambda b: (b.model(lambda f: None), [*b.align(), "--output", str(b.folder / "model")])[1],
        "give another --output",
    ),
    _refused("evaluate what is no run", lambda b: ["evaluate", str(b.folder)], "no run here"),
    _refused(
        "the store is a file", lambda b: [*b.cache(), "--store", str(written(b.folder / "s"))], "Not a directory", "/s/"
    ),
    _refused(
        "the store cannot be written", lambda b: [*b.cache(), "--store", "/proc/store"], "/proc/store", never=("bug",)
    ),
    _refused("a policy with another vocabulary", lambda b: b.align(f"policy.model={renamed(b)}"), "another vocabulary"),
    _refused(
        "a mistyped LoRA target",
        lambda b: b.align("policy.lora.target_modules=[q_prj]"),
        "policy.lora.target_modules",
        "q_prj",
    ),
    _refused(
        "a checkpoint that is cut off",
        lambda b: (
            cut(b.aligned("training.lr_scheduler_type=constant") / "checkpoint-2" / "optimizer.pt"),
            [*b.align("training.lr_scheduler_type=constant", "training.max_steps=4"), "--resume"],
        )[1],
        "checkpoint-2",
        "optimizer.pt",
    ),
    _refused("a flipped bit", lambda b: with_damage(b, "shards/000000.zarr.zip", flip), "000000.zarr.zip"),
    _refused("a missing shard", lambda b: with_damage(b, "shards/000000.zarr.zip", Path.unlink), "000000.zarr.zip"),
    _refused("an edited manifest", lambda b: with_damage(b, "manifest.json", flip), "manifest.json"),
]

MISTAKES = [*DATA, *TOKENIZERS, *MODELS, *SAES, *RECIPES, *TRAINING, *RUNS]


def written(path: Path) -> Path:
    path.write_text("something")
    return path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def with_damage(bench: Bench, name: str, damage: Callable[[Path], Any]) -> list[str]:
    """`fpo align` from a copy of the store with one file of every cache damaged."""
    store = bench.folder / "damaged"
    shutil.copytree(bench.world.store, store)
    for path in store.glob(f"*/{name}"):
        damage(path)
    return [*bench.align(), "--store", str(store)]


def renamed(bench: Bench) -> Path:
    """A copy of the model whose tokenizer calls a token otherwise."""
    folder = bench.folder / "model"
    shutil.copytree(bench.world.root / "model", folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"w7"', '"x7"'))
    return folder


def foreign_adapter(bench: Bench) -> Path:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", hidden_size=16, head_dim=4)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(bench.folder / "adapter")
    return bench.folder / "adapter"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyWorld]:
    """A world with its caches; memory and libraries write beside it."""
    world = build_tiny_world(tmp_path_factory.mktemp("world"), 24, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(world.root / "xdg"))
        patch.setenv("FPO_STORE", str(world.store))
        patch.setenv("HOME", str(world.root))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", world.root / "datasets")
        patch.setattr("sys.argv", ["fpo", "cache", str(world.recipe_file())])
        assert exit_code(cli.main) == 0
        yield world


def exit_code(main: Callable[[], None]) -> int:
    try:
        main()
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
    return 0


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_ends_in_one_clear_line(
    mistake: Mistake,
    world: TinyWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    command = mistake.command(Bench(world, tmp_path))
    monkeypatch.setattr("sys.argv", ["fpo", *command])
    capfd.readouterr()
    code = exit_code(cli.main)
    out, err = capfd.readouterr()
    assert code == mistake.exit_code, err
    answer = err if mistake.exit_code else out
    for words in mistake.says:
        assert words in answer
    for words in ("Traceback", "this is a bug", *mistake.never):
        assert words not in out + err
    if mistake.exit_code:
        assert out == ""
        assert one_clear_line(err)


def test_a_disk_that_fills_up_while_a_run_is_saved_is_one_clear_line(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the disk: Python sees the same failed write."""
    monkeypatch.setattr("sys.argv", ["fpo", *Bench(world, tmp_path).align()])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code = exit_code(cli.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    out, err = capfd.readouterr()
    assert (code, out) == (1, "")
    assert one_clear_line(err)
    assert "File too large" in err
    assert not (tmp_path / "run" / "model.safetensors").exists()


def one_clear_line(err: str) -> bool:
    """Whether there is one `error: ` line, with details indented under it, and before it only what was being done."""
    before, _, error = err.partition("error: ")
    first, *details = error.splitlines()
    said = [
        line
        for line in before.splitlines()
        if not line.startswith(("loading ", "opening ", "  ", "train: ", "train[", "align: "))
    ]
    return bool(first) and all(line.startswith("  ") for line in details) and said == []


def test_the_exit_code_reaches_the_shell(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: []\n")
    done = subprocess.run(
        [sys.executable, "-m", "fpo", "cache", str(tmp_path / "mine.yaml")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'mine.yaml'}: ")


def test_every_mistake_has_its_own_name() -> None:
    names = [mistake.name for mistake in MISTAKES]
    assert len(set(names)) == len(names)
