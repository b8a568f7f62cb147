"""
A world for whole-pipeline tests, built in a second: a random Llama, a word tokenizer, a random SAE, pairs, a recipe.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_models import tiny_model
from tiny_saes import random_sae, write_saelens
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fpo.recipe import Recipe, validate_recipe

WORDS = [f"w{n}" for n in range(90)]
# In conversations: the user's vocabulary begins here, so that a token tells who speaks.
USERS_FIRST = 60
D_SAE = 48


@dataclass(frozen=True)
class TinyWorld:
    """Files of a small experiment under one folder."""

    root: Path

    @property
    def store(self) -> Path:
        return self.root / "store"

    def raw_recipe(self, **sections: Any) -> dict[str, Any]:
        """The recipe as plain data; a section given as a mapping extends its own, but another objective replaces it."""
        raw: dict[str, Any] = {
            "reference": {"model": str(self.root / "model")},
            "features": [
                {
                    "sae": str(self.root / "sae"),
                    "hookpoint": "model.layers.1",
                    "top_k": 16,
                    "self_check": False,
                }
            ],
            "data": {
                "source": str(self.root / "pairs"),
                "split": "train",
                "eval_split": "test",
                "max_length": 64,
            },
            "cache": {"shard_pairs": 16},
            "objective": {"name": "fpo", "beta": 2.0, "alpha": 3.0, "k": 8},
            "training": {
                "learning_rate": 1e-4,
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
                "num_train_epochs": 2,
                "save_steps": 7,
                "use_cpu": True,
            },
        }
        for name, section in sections.items():
            replaced = name == "objective" and section.get("name", "fpo") != "fpo"
            merged = isinstance(section, dict) and not replaced
            raw[name] = {**raw.get(name, {}), **section} if merged else section
        return raw

    def recipe(self, **sections: Any) -> Recipe:
        return validate_recipe(self.raw_recipe(**sections), "tiny")

    def recipe_file(self, **sections: Any) -> Path:
        """The recipe as a file, named by its objective."""
        raw = self.raw_recipe(**sections)
        path = self.root / f"{raw['objective']['name']}.yaml"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        return path


def build_tiny_world(root: Path, n_train: int = 40, n_test: int = 10, family: str = "llama") -> TinyWorld:
    """Write everything; the same arguments give the same numbers."""
    root.mkdir(parents=True, exist_ok=True)
    tiny_model(family, seed=3).save_pretrained(root / "model")
    _tokenizer().save_pretrained(root / "model")
    tensors = random_sae(seed=5, d_in=32, d_sae=D_SAE)
    write_saelens(root / "sae", tensors, "jumprelu")
    rng = np.random.default_rng(7)
    (root / "pairs").mkdir(exist_ok=True)
    for split, count in (("train", n_train), ("test", n_test)):
        rows = [json.dumps(_pair(rng)) for _ in range(count)]
        (root / "pairs" / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return TinyWorld(root)


def _pair(rng: np.random.Generator) -> dict[str, str]:
    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    return {"prompt": words(1, 12), "chosen": " " + words(1, 20), "rejected": " " + words(1, 20)}


def add_conversations(world: TinyWorld, n_train: int, n_test: int) -> dict[str, Any]:
    """
    Conversations beside the pairs: a user's turn, then completions of three turns, the user's in the middle.

    Returns the recipe's `data` that reads them and counts what the assistant says alone.
    """
    rng = np.random.default_rng(11)

    def turn(role: str) -> dict[str, str]:
        words = WORDS[USERS_FIRST:] if role == "user" else WORDS[:USERS_FIRST]
        return {"role": role, "content": " ".join(rng.choice(words, rng.integers(1, 8)))}

    def side() -> list[dict[str, str]]:
        return [turn("assistant"), turn("user"), turn("assistant")]

    folder = world.root / "conversations"
    folder.mkdir()
    for split, count in (("train", n_train), ("test", n_test)):
        rows = [{"prompt": [turn("user")], "chosen": side(), "rejected": side()} for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    return {"source": str(folder), "chat_template": template, "score": "assistant"}


def user_tokens() -> np.ndarray:
    """The token ids of the user's vocabulary."""
    vocabulary = _tokenizer().get_vocab()
    return np.array([vocabulary[word] for word in WORDS[USERS_FIRST:]])


def _tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {word: n for n, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def build_adapted_world(root: Path) -> TinyWorld:
    """A small world with `root/adapter`, a random adapter that moves the reference far from the model itself."""
    peft = pytest.importorskip("peft")
    world = build_tiny_world(root, 12, 6)
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(root / "adapter")
    return world
