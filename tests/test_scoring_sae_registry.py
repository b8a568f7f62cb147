"""An SAE of SAELens' registry is loaded by that library, once, and then read from disk; here by a stand-in of it."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_saes import random_sae, write_saelens

from fpo.errors import SaeError
from fpo.scoring.sae import read_sae, sae_facts

SOURCE = "sae_lens:gemma/layer_20/canonical"


class StandIn:
    """SAELens' SAE class and its registry, of one release."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, str]] = []
        self.cfg = SimpleNamespace(metadata=SimpleNamespace())
        self.before_rename = lambda: None

    def from_pretrained(self, release: str, sae_id: str) -> StandIn:
        self.loaded.append((release, sae_id))
        if release not in self.directory():
            raise ValueError(f"Release {release} not found.\nSee the list")
        return self

    def directory(self) -> dict[str, Any]:
        return {"gemma": SimpleNamespace(expected_l0={"layer_20/canonical": 71.0})}

    def parameters(self) -> list[Any]:
        return []

    def save_model(self, path: Path) -> None:
        write_saelens(path, random_sae(), "jumprelu", metadata={"l0": self.cfg.metadata.l0})
        self.before_rename()


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    library = StandIn()
    directory = SimpleNamespace(get_pretrained_saes_directory=library.directory)
    monkeypatch.setitem(sys.modules, "sae_lens", SimpleNamespace(SAE=library))
    monkeypatch.setitem(sys.modules, "sae_lens.loading", ModuleType("sae_lens.loading"))
    monkeypatch.setitem(sys.modules, "sae_lens.loading.pretrained_saes_directory", directory)
    monkeypatch.setattr(metadata, "version", lambda name: {"sae-lens": "6.0"}[name])
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    return library


def test_it_is_loaded_once_for_each_version_of_the_library(library, tmp_path, monkeypatch):
    facts = sae_facts(SOURCE)
    assert (facts.format, facts.architecture, facts.advertised_l0) == ("saelens", "jumprelu", 71.0)
    np.testing.assert_array_equal(read_sae(SOURCE).W, random_sae()["W_enc"])
    assert library.loaded == [("gemma", "layer_20/canonical")]
    kept = tmp_path / "sae_lens/6.0"
    assert [path.name for path in kept.iterdir()] == ["gemma--layer_20--canonical"]
    monkeypatch.setattr(metadata, "version", lambda name: "6.1")
    sae_facts(SOURCE)
    assert len(library.loaded) == 2


def test_another_process_may_have_written_it_meanwhile(library, tmp_path):
    kept = tmp_path / "sae_lens/6.0/gemma--layer_20--canonical"
    library.before_rename = lambda: write_saelens(kept, random_sae(5), "jumprelu", metadata={})
    np.testing.assert_array_equal(read_sae(SOURCE).W, random_sae(5)["W_enc"])
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_a_name_that_the_library_does_not_know_is_refused_in_one_line(library, tmp_path):
    with pytest.raises(SaeError) as error:
        sae_facts("sae_lens:lama/layer_20")
    assert str(error.value) == (
        "SAE sae_lens:lama/layer_20: sae-lens cannot load it (ValueError: Release lama not found.)"
    )
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(SaeError, match=r"/layer_20/canonical: needs SAELens itself: pip install sae-lens"):
        sae_facts(SOURCE)
