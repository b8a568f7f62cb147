"""A source is read as the one format that claims its contents; a new format is one class in the registry."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_saes import (
    D_IN,
    D_SAE,
    Tensors,
    random_sae,
    random_tokens,
    refusal,
    write_gemma_scope,
    write_gemma_scope_2,
    write_llama_scope,
    write_llama_scope_r1,
    write_openmoss,
    write_saelens,
    write_sparsify,
)

from fpo.errors import SaeError
from fpo.scoring.sae import formats as registry
from fpo.scoring.sae import (
    load_sae,
    read_decoder,
    sae_config,
    sae_facts,
    sae_weight_files,
    sae_weights_digest,
)
from fpo.scoring.sae.arrays import Decoder, SaeArrays, SaeFacts, SaeHeader
from fpo.scoring.sae.format import Format, SaeFiles, check_config_sizes, decoder_of
from fpo.scoring.sae.page import formats_page

WRITERS = {
    "gemma_scope": write_gemma_scope,
    "gemma_scope_2": write_gemma_scope_2,
    "saelens": lambda folder, t: write_saelens(folder, t, "jumprelu", metadata={}),
    "sparsify": write_sparsify,
    "openmoss": lambda folder, t: write_openmoss(folder, t, "jumprelu"),
    "llama_scope": write_llama_scope,
    "llama_scope_r1": write_llama_scope_r1,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_claims_what_it_writes(name, tmp_path):
    source = WRITERS[name](tmp_path, random_sae())
    assert sae_facts(source).format == name
    assert sae_config(source)["format"] == name


def test_a_name_alone_is_no_format(tmp_path):
    """Half of a sparsify SAE under SAELens' name, and somebody's array under Gemma Scope's."""
    (tmp_path / "a").mkdir()
    save_file({"encoder.weight": np.ones((D_SAE, D_IN), np.float32)}, tmp_path / "a/sae_weights.safetensors")
    names = "SAELens or OpenMOSS or Llama Scope R1-Distill"
    assert refusal(str(tmp_path / "a")).endswith(
        f"sae_weights.safetensors is not as {names} writes it; found encoder.weight (24, 6)"
    )
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b/params.npz", kernel=np.ones(3))
    assert refusal(str(tmp_path / "b")).endswith("params.npz is not as Gemma Scope writes it; found kernel (3,)")


def test_weights_that_another_library_names_alike_are_not_sparsify(tmp_path):
    """dictionary_learning and Llama Scope write encoder.weight too, beside decoder.weight."""
    source = write_sparsify(tmp_path, random_sae())
    ones = np.ones((D_SAE, D_IN), np.float32)
    save_file({"encoder.weight": ones, "decoder.weight": ones.T.copy()}, tmp_path / "sae.safetensors")
    assert "sae.safetensors is not as sparsify writes it" in refusal(source)


def test_a_stranger_beside_an_sae_is_no_second_format(tmp_path):
    source = write_saelens(tmp_path, random_sae(), "standard", metadata={})
    np.savez(tmp_path / "params.npz", kernel=np.ones(3))
    assert sae_facts(source).format == "saelens"


class Scaled(Format):
    """kernel and bias of an input scaled by a factor from the configuration."""

    name = "scaled"
    title = "Scaled"
    weights = "sae_weights.safetensors"
    config = "config.json"
    needs_config = True
    refuses: ClassVar = {"act_fn": "supported: relu"}

    def claims(self, files: SaeFiles) -> bool:
        return "kernel" in files.tensors.shapes

    def facts(self, files: SaeFiles) -> SaeHeader:
        if (act_fn := files.config["act_fn"]) != "relu":
            raise self.refuse(files, "act_fn", act_fn)
        d_in, d_sae = files.matrix("kernel")
        check_config_sizes(files, d_in, d_sae)
        files.check_shapes({"bias": (d_sae,)})
        facts = SaeFacts(d_in, d_sae, "relu", self.name, None, None, False)
        return SaeHeader(facts, options={"scale": repr(files.config["scale"])})

    def read(self, files: SaeFiles) -> SaeArrays:
        W = files.tensors.read("kernel") * np.float32(files.config["scale"])
        return self.facts(files).arrays(W, files.tensors.read("bias"))

    def read_decoder(self, files: SaeFiles) -> Decoder:
        return decoder_of(files, self.facts(files).facts, "back", "offset")


def write_scaled(folder: Path, t: Tensors, act_fn: str = "relu") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"kernel": t["W_enc"], "bias": t["b_enc"], "back": t["W_dec"], "offset": t["b_dec"]}
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps({"act_fn": act_fn, "scale": 2.0, "d_sae": D_SAE}))
    return str(folder)


@pytest.fixture
def with_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FORMATS", (*registry.FORMATS, Scaled()))


@pytest.mark.usefixtures("with_scaled")
def test_a_new_format_is_one_class_in_the_registry(tmp_path):
    """Its weights have SAELens' file name, so the contents decide. f = relu(2 x @ kernel + bias)."""
    t, x = random_sae(), random_tokens()
    source = write_scaled(tmp_path / "new", t)
    assert sae_facts(source).format == sae_config(source)["format"] == "scaled"
    expected = np.maximum(2 * x.astype(np.float64) @ t["W_enc"] + t["b_enc"], 0)
    np.testing.assert_allclose(load_sae(source).encode(torch.from_numpy(x)).numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(read_decoder(source)[0], t["W_dec"])
    assert sae_config(source)["scale"] == "2.0"
    assert sae_facts(WRITERS["saelens"](tmp_path / "old", t)).format == "saelens"
    assert "act_fn gelu is not supported: supported: relu" in refusal(write_scaled(tmp_path / "gelu", t, "gelu"))
    (tmp_path / "empty").mkdir()
    assert ", Scaled (config.json, sae_weights.safetensors)" in refusal(str(tmp_path / "empty"))
    (tmp_path / "new/config.json").unlink()
    assert "config.json is missing beside the weights" in refusal(source)


@pytest.mark.usefixtures("with_scaled")
def test_one_file_that_two_formats_claim_is_refused(tmp_path):
    source = write_saelens(tmp_path, random_sae(), "standard", metadata={})
    t = random_sae()
    save_file({"W_enc": t["W_enc"], "kernel": t["W_enc"]}, tmp_path / "sae_weights.safetensors")
    assert refusal(source).endswith(
        "holds sae_weights.safetensors, which SAELens and Scaled claim; keep one format per folder"
    )


@pytest.mark.usefixtures("with_scaled")
def test_a_file_deeper_in_the_folder_belongs_to_the_folder_of_its_configuration(tmp_path, monkeypatch):
    """Llama Scope's checkpoints/final.safetensors stands below its hyperparams.json."""
    monkeypatch.setattr(Scaled, "weights", "checkpoints/final.safetensors")
    source = Path(write_scaled(tmp_path, random_sae()))
    (source / "checkpoints").mkdir()
    (source / "sae_weights.safetensors").rename(source / "checkpoints/final.safetensors")
    assert sae_facts(str(source)) == sae_facts(str(source / "checkpoints/final.safetensors"))


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("W_enc.npy", npy("-" * 9000 + "1")),
        ("W_enc.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (6, 10000000000)}")),
        ("W_enc.npy", b""),
    ],
    ids=["nested", "larger than the file", "empty"],
)
def test_an_npz_that_is_made_to_harm_is_refused(member, content, tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr(member, content)
    assert "cannot be read" in refusal(str(tmp_path))


def test_a_member_that_is_no_npy_is_refused_where_it_is_read(tmp_path):
    """np.savez names its members W_enc.npy; a zip of the same bytes may say W_enc."""
    t = random_sae()
    written = Path(write_gemma_scope(tmp_path / "a", t)) / "params.npz"
    (tmp_path / "b").mkdir()
    with zipfile.ZipFile(written) as whole, zipfile.ZipFile(tmp_path / "b/params.npz", "w") as renamed:
        for name in whole.namelist():
            renamed.writestr(name.removesuffix(".npy"), whole.read(name))
    with pytest.raises(SaeError, match=r"W_enc in .* cannot be read"):
        load_sae(str(tmp_path / "b"))


def test_the_digest_of_the_weights_is_of_tensors_or_of_bytes(tmp_path):
    """Metadata in the header is no tensor; an .npz has no such digest, so its bytes count."""
    t = random_sae()
    one, other = write_sparsify(tmp_path / "a", t), write_sparsify(tmp_path / "b", t)
    (path,) = sae_weight_files(other)
    save_file(load_file(path), path, metadata={"made": "today"})
    assert path.read_bytes() != sae_weight_files(one)[0].read_bytes()
    assert sae_weights_digest(one) == sae_weights_digest(other)
    npz = write_gemma_scope(tmp_path / "c", t)
    assert sae_weights_digest(npz) == hashlib.sha256((tmp_path / "c/params.npz").read_bytes()).hexdigest()


def test_the_page_of_formats_is_the_one_in_docs():
    page = (Path(__file__).parents[1] / "docs/saes.md").read_text()
    assert page == formats_page(), "run `make docs`"
    assert all(why in page for known in registry.FORMATS for why in known.refuses.values())


def test_names_in_cache_keys_are_each_ones_own():
    names = [known.name for known in registry.FORMATS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
