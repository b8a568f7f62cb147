"""The key is neither stale nor nervous: what changes a number changes it, and nothing else does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_model
from tiny_world import TinyWorld, build_tiny_world
from transformers import AutoConfig, AutoModelForCausalLM

import fpo.stage1_cache.score as score_module
from fpo.canonical import canonical_json
from fpo.errors import DataError, ModelError, RecipeError
from fpo.recipe import load_recipe
from fpo.scoring import load_tokenizer, model_config, significant_config
from fpo.stage1_cache import build_caches
from fpo.stage1_cache.identity import cache_identities
from fpo.stage1_cache.read import read_groups
from fpo.store import cache_key

pytestmark = pytest.mark.usefixtures("private_memory")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"), 12, 4)


def key(world: TinyWorld, **sections: Any) -> str:
    return cache_key(cache_identities(world.recipe(**sections))[0].key_recipe)


def significant(folder: Path, config: dict[str, Any]) -> bytes:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return canonical_json(significant_config(model_config(folder)))


# --- configurations ---

# As libraries before transformers 5 wrote them.
OLD_LLAMA = {
    "_name_or_path": "someone/llama",
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
    "torchscript": True,
    "transformers_version": "4.41.0",
    "unsloth_version": "2024.9",
    "attention_dropout": 0.1,
    "use_cache": False,
}
OLD_GEMMA2 = {
    "model_type": "gemma2",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "sliding_window": 5,
    "query_pre_attn_scalar": 16,
    "rope_theta": 10000.0,
    "cache_implementation": "hybrid",
}
OLD_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 97,
    "n_positions": 64,
    "n_ctx": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "attn_pdrop": 0.1,
    "task_specific_params": {"text-generation": {"do_sample": True}},
}
OLD = [OLD_LLAMA, OLD_GEMMA2, OLD_GPT2]


@pytest.mark.parametrize("config", OLD, ids=lambda config: config["model_type"])
def test_a_model_that_another_version_saved_again_has_the_key_it_had(config: dict[str, Any], tmp_path: Path) -> None:
    before = significant(tmp_path / "old", config)
    again = AutoConfig.from_pretrained(tmp_path / "old")
    again.save_pretrained(tmp_path / "new")
    new = json.loads((tmp_path / "new" / "config.json").read_text())
    assert new != config
    assert significant(tmp_path / "new", new) == before


def test_a_model_that_another_version_saved_again_hits(tmp_path: Path) -> None:
    """From config.json in the old spelling to the files that `save_pretrained` makes of it."""
    world = build_tiny_world(tmp_path / "world", 4, 2)
    config = {**OLD_LLAMA, "rope_scaling": None, "torch_dtype": "float32"}
    (world.root / "model" / "config.json").write_text(json.dumps(config))
    assert [report.built_shards for report in build_caches(world.recipe(), world.store)] == [1, 1]
    AutoModelForCausalLM.from_pretrained(world.root / "model").save_pretrained(world.root / "model")
    assert json.loads((world.root / "model" / "config.json").read_text()) != config
    assert [report.built_shards for report in build_caches(world.recipe(), world.store)] == [0, 0]


@pytest.mark.parametrize(
    "noise",
    [{"max_position_embeddings": 128}, {"torchscript": False}, {"unsloth_version": "9"}, {"pretraining_tp": 2},
     {"rope_theta": 500000}, {"attention_dropout": 0.0}, {"bos_token_id": 5}, {"head_dim": 8}, {"head_dim": None},
     {"attention_bias": False}, {"rope_scaling": {"rope_type": "linear", "factor": 2}}],
    ids=str,
)  # fmt: skip
def test_what_changes_no_number_is_not_in_the_key(noise: dict[str, Any], tmp_path: Path) -> None:
    """Bookkeeping, dropout, defaults that are written out, a maximum of positions that stretches none."""
    assert significant(tmp_path / "a", {**OLD_LLAMA, **noise}) == significant(tmp_path / "b", OLD_LLAMA)


NUMBERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *[
        (OLD_LLAMA, change)
        for change in (
            {"rms_norm_eps": 1e-6},
            {"rope_theta": 10000.0},
            {"rope_scaling": None},
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            {"hidden_act": "gelu"},
            {"num_attention_heads": 8},
            {"num_key_value_heads": 4},
            {"head_dim": 16},
            {"num_hidden_layers": 2},
            {"hidden_size": 64},
            {"intermediate_size": 56},
            {"attention_bias": True},
            {"mlp_bias": True},
            {"tie_word_embeddings": True},
            {"vocab_size": 98},
            {"model_type": "mistral"},
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        )
    ],
    *[
        (OLD_GEMMA2, change)
        for change in (
            {"query_pre_attn_scalar": 8},
            {"sliding_window": 6},
            {"layer_types": ["full_attention"] * 4},
            {"final_logit_softcapping": 20.0},
            {"final_logit_softcapping": None},
            {"attn_logit_softcapping": 20.0},
            {"hidden_activation": "silu"},
            {"rms_norm_eps": 1e-5},
            {"rope_theta": 20000.0},
            {"attention_bias": True},
            {"use_bidirectional_attention": True},
        )
    ],
    *[
        (OLD_GPT2, change)
        for change in (
            {"activation_function": "gelu"},
            {"layer_norm_epsilon": 1e-6},
            {"n_head": 8},
            {"n_inner": 64},
            {"n_positions": 65},
            {"scale_attn_weights": False},
            {"scale_attn_by_inverse_layer_idx": True},
            {"reorder_and_upcast_attn": True},
        )
    ],
]


@pytest.mark.parametrize(("config", "change"), NUMBERS, ids=[f"{a['model_type']}-{b}" for a, b in NUMBERS])
def test_what_changes_numbers_is_in_the_key(config: dict[str, Any], change: dict[str, Any], tmp_path: Path) -> None:
    assert significant(tmp_path / "a", {**config, **change}) != significant(tmp_path / "b", config)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_a_maximum_that_stretches_the_positions_is_in_the_key(kind: str, tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    scaling = {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 32, **factors}
    config = {**OLD_LLAMA, "rope_scaling": scaling}
    assert significant(tmp_path / "a", {**config, "max_position_embeddings": 128}) != significant(
        tmp_path / "b", config
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_is_its_own_twin_after_saving(family: str, tmp_path: Path) -> None:
    tiny_model(family).config.save_pretrained(tmp_path / "one")
    AutoConfig.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (significant_config(model_config(tmp_path / name)) for name in ("one", "two"))
    assert canonical_json(one) == canonical_json(two)


# --- hookpoints ---


def test_two_names_of_one_hookpoint_give_one_key(tmp_path: Path) -> None:
    world = build_tiny_world(tmp_path / "world", 4, 2, family="gpt2")
    feature = world.raw_recipe()["features"][0]
    names = ("model.layers.1", "transformer.h.1", "transformer.h.2", "transformer.h.1.mlp", "model.layers.1.mlp")
    recipes = [world.recipe(features=[{**feature, "hookpoint": name}]) for name in names]
    identities = [cache_identities(recipe)[0] for recipe in recipes]
    assert len({cache_key(identity.key_recipe) for identity in identities}) == 1
    keys = [cache_key(identity.column_recipe(identity.specs[0])) for identity in identities]
    assert keys[0] == keys[1]
    assert keys[3] == keys[4]
    assert len(set(keys)) == 3


# --- the memo and the tokens that are made ---

CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w9 {% endif %}"


def chat_world(root: Path) -> TinyWorld:
    world = build_tiny_world(root, 4, 2)
    row = {
        "prompt": [{"role": "user", "content": "w1 w2"}],
        "chosen": [{"role": "assistant", "content": "w3"}],
        "rejected": [{"role": "assistant", "content": "w4"}],
    }
    for split in ("train", "test"):
        (world.root / "pairs" / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 2)
    return world


def test_tokens_that_are_not_those_the_memo_names_are_scored_under_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that says something else the second time: nothing is loaded, and the next call has the new key."""
    world = chat_world(tmp_path / "world")
    recipe = world.recipe()
    tokenizer = load_tokenizer(str(world.root / "model"), None, CHAT)
    monkeypatch.setattr("fpo.stage1_cache.identity.load_tokenizer", lambda *_: tokenizer)
    remembered = cache_identities(recipe)[0].remembered
    tokenizer.chat_template = "w8 " + CHAT
    with monkeypatch.context() as patch:
        patch.setattr(score_module, "load_model", lambda *_: pytest.fail("the model was loaded"))
        with pytest.raises(DataError, match="gave other tokens than before") as error:
            build_caches(recipe, world.store)
    assert "run the same command again" in str(error.value)
    report = build_caches(recipe, world.store)[0]
    assert report.built_shards == 1
    assert report.cache.recipe["groups"]["digest"] != remembered["groups"]["digest"]


# --- the date ---

DATED = "{%- if strftime_now is defined %}{{ strftime_now('w%d w%m') }} {% endif -%}" + CHAT


def test_a_template_that_asks_for_the_date_gets_the_recipes(tmp_path: Path) -> None:
    world = chat_world(tmp_path / "world")
    (world.root / "chat.jinja").write_text(DATED)
    chat = str(world.root / "chat.jinja")
    with pytest.raises(
        RecipeError, match=r"^data\.today: the chat template asks for the date.*such as \d{4}-"
    ) as error:
        build_caches(world.recipe(data={"chat_template": chat}), world.store)
    assert "\n" not in str(error.value)
    ids = cache_identities(world.recipe(data={"chat_template": chat, "today": "2024-07-26"}))[0].tokens.input_ids
    assert ids[:2].tolist() == [4 + 26, 3]  # w26, and w07, which is <unk>
    other = cache_identities(world.recipe(data={"chat_template": chat, "today": "2024-11-27"}))[0].tokens.input_ids
    assert other[:2].tolist() == [4 + 27, 4 + 11]


def test_the_date_of_one_recipe_does_not_reach_others(tmp_path: Path) -> None:
    """transformers keeps compiled templates: what they are given while we render is taken back."""
    world = chat_world(tmp_path / "world")
    (world.root / "chat.jinja").write_text(DATED)
    recipe = world.recipe(data={"chat_template": str(world.root / "chat.jinja"), "today": "2024-07-26"})
    assert len(cache_identities(recipe)[0].tokens)
    tokenizer = load_tokenizer(str(world.root / "model"), None, DATED)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False)
    assert said.startswith(datetime.now().strftime("w%d w%m"))


def test_the_date_changes_no_key_where_the_template_does_not_ask(tmp_path: Path) -> None:
    world = chat_world(tmp_path / "world")
    (world.root / "chat.jinja").write_text(CHAT)
    chat = str(world.root / "chat.jinja")
    assert key(world, data={"chat_template": chat}) == key(world, data={"chat_template": chat, "today": "2024-07-26"})


# --- files that change between the key and the model ---


def test_weights_that_changed_after_the_key_was_taken_score_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swapped while the command ran: the key names one model, and another would be scored."""
    world = build_tiny_world(tmp_path / "world", 4, 2)
    real = score_module.load_model

    def swapped(folder: Path, *arguments: Any) -> Any:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return real(folder, *arguments)

    monkeypatch.setattr(score_module, "load_model", swapped)
    with pytest.raises(ModelError, match=r"changed on disk after the cache's key was taken") as error:
        build_caches(world.recipe(), world.store)
    assert "reference.weights" in str(error.value)
    assert not list(world.store.glob("*/records/*"))


def test_an_sae_that_changed_after_the_key_was_taken_scores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = build_tiny_world(tmp_path / "world", 4, 2)
    real = score_module.load_model

    def swapped(*arguments: Any) -> Any:
        weights = world.root / "sae" / "sae_weights.safetensors"
        tensors = load_file(weights)
        tensors["b_enc"] += 1
        save_file(tensors, weights)
        return real(*arguments)

    monkeypatch.setattr(score_module, "load_model", swapped)
    with pytest.raises(ModelError, match=r"columns\[0\]\.sae\.weights"):
        build_caches(world.recipe(), world.store)


def test_data_that_was_another_while_it_was_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`git stash` while the pairs are read, `git stash pop` after it: size and mtime are what they were."""
    world = build_tiny_world(tmp_path / "world", 4, 2)
    path = world.root / "pairs" / "train.jsonl"
    original, times = path.read_bytes(), path.stat()

    def put(data: bytes) -> None:
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def stashed(*arguments: Any, **options: Any) -> Any:
        put(original.replace(b"w1", b"w2"))
        return read_groups(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("fpo.stage1_cache.identity.read_groups", stashed)
        of_another = cache_identities(world.recipe())[0].remembered["groups"]["digest"]
    put(original)
    honest = cache_identities(world.recipe())[0]
    assert honest.remembered["groups"]["digest"] != of_another
    honest.check_tokens()


# --- places ---


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = build_tiny_world(tmp_path / "home" / "world", 4, 2)
    (world.root / "chat.jinja").write_text(CHAT)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    raw = world.raw_recipe(
        reference={"model": "~/world/model", "adapter": "~/world/adapter"},
        data={"source": "~/world/pairs", "tokenizer": "~/world/model", "chat_template": "~/world/chat.jinja"},
        policy={"model": "~/world/model"},
        cache={"store": "~/world/store"},
    )
    raw["features"][0]["sae"] = "~/world/sae"
    (world.root / "tilde.yaml").write_text(yaml.safe_dump(raw))
    recipe = load_recipe(world.root / "tilde.yaml", ["policy.model=~/world/other"])
    root = str(world.root)
    assert recipe.reference.model == f"{root}/model"
    assert recipe.reference.adapter == f"{root}/adapter"
    assert recipe.features[0].sae == f"{root}/sae"
    assert recipe.data.source == f"{root}/pairs"
    assert recipe.data.tokenizer == f"{root}/model"
    assert recipe.data.chat_template == f"{root}/chat.jinja"
    assert recipe.policy.model == f"{root}/other"
    assert recipe.cache.store == f"{root}/store"


@pytest.mark.long
def test_a_home_that_cannot_be_written_is_not_the_datas_fault(world: TinyWorld, tmp_path: Path) -> None:
    """A container's user: what `datasets` and the memo keep has no place."""
    environment = {**os.environ, "HOME": "/proc/nohome", "OMP_NUM_THREADS": "1"}
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "fpo", "cache", world.recipe_file(), "--store", tmp_path / "store"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "where `datasets` keeps what it has read, cannot be written; set HF_HOME" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    environment["HF_HOME"] = str(tmp_path / "hf")
    done = subprocess.run(
        [sys.executable, "-m", "fpo", "cache", world.recipe_file(), "--store", tmp_path / "store"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["2024-7-26", "today", "26.07.2024", "20240726x"])
def test_a_date_is_an_iso_date(world: TinyWorld, text: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.today: .* is no date; write it as 2026-11-24"):
        world.recipe(data={"today": text})


def test_a_date_that_yaml_reads_as_one_is_kept_as_text(world: TinyWorld) -> None:
    path = world.recipe_file()
    assert load_recipe(path, ["data.today=2026-11-24"]).data.today == "2026-11-24"
