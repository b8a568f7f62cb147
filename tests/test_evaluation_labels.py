"""Names of features from Neuronpedia's exports, and where an SAE of the hub stands in SAELens' table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fpo.errors import CacheError, FpoError
from fpo.evaluation import labels
from fpo.evaluation.labels import Label, Names, Pretrained, feature_names, is_source, pretrained, read_labels
from fpo.store.remote.bucket import BucketFolder

SOURCE = "gemma-2-2b/20-gemmascope-res-16k"


def row(index: int, text: str, method: str = "oai_token-act-pair", model: str = "gpt-4o-mini") -> str:
    """A line as the export has it: the index is text, most of the bytes are the embedding."""
    facts = {"id": "x", "modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": str(index)}
    return json.dumps(
        {**facts, "description": text, "embedding": [0.5] * 4, "typeName": method, "explanationModelName": model}
    )


def write_export(folder: Path) -> None:
    """13 features in two batches, sorted by their index as text: 0 1 10 11 12 | 2 3 ... 9; two names for feature 2."""
    order = sorted(range(13), key=str)
    folder.mkdir(parents=True)
    for n, part in enumerate((order[:5], order[5:])):
        lines = [row(index, f"about {index}") for index in part]
        lines += [row(2, "another word for 2", "np_max-act", "claude")] if 2 in part else []
        (folder / f"batch-{n}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


def test_an_export_is_read_whole_whatever_its_order(tmp_path: Path) -> None:
    write_export(tmp_path / "explanations")
    found = read_labels(str(tmp_path / "explanations"))
    assert {index: label.text for index, label in found.items()} == {index: f"about {index}" for index in range(13)}
    assert found[2] == Label("about 2", "oai_token-act-pair gpt-4o-mini")  # that of the method that names most


def test_a_single_file_is_an_export_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(row(7, "seven\n of  them") + "\n\n", encoding="utf-8")
    assert read_labels(str(path))[7].text == "seven of them"


def test_the_bucket_is_read_once_and_then_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code over a local folder in the bucket's place, which is gone when the second call asks."""
    write_export(tmp_path / "explanations")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memo"))
    asked: list[str] = []

    def exported(source: str) -> BucketFolder:
        asked.append(source)
        return labels._folder(tmp_path / "explanations")

    monkeypatch.setattr(labels, "_exported", exported)
    first = read_labels(SOURCE)
    assert read_labels(SOURCE) == first == read_labels(str(tmp_path / "explanations"))
    assert asked == [SOURCE]


def test_the_bucket_is_asked_without_credentials() -> None:
    place = labels._exported(SOURCE)
    assert place.where("batch-0.jsonl.gz") == f"s3://neuronpedia-datasets/v1/{SOURCE}/explanations/batch-0.jsonl.gz"
    assert place._store.config["skip_signature"] == "true"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{}", "line 1: no explanation of a feature"),
        (b'{"index": "one", "description": "x"}', "line 1: no explanation of a feature"),
        (b"[1]\n", "line 1: no explanation of a feature"),
        (b"not json", "line 1: no explanation of a feature"),
    ],
)
def test_what_is_no_export_is_refused_by_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(FpoError, match=said):
        read_labels(str(path))


def test_a_broken_archive_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "batch-0.jsonl.gz").write_bytes(gzip.compress(b"{}" * 999)[:20])
    with pytest.raises(FpoError, match="cannot be unpacked"):
        read_labels(str(tmp_path))
    (tmp_path / "batch-0.jsonl.gz").unlink()
    with pytest.raises(FpoError, match="holds no explanations"):
        read_labels(str(tmp_path))
    with pytest.raises(FpoError, match="no file or folder here"):
        read_labels(str(tmp_path / "elsewhere"))


TABLE = """
gemma-scope-2b-pt-res:
  repo_id: google/gemma-scope-2b-pt-res
  saes:
  - {id: layer_20/width_16k/average_l0_71, path: layer_20/width_16k/average_l0_71, l0: 71}
  - {id: layer_25/width_16k/average_l0_55, path: layer_25/width_16k/average_l0_55}
gemma-scope-2b-pt-res-canonical:
  repo_id: google/gemma-scope-2b-pt-res
  saes:
  - id: layer_20/width_16k/canonical
    path: layer_20/width_16k/average_l0_71
    neuronpedia: gemma-2-2b/20-gemmascope-res-16k
"""


def test_an_sae_of_the_hub_is_found_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files under two releases: the one that Neuronpedia shows."""
    (tmp_path / "pretrained_saes.yaml").write_text(TABLE, encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memo"))
    monkeypatch.setattr(labels, "_saelens_table", lambda: tmp_path / "pretrained_saes.yaml")
    layer_20 = Pretrained("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical", SOURCE)
    assert pretrained("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71") == layer_20
    assert pretrained("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz") == layer_20
    assert pretrained("sae_lens:gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical") == layer_20
    layer_25 = pretrained("google/gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55")
    assert layer_25 == Pretrained("gemma-scope-2b-pt-res", "layer_25/width_16k/average_l0_55", None)
    assert pretrained("demo-world/sae") is None


def test_without_saelens_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "_saelens_table", lambda: None)
    assert pretrained("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71") is None


def test_a_link_leads_to_the_feature() -> None:
    assert Names({}, SOURCE).link(12) == "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/12"
    assert is_source(SOURCE)
    assert not is_source("/absolute/folder")


def test_who_cannot_be_asked_leaves_features_without_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline, or without a table: a note in the place of names. A mistyped place is an error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memo"))
    monkeypatch.setattr(labels, "pretrained", lambda sae: Pretrained("r", "i", SOURCE) if sae == "known" else None)

    def unreachable(source: str) -> BucketFolder:
        raise CacheError("the bucket cannot be reached")

    monkeypatch.setattr(labels, "_exported", unreachable)
    assert feature_names(None, "mine") == Names({})
    assert feature_names(None, "known") == Names(
        {}, SOURCE, f"--labels neuronpedia names the features as {SOURCE} has them"
    )
    assert "no installed table" in str(feature_names("neuronpedia", "mine").note)
    assert feature_names("neuronpedia", "known") == Names(
        {}, SOURCE, "features have no names: the bucket cannot be reached"
    )
    with pytest.raises(FpoError, match="no file or folder here"):
        feature_names("./elsewhere", "known")
