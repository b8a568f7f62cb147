"""Activations and reconstructions of SAEs in torch's files equal those of SAELens, which has a loader for each."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_saes import Tensors, random_sae, random_tokens
from torch_saes import write_connor_rob, write_dictionary, write_goodfire, write_qwen_scope

from fpo.scoring.sae import load_sae, read_decoder, sae_facts

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

D_IN, D_SAE = 48, 256


@pytest.fixture
def tensors() -> Tensors:
    return random_sae(3, D_IN, D_SAE)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.from_numpy(random_tokens(64, d_in=D_IN))


@pytest.fixture
def loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SAELens' own hub loaders, on the files of this disk: a repository is a folder here."""
    module = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")

    def download(repo_id: str, filename: str, **_: object) -> str:
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr(module, "hf_hub_download", download)
    return module


def theirs(loaders: Any, load: Any, repository: str, path: str, **overrides: Any) -> Any:
    """The SAE that `SAE.from_pretrained` makes. Some sizes stand in its tables, not in the file: `overrides`."""
    from sae_lens import SAE

    config, state, _ = load(repository, path, device="cpu", cfg_overrides={"dtype": "float32", **overrides})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = SAE.from_dict(loaders.handle_config_defaulting(config))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict({name: value.float() for name, value in state.items()})
    return sae


def assert_same(source: str, sae: Any, x: torch.Tensor, seen: torch.Tensor | None = None) -> None:
    """`seen` is x in the shape that theirs reads."""
    seen = x if seen is None else seen
    ours = load_sae(source)
    with torch.no_grad():
        expected, reconstruction = sae.encode(seen), sae(seen).reshape(x.shape)
    assert torch.equal(ours.encode(x) > 0, expected > 0)
    torch.testing.assert_close(ours.encode(x), expected, rtol=1e-5, atol=1e-4)
    missed = (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()
    assert ours.fvu_and_l0(x, read_decoder(source))[0] == pytest.approx(float(missed), rel=1e-4)


@pytest.mark.parametrize(
    "dict_class",
    [
        "AutoEncoder",
        "GatedAutoEncoder",
        "JumpReluAutoEncoder",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
    ],
)
def test_dictionaries_encode_and_reconstruct_alike(dict_class, loaders, tensors, x, tmp_path):
    """SAELens cannot load an AutoEncoderNew: it looks for a b_dec that this class has not."""
    folder = "resid_post_layer_3/trainer_0"
    source = write_dictionary(tmp_path / "me/saes" / folder, tensors, dict_class, k=16, layer=3)
    load = loaders.dictionary_learning_sae_huggingface_loader_1
    assert_same(source, theirs(loaders, load, "me/saes", folder), x)


def test_qwen_scope_encodes_and_reconstructs_alike(loaders, tensors, x, tmp_path):
    repository = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_16"
    source = write_qwen_scope(tmp_path / repository / "layer7.sae.pt", tensors)
    load = loaders.qwen_scope_sae_huggingface_loader
    sae = theirs(loaders, load, repository, "layer7.sae.pt", d_in=D_IN, d_sae=D_SAE)
    assert_same(source, sae, x)
    assert sae_facts(source).hook_hint == sae.cfg.metadata.hf_hook_name == "model.layers.7"


def test_goodfire_encodes_and_reconstructs_alike(loaders, tensors, x, tmp_path):
    repository, name = "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth"
    source = write_goodfire(tmp_path / repository / name, tensors)
    load = loaders.get_goodfire_huggingface_loader
    assert_same(source, theirs(loaders, load, repository, name, d_in=D_IN, d_sae=D_SAE), x)


def test_qresearch_encodes_and_reconstructs_alike(loaders, tensors, x, tmp_path):
    repository, name = "qresearch/SAE-l19", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    source = write_goodfire(tmp_path / repository / name, tensors, suffix="")
    load = loaders.deepseek_r1_sae_huggingface_loader
    assert_same(source, theirs(loaders, load, repository, name, d_in=D_IN, d_sae=D_SAE), x)


def test_gpt2_hook_z_encodes_and_reconstructs_alike(loaders, tensors, x, tmp_path):
    """Theirs reads (tokens, heads, width of a head); what the projection reads is the heads side by side."""
    repository, name = "ckkissane/attn-saes-gpt2-small-all-layers", "gpt2-small_L5_Hcat_z_lr1.20e-03_v9.pt"
    source = write_connor_rob(tmp_path / repository / name, tensors)
    sae = theirs(loaders, loaders.connor_rob_hook_z_huggingface_loader, repository, name)
    assert_same(source, sae, x, x.view(len(x), 4, D_IN // 4))
