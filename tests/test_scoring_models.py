"""Loading: what is hashed is what is loaded, what is wrong is said in one line, no code of a stranger is run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import COMMON, tiny_model
from tiny_world import TinyWorld, build_tiny_world
from torch import nn
from transformers import BertConfig, BertLMHeadModel, T5Config

from fpo.errors import ModelError, RecipeError
from fpo.recipe import Policy
from fpo.scoring import adapter_folder, load_model, load_tokenizer, model_config, model_folder, models, weight_files
from fpo.scoring.models import is_quantised
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage2_align import align

pytestmark = pytest.mark.usefixtures("private_memory")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(world: TinyWorld, tmp_path: Path) -> Path:
    """A copy of the model and its tokenizer."""
    return Path(shutil.copytree(world.root / "model", tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def one_line(error: BaseException) -> str:
    """The message, which is one line."""
    assert "\n" not in str(error)
    return str(error)


def two_forms(folder: Path) -> None:
    """model.safetensors of one model beside an index and the shards of another."""
    single = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    tiny_model("llama", seed=4).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").write_bytes(single)


def test_of_a_single_file_and_an_index_the_one_is_hashed_that_is_loaded(folder: Path) -> None:
    two_forms(folder)
    hashed = {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
    loaded = load_model(folder, "float32").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in hashed.items())


@pytest.mark.parametrize("names", ["../x.safetensors", "/etc/passwd", 3, None])
def test_an_index_names_files_of_its_folder(folder: Path, names: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": names}}))
    with pytest.raises(ModelError, match=r"index\.json"):
        weight_files(folder)


def test_weights_that_only_another_loader_takes_are_refused(folder: Path) -> None:
    """Hashing the one and loading the other would give a key that does not name what is scored."""
    os.rename(folder / "model.safetensors", folder / "adapter_model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no model\.safetensors; save the model again"):
        weight_files(folder)
    edit(folder / "config.json", transformers_weights="adapter_model.safetensors")
    with pytest.raises(ModelError, match="transformers_weights names another weights file"):
        model_config(folder)


def save_adapter(folder: Path, family: str = "llama", **overrides: object) -> Path:
    adapted = get_peft_model(
        tiny_model(family, seed=3, **overrides), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    return folder


def test_an_adapter_in_the_models_own_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers merges it in silence, and the key would not know."""
    adapter = save_adapter(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder)
    with pytest.raises(ModelError, match="move it to a folder of its own") as error:
        model_folder(str(folder))
    assert "reference.adapter" in one_line(error.value)
    with pytest.raises(
        ModelError, match=r"no config\.json, so it is no model; an adapter is named as reference\.adapter"
    ):
        model_folder(str(adapter))


def test_an_adapter_is_read_from_the_file_that_is_hashed(folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_model(folder, "float32", [adapter_folder(str(adapter))])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"hidden_size": 64}, "size mismatch for .*q_proj.*64.* such tensors"),
        ({"num_hidden_layers": 5}, "layers.3.*the model has no place for it .4 such tensors"),
        ({"num_hidden_layers": 2}, "layers.2.*the adapter's file lacks it .2 such tensors"),
    ],
)
def test_the_adapter_of_another_model_is_refused_in_one_line(
    folder: Path, tmp_path: Path, overrides: dict[str, object], said: str
) -> None:
    adapter = save_adapter(tmp_path / "adapter", **overrides)
    with pytest.raises(ModelError, match="does not fit the model") as error:
        load_model(folder, "float32", [adapter])
    assert re.search(said, one_line(error.value))


def test_weights_that_config_json_does_not_fit_are_named_with_both_shapes(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=56)
    with pytest.raises(ModelError, match=r"mlp\.\w+_proj\.weight is \d+x\d+ in the files, \d+x\d+ by config") as error:
        load_model(folder, "float32")
    assert "9 such tensors" in one_line(error.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (T5Config(d_model=16), "t5 is not a causal language model: it has an encoder and a decoder"),
        (BertConfig(), "bert is not a causal language model: it looks at what follows a token"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_before_its_weights_load(
    tmp_path: Path, config: T5Config | BertConfig, said: str
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        load_model(tmp_path, "float32")


def test_an_encoder_family_that_was_made_a_decoder_loads(tmp_path: Path) -> None:
    settings = {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertLMHeadModel(BertConfig(**settings, is_decoder=True)).save_pretrained(tmp_path)
    assert load_model(tmp_path, "float32").config.is_decoder


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b"[]", b"\xff\xfe", b'{"model_type": "llama", "vocab_size": ' + b"9" * 5000 + b"}",
     b'{"model_type": "llama", "hidden_size": "x"}', b'{"model_type": []}', b"{}", b'{"model_type": "nosuch"}'],
)  # fmt: skip
def test_a_config_that_cannot_be_read_is_one_line(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"config\.json: cannot be read") as error:
        model_config(folder)
    assert len(one_line(error.value)) < 700


EVIL = """
open({mark!r}, "w").close()
from transformers import PreTrainedTokenizerFast as Tokenizer, LlamaConfig as Config, LlamaForCausalLM as Model
"""


def test_code_that_a_folder_brings_is_neither_run_nor_offered_to_run(folder: Path, tmp_path: Path) -> None:
    """In a process whose standard input stays open: a question there would wait for ever."""
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    edit(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    script = """
import sys
from fpo.errors import FpoError
from fpo.scoring import load_tokenizer, model_config
from pathlib import Path
for load in (lambda: load_tokenizer(sys.argv[1], None), lambda: model_config(Path(sys.argv[1]))):
    try:
        load()
    except FpoError as error:
        print(error)
"""
    (folder / "other").mkdir()
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = process.stdout.read().splitlines()
    process.communicate()
    assert len(said) == 2
    assert "tokenizer" in said[0]
    assert all("brings code of its own (auto_map), which is never run" in line for line in said)
    assert not mark.exists()


def test_a_folder_without_a_tokenizer_says_what_to_do(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match=r"no tokenizer files there \(tokenizer\.json or its like\).*data\.tokenizer"):
        load_tokenizer(str(folder), None)


# --- the hub ---

LISTINGS = {
    "mistral": ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors", "consolidated.safetensors", "tokenizer.json", "params.json"],
    "gpt-oss": ["config.json", "model.safetensors", "original/model.safetensors", "original/config.json",
                "chat_template.jinja", "tokenizer.json"],
    "adapter": ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"],
}  # fmt: skip


@pytest.mark.parametrize("name", LISTINGS)
def test_only_the_weights_that_are_loaded_are_downloaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other formats of the same tensors are as large again."""
    snapshot = tmp_path / "snapshots" / "0123abc"

    def download(
        repo: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None = None
    ) -> str:
        assert revision in (None, "0123abc")
        for file in LISTINGS[name]:
            wanted = any(fnmatch(file, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch(file, pattern) for pattern in ignore_patterns or ()):
                (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
                index = {"weight_map": {str(n): shard for n, shard in enumerate(LISTINGS[name]) if "-of-" in shard}}
                (snapshot / file).write_text(json.dumps(index))
        return str(snapshot)

    monkeypatch.setattr(models, "snapshot_download", download)
    (adapter_folder if name == "adapter" else model_folder)(f"someone/{name}")
    found = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    unwanted = {
        "consolidated.safetensors",
        "original/model.safetensors",
        "original/config.json",
        "optimizer.safetensors",
    }
    assert found == set(LISTINGS[name]) - unwanted


def test_a_wrong_name_says_which_field_holds_it(world: TinyWorld, tmp_path: Path) -> None:
    build_caches(world.recipe(), tmp_path)
    with pytest.raises(ModelError, match=r"^reference\.model: .*no such folder"):
        build_caches(world.recipe(reference={"model": str(world.root / "modle")}), tmp_path)
    with pytest.raises(ModelError, match=r"^reference\.adapter: "):
        build_caches(world.recipe(reference={"adapter": str(world.root / "model")}), tmp_path)
    recipe = world.recipe(policy={"model": str(world.root / "modle")})
    with pytest.raises(ModelError, match=r"^policy\.model: .*no such folder"):
        align(recipe, find_cache(recipe, tmp_path), tmp_path / "run")


# --- quantised models ---


@pytest.mark.parametrize(
    ("method", "library"), [("bitsandbytes", "bitsandbytes"), ("gptq", "optimum"), ("awq", "gptqmodel")]
)
def test_a_quantised_model_without_its_library_says_what_to_install(folder: Path, method: str, library: str) -> None:
    bits = {"load_in_8bit": True} if method == "bitsandbytes" else {"bits": 4}
    edit(folder / "config.json", quantization_config={"quant_method": method, **bits})
    with pytest.raises(ModelError, match=rf"{library}.*pip install") as error:
        load_model(folder, "float32")
    one_line(error.value)


class IntegerWeights(nn.Module):
    """What bitsandbytes and GPTQ put in the place of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(3))


def test_integer_weights_and_what_is_quantised_stay_frozen() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp = IntegerWeights()
    models._require_gradients(model)
    assert not model.model.layers[0].mlp.weight.requires_grad
    assert model.model.layers[0].mlp.scale.requires_grad
    model.hf_quantizer = object()
    assert is_quantised(model)
    models._require_gradients(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_quantised_policy_needs_an_adapter(world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = world.recipe(training={"max_steps": 1})
    build_caches(recipe, tmp_path)
    monkeypatch.setattr(sys.modules["fpo.stage2_align.policy"], "is_quantised", lambda model: True)
    with pytest.raises(RecipeError, match=r"policy\.lora: .*is quantised.*set policy\.lora"):
        align(recipe, find_cache(recipe, tmp_path), tmp_path / "run")
    with_lora = recipe.model_copy(update={"policy": Policy.model_validate({"lora": {"r": 2}})})
    assert align(with_lora, find_cache(recipe, tmp_path), tmp_path / "lora").steps == 1
