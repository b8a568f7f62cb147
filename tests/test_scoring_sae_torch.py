"""SAEs in files of torch.save: tensors alone are loaded, and each library's encoder is computed as it computes it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_saes import D_IN, D_SAE, Tensors, random_sae, random_tokens, refusal
from torch import nn
from torch_saes import dictionary_state, write_connor_rob, write_dictionary, write_goodfire, write_qwen_scope

from fpo.errors import SaeError
from fpo.scoring.sae import SaeFacts, load_sae, read_decoder, sae_config, sae_facts, sae_weights_digest
from fpo.scoring.sae.tensors import Weights

Wide = NDArray[np.float64]


def encoded(source: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
    return load_sae(source).encode(torch.from_numpy(x)).numpy()


def assert_decoder(source: str, t: Tensors) -> None:
    W, b, skip = read_decoder(source)
    np.testing.assert_array_equal(W, t["W_dec"])
    np.testing.assert_array_equal(b, t["b_dec"])
    assert skip is None


def relu(h: Wide) -> Wide:
    return np.maximum(h, 0)


def largest(f: Wide, k: int) -> Wide:
    """All but the k largest of each row are 0."""
    return np.where(f >= np.sort(f, axis=1)[:, -k][:, None], f, 0)


def wide(t: Tensors) -> dict[str, Wide]:
    return {name: array.astype(np.float64) for name, array in t.items()}


def as_the_class_encodes(dict_class: str, t: dict[str, Wide], x: Wide) -> Wide:
    centred = (x - t["b_dec"]) @ t["W_enc"]
    raw = x @ t["W_enc"]
    match dict_class:
        case "AutoEncoder":
            return relu(centred + t["b_enc"])
        case "AutoEncoderNew":
            return relu(raw + t["b_enc"])
        case "GatedAutoEncoder":
            return (centred + t["b_gate"] > 0) * relu(np.exp(t["r_mag"]) * centred + t["b_mag"])
        case "JumpReluAutoEncoder":
            return relu(raw + t["b_enc"]) * (raw + t["b_enc"] > t["threshold"])
        case "AutoEncoderTopK":
            return largest(relu(centred + t["b_enc"]), 4)
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            f = relu(centred + t["b_enc"])
            return f * (f > 0.7)
    raise AssertionError(dict_class)


CLASSES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "jumprelu",
    "MatryoshkaBatchTopKSAE": "jumprelu",
}


@pytest.mark.parametrize("dict_class", CLASSES)
def test_a_class_of_dictionary_learning_encodes_as_it_does_there(dict_class, tmp_path):
    t, x = random_sae(), random_tokens()
    source = write_dictionary(tmp_path, t, dict_class, k=4, layer=3)
    expected = as_the_class_encodes(dict_class, wide(t), x.astype(np.float64))
    assert 0.05 < (expected > 0).mean() < 0.8
    np.testing.assert_allclose(encoded(source, x), expected, rtol=1e-5, atol=1e-5)
    assert_decoder(source, t)
    facts = sae_facts(source)
    assert (facts.d_in, facts.d_sae, facts.format) == (D_IN, D_SAE, "dictionary_learning")
    assert (facts.architecture, facts.elementwise) == (CLASSES[dict_class], CLASSES[dict_class] != "topk")
    assert facts.hook_hint == "model.layers.3"


def test_classes_of_other_arithmetic_have_other_keys(tmp_path):
    """Of equal tensors: what is subtracted, and whether k or a threshold chooses."""
    classes = ("AutoEncoder", "AutoEncoderNew", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE")
    configs = [sae_config(write_dictionary(tmp_path / name, random_sae(), name, k=4)) for name in classes]
    assert all(config not in configs[:index] for index, config in enumerate(configs))


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ({"layer": 3}, "model.layers.3"),
        ({"layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped"}, "gpt_neox.layers.3"),
        ({"layer": 3, "submodule_name": "resid_post_layer_3"}, "model.layers.3"),
        ({"layer": 3, "submodule_name": "mlp_out_layer_3"}, "model.layers.3.mlp"),
        ({"layer": 3, "submodule_name": "attn_out_layer_3"}, "model.layers.3.self_attn"),
        ({"layer": 3, "submodule_name": "somewhere"}, None),
        ({"layer": 3, "buffer": {"io": "out"}}, "model.layers.3"),
        ({"layer": 3, "buffer": {"io": "in"}}, None),
        ({}, None),
    ],
)
def test_the_trainer_says_where_a_dictionary_hooks(said, hint, tmp_path):
    assert sae_facts(write_dictionary(tmp_path, random_sae(), "AutoEncoder", **said)).hook_hint == hint


@pytest.mark.parametrize(
    ("dict_class", "said", "l0"),
    [
        ("BatchTopKSAE", {"k": 64}, 64.0),
        ("JumpReluAutoEncoder", {"target_l0": 20}, 20.0),
        ("AutoEncoder", {}, None),
    ],
)
def test_a_dictionary_advertises_the_l0_it_was_trained_for(dict_class, said, l0, tmp_path):
    assert sae_facts(write_dictionary(tmp_path, random_sae(), dict_class, **said)).advertised_l0 == l0


@pytest.mark.parametrize(
    ("dict_class", "said", "reason"),
    [
        (
            "AutoEncoder",
            {"dict_class": "CrossCoder"},
            "dict_class CrossCoder is not supported: supported: AutoEncoder,",
        ),
        ("AutoEncoder", {"buffer": {"io": "in_and_out"}}, "a transcoder is not supported"),
        ("AutoEncoder", {"dict_size": 99}, "config says dict_size 99, the weights have 24"),
        ("AutoEncoder", {"dict_class": "AutoEncoderNew", "activation_dim": 7}, "activation_dim 7, the weights have 6"),
        ("AutoEncoder", {"dict_class": "BatchTopKSAE"}, "threshold must have shape (), ae.pt has no such tensor"),
        ("AutoEncoder", {"dict_class": "JumpReluAutoEncoder"}, "has no matrix W_enc"),
        ("AutoEncoderTopK", {}, "an AutoEncoderTopK whose config.json has no trainer.k"),
        ("AutoEncoderTopK", {"k": 25}, "k is 25, of 24 features"),
    ],
)
def test_a_dictionary_that_is_not_what_it_says_is_refused(dict_class, said, reason, tmp_path):
    assert reason in refusal(write_dictionary(tmp_path, random_sae(), dict_class, **said))


@pytest.mark.parametrize("dict_class", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_batch_topk_whose_threshold_was_never_set_is_refused(dict_class, tmp_path):
    source = write_dictionary(tmp_path, random_sae(), dict_class, k=4)
    torch.save({**dictionary_state(dict_class, random_sae()), "threshold": torch.tensor(-1.0)}, tmp_path / "ae.pt")
    assert "threshold -1 is not supported: it was never set in training" in refusal(source, weights=True)


def test_a_dictionary_without_its_configuration_is_refused(tmp_path):
    source = write_dictionary(tmp_path, random_sae(), "AutoEncoder")
    (tmp_path / "config.json").write_text("{}")
    assert "config.json has no trainer, as dictionary_learning writes it" in refusal(source)
    (tmp_path / "config.json").unlink()
    assert "config.json is missing beside the weights" in refusal(source)


GOODFIRE = "Llama-3.1-8B-Instruct-SAE-l19.pth"
QWEN = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
HOOK_Z = "gpt2-small_L5_Hcat_z_lr1.20e-03_ds49152_v9.pt"


def write_qresearch(path: Path, t: Tensors) -> str:
    return write_goodfire(path, t, suffix="")


@pytest.mark.parametrize(
    ("write", "name", "format_name"),
    [
        (write_goodfire, GOODFIRE, "goodfire"),
        (write_goodfire, "Llama-3.3-70B-Instruct-SAE-l19.pt", "goodfire"),
        (write_qresearch, "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "qresearch"),
    ],
)
def test_two_linear_layers_are_a_relu_of_the_raw_input(write, name, format_name, tmp_path):
    t, x = random_sae(), random_tokens()
    source = write(tmp_path / name, t)
    expected = relu(x.astype(np.float64) @ t["W_enc"] + t["b_enc"])
    np.testing.assert_allclose(encoded(source, x), expected, rtol=1e-5, atol=1e-5)
    assert_decoder(source, t)
    facts = sae_facts(source)
    assert facts == SaeFacts(
        D_IN, D_SAE, "relu", format_name, advertised_l0=None, hook_hint="model.layers.19", center_input=False
    )
    assert facts.elementwise
    assert sae_facts(str(tmp_path)) == sae_facts(source)


def test_qwen_scope_is_a_topk_of_the_raw_input(tmp_path):
    t, x = random_sae(), random_tokens()
    source = write_qwen_scope(tmp_path / QWEN / "layer7.sae.pt", t)
    expected = largest(relu(x.astype(np.float64) @ t["W_enc"] + t["b_enc"]), 5)
    np.testing.assert_allclose(encoded(source, x), expected, rtol=1e-5, atol=1e-5)
    assert_decoder(source, t)
    facts = sae_facts(source)
    assert facts == SaeFacts(
        D_IN, D_SAE, "topk", "qwen_scope", advertised_l0=5.0, hook_hint="model.layers.7", center_input=False
    )
    assert not facts.elementwise
    assert sae_config(source)["k"] == 5


def test_a_negative_one_of_the_k_largest_is_no_feature_of_qwen_scope(tmp_path):
    t = {**random_sae(), "b_enc": np.full(D_SAE, -100, np.float32)}
    t["b_enc"][3] = 100
    source = write_qwen_scope(tmp_path / QWEN / "layer7.sae.pt", t)
    assert [list(row.nonzero()[0]) for row in encoded(source, random_tokens(2))] == [[3], [3]]


@pytest.mark.parametrize(
    ("folder", "k"), [("SAE-Res-Qwen3-8B-Base-W64K-L0_4", 4), ("SAE-W64K-L0_9/SAE-W64K-L0_4/copy", 4), ("L0_4", 4)]
)
def test_k_of_qwen_scope_stands_in_the_path(folder, k, tmp_path):
    assert sae_config(write_qwen_scope(tmp_path / folder / "layer0.sae.pt", random_sae()))["k"] == k


def test_a_qwen_scope_without_k_or_with_too_many_is_refused(tmp_path):
    assert refusal(write_qwen_scope(tmp_path / "qwen/layer0.sae.pt", random_sae())).endswith(
        "a TopK whose k no file says; Qwen writes it in the repository's name, so put layer0.sae.pt in a folder of "
        "that name, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50"
    )
    assert "k is 50, of 24 features" in refusal(write_qwen_scope(tmp_path / "W64K-L0_50/layer0.sae.pt", random_sae()))


def test_an_attention_sae_of_gpt2_reads_what_the_projection_reads(tmp_path):
    t, x = random_sae(), random_tokens()
    source = write_connor_rob(tmp_path / HOOK_Z, t)
    expected = relu((x.astype(np.float64) - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    np.testing.assert_allclose(encoded(source, x), expected, rtol=1e-5, atol=1e-5)
    assert_decoder(source, t)
    facts = sae_facts(source)
    assert facts == SaeFacts(
        D_IN,
        D_SAE,
        "relu",
        "connor_rob",
        advertised_l0=None,
        hook_hint="transformer.h.5.attn.c_proj:input",
        center_input=False,
    )
    assert facts.elementwise


def test_an_attention_sae_needs_the_configuration_of_its_own_name(tmp_path):
    source = write_connor_rob(tmp_path / HOOK_Z, random_sae(), dict_size=99)
    assert "config says dict_size 99, the weights have 24" in refusal(source)
    (tmp_path / HOOK_Z.replace(".pt", "_cfg.json")).rename(tmp_path / "other_cfg.json")
    assert "*_cfg.json is missing beside the weights" in refusal(source)


def test_of_several_files_one_must_be_named(tmp_path):
    first, second = (write_qwen_scope(tmp_path / QWEN / f"layer{n}.sae.pt", random_sae(n)) for n in (0, 1))
    assert "layer0.sae.pt, layer1.sae.pt may each be an SAE; name one of these files" in refusal(str(tmp_path / QWEN))
    assert sae_facts(second).hook_hint == "model.layers.1"
    Path(first).unlink()
    assert sae_facts(str(tmp_path / QWEN)).hook_hint == "model.layers.1"


def test_a_file_of_a_fixed_name_comes_before_those_of_any_name(tmp_path):
    """What lies beside an SAE (an optimiser's state, say) is not even opened."""
    source = write_dictionary(tmp_path, random_sae(), "AutoEncoder")
    write_goodfire(tmp_path / GOODFIRE, random_sae())
    (tmp_path / "optimizer.pt").write_bytes(b"no tensors")
    assert sae_facts(source).format == "dictionary_learning"
    assert sae_facts(f"{source}/{GOODFIRE}").format == "goodfire"


def test_a_dictionary_under_another_name_is_not_taken_for_an_sae_of_equal_shape(tmp_path):
    """Its encoder subtracts a bias, or it is a TopK; qresearch's of the same names does and is neither."""
    for dict_class in ("AutoEncoder", "AutoEncoderTopK", "JumpReluAutoEncoder"):
        torch.save(dictionary_state(dict_class, random_sae()), tmp_path / "sae.pt")
        message = refusal(str(tmp_path / "sae.pt"))
        assert "sae.pt is not as Goodfire or qresearch R1 Distill or Connor & Rob" in message


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has the files under tmp_path/owner/repo; the list says what was asked for."""
    asked = []

    def download(repo: str, name: str, revision: str | None = None) -> str:
        asked.append(name)
        if not (tmp_path / repo / name).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        return str(tmp_path / repo / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_on_the_hub_a_file_without_a_fixed_name_is_named(hub, tmp_path):
    write_qwen_scope(tmp_path / QWEN / "layer7.sae.pt", random_sae())
    facts = sae_facts(f"{QWEN}/layer7.sae.pt")
    assert (facts.advertised_l0, facts.hook_hint) == (5.0, "model.layers.7")
    assert hub[0] == "layer7.sae.pt"
    with pytest.raises(SaeError, match=r"has no SAE in ''; accepted: .* where such a name has a \*, name the file"):
        sae_facts(QWEN)
    assert not any("*" in name for name in hub)


def test_on_the_hub_a_configuration_is_found_by_the_name_of_the_weights(hub, tmp_path):
    write_connor_rob(tmp_path / "me/saes/gpt2" / HOOK_Z, random_sae())
    assert sae_facts(f"me/saes/gpt2/{HOOK_Z}").hook_hint == "transformer.h.5.attn.c_proj:input"
    assert f"gpt2/{HOOK_Z.removesuffix('.pt')}_cfg.json" in hub


def test_on_the_hub_a_dictionary_is_a_folder(hub, tmp_path):
    write_dictionary(tmp_path / "me/saes/resid_post_layer_3/trainer_1", random_sae(), "BatchTopKSAE", k=4, layer=3)
    assert sae_facts("me/saes/resid_post_layer_3/trainer_1").hook_hint == "model.layers.3"


def saved(path: Path, contents: object, **options: Any) -> Weights:
    torch.save(contents, path, **options)
    return Weights("mine", path)


@pytest.mark.parametrize("name", ["sae.pt", "sae.pth"])
def test_tensors_of_every_float_type_are_read_as_float32(name, tmp_path):
    """Views of one storage, strided, and parameters that ask for gradients, too."""
    a = torch.randn(4, 3)
    tensors = {
        "float64": a.double(),
        "float16": a.half(),
        "bfloat16": a.bfloat16(),
        "turned": a.T,
        "part": a[1:3, :2],
        "parameter": nn.Parameter(a),
        "scalar": torch.tensor(0.5),
    }
    weights = saved(tmp_path / name, {**tensors, "step": 3, "k": torch.tensor(3)})
    assert weights.shapes == {"k": (), **{name: tuple(tensor.shape) for name, tensor in tensors.items()}}
    for name, tensor in tensors.items():
        assert weights.read(name).dtype == np.float32
        np.testing.assert_array_equal(weights.read(name), tensor.detach().float().numpy())
    with pytest.raises(SaeError, match=r"k in .*sae\.pth? cannot be read \(dtype torch.int64, expected a float\)"):
        weights.read("k")


def test_what_is_read_is_no_map_of_the_file(tmp_path):
    weights = saved(tmp_path / "sae.pt", {"a": torch.ones(3)})
    values = weights.read("a")
    torch.save({"a": torch.zeros(3)}, tmp_path / "sae.pt")
    np.testing.assert_array_equal(values, np.ones(3))


class Malice:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


def test_code_in_a_pickle_is_named_and_not_run(tmp_path):
    source = write_dictionary(tmp_path, random_sae(), "AutoEncoder")
    torch.save({"encoder.weight": Malice(tmp_path / "harmed")}, tmp_path / "ae.pt")
    assert refusal(source).endswith(
        "ae.pt asks for posix.mkdir, and nothing in it but tensors is loaded; where you trust it, load it once and "
        "torch.save the state_dict alone"
    )
    assert not (tmp_path / "harmed").exists()


def test_a_whole_module_is_refused_with_what_to_do(tmp_path):
    source = write_dictionary(tmp_path, random_sae(), "AutoEncoder")
    torch.save(nn.Linear(3, 4), tmp_path / "ae.pt")
    assert "asks for torch.nn.modules.linear.Linear" in refusal(source)


@pytest.mark.parametrize("contents", [torch.ones(3), [torch.ones(3)], 3])
def test_tensors_without_names_are_refused(contents, tmp_path):
    source = write_dictionary(tmp_path, random_sae(), "AutoEncoder")
    torch.save(contents, tmp_path / "ae.pt")
    assert f"it holds a {type(contents).__name__}, not tensors by name" in refusal(source)


def test_a_training_checkpoint_around_the_tensors_is_not_the_sae(tmp_path):
    """dictionary_learning writes backups so, under the name of the SAE."""
    source = write_dictionary(tmp_path, random_sae(), "AutoEncoder")
    torch.save({"step": 7, "ae": dictionary_state("AutoEncoder", random_sae())}, tmp_path / "ae.pt")
    assert refusal(source).endswith("ae.pt is not as dictionary_learning writes it; found nothing")


def test_a_cut_file_or_a_git_lfs_pointer_is_refused(tmp_path):
    source = write_dictionary(tmp_path, random_sae(), "AutoEncoder")
    path = tmp_path / "ae.pt"
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:5],
        whole[: len(whole) // 2],
        whole[:-1],
        b"version https://git-lfs.github.com/spec/v1\n",
    ):
        path.write_bytes(damaged)
        assert "cannot be read" in refusal(source)


def test_a_file_of_an_old_torch_is_refused_by_name(tmp_path):
    source = write_dictionary(tmp_path, random_sae(), "AutoEncoder")
    state = dictionary_state("AutoEncoder", random_sae())
    torch.save(state, tmp_path / "ae.pt", _use_new_zipfile_serialization=False)
    assert "no zip archive, as torch.save has written since torch 1.6" in refusal(source)


def rewritten(path: Path, **changed: bytes) -> None:
    """The same archive with other contents under some names, in the order and the packing of torch."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, changed.get(name.rpartition("/")[2].partition(".")[0], content))


def pickled(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def test_every_damaged_byte_of_a_pickle_is_read_or_refused_in_one_line(tmp_path):
    path = tmp_path / "sae.pt"
    torch.save({"W": torch.ones(4, 3), "b": torch.zeros(4)}, path)
    whole = pickled(path)
    refused = []
    for at in range(len(whole)):
        rewritten(path, data=whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            weights = Weights("mine", path)
            for name in weights.shapes:
                weights.read(name)
        except SaeError as error:
            refused.append(str(error))
    assert len(whole) / 2 < len(refused) < len(whole)
    assert not any("\n" in message for message in refused)


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    path = tmp_path / "sae.pt"
    torch.save({"b": torch.zeros(100)}, path)
    claim = b"J" + (10**9).to_bytes(4, "little")
    assert pickled(path).count(b"Kd") == 2
    rewritten(path, data=pickled(path).replace(b"Kd", claim))
    with pytest.raises(SaeError, match="cannot be read"):
        Weights("mine", path)


def test_one_number_repeated_by_strides_is_refused_before_it_is_read(tmp_path):
    weights = saved(tmp_path / "sae.pt", {"W": torch.zeros(1).expand(10**5, 10**5)})
    with pytest.raises(SaeError, match=r"W in .* claims 40000000000 bytes, the file holds 4 for it"):
        weights.read("W")


def test_compressed_members_are_refused(tmp_path):
    """torch would map the compressed bytes and take them for numbers."""
    path = tmp_path / "sae.pt"
    torch.save({"b": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(SaeError, match="its members are compressed"):
        Weights("mine", path)


def test_values_that_are_not_finite_are_refused(tmp_path):
    t = random_sae()
    t["W_enc"][2, 3] = np.inf
    source = write_dictionary(tmp_path, t, "AutoEncoder")
    assert "encoder.weight in" in refusal(source, weights=True)
    assert "not finite" in refusal(source, weights=True)


def test_the_digest_is_of_the_bytes(tmp_path):
    source = write_dictionary(tmp_path, random_sae(), "AutoEncoder")
    before = sae_weights_digest(source)
    torch.save(dictionary_state("AutoEncoder", random_sae(1)), tmp_path / "ae.pt")
    assert len(before) == 64
    assert sae_weights_digest(source) != before
