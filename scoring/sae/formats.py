"""
Which format a source has, and what is asked of an SAE whatever its format. A format is recognised by the names of its
files and claims what it recognises by their contents; a source that none or several of them claim is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fpo.errors import SaeError
from fpo.scoring.sae.arrays import Decoder, SaeArrays, SaeFacts
from fpo.scoring.sae.connor_rob import ConnorRob
from fpo.scoring.sae.dictionary_learning import DictionaryLearning
from fpo.scoring.sae.files import accepted, find_files
from fpo.scoring.sae.format import Format, SaeFiles
from fpo.scoring.sae.gemma_scope import GemmaScope
from fpo.scoring.sae.gemma_scope_2 import GemmaScope2
from fpo.scoring.sae.goodfire import Goodfire
from fpo.scoring.sae.llama_scope import LlamaScope
from fpo.scoring.sae.llama_scope_r1 import LlamaScopeR1
from fpo.scoring.sae.openmoss import OpenMoss
from fpo.scoring.sae.qresearch import Qresearch
from fpo.scoring.sae.qwen_scope import QwenScope
from fpo.scoring.sae.saelens import SaeLens
from fpo.scoring.sae.saelens_registry import on_disk
from fpo.scoring.sae.sparsify import Sparsify
from fpo.scoring.weights import file_digest, weights_digest

FORMATS: tuple[Format, ...] = (
    GemmaScope(),
    GemmaScope2(),
    SaeLens(),
    Sparsify(),
    DictionaryLearning(),
    QwenScope(),
    Goodfire(),
    Qresearch(),
    ConnorRob(),
    OpenMoss(),
    LlamaScope(),
    LlamaScopeR1(),
)
"""In the order in which a hub repository is asked for their files."""


def sae_facts(source: str, hookpoint: str | None = None) -> SaeFacts:
    """
    Facts from headers and configuration alone. A hub source is downloaded first, where it is not cached.

    `source` is a local folder or weights file, `owner/repo[@revision][/folder]` on the hub, or `sae_lens:RELEASE/ID`;
    `hookpoint` chooses in a folder that holds one SAE per hookpoint. Raises SaeError for what is missing or
    unsupported.
    """
    known, files = _recognise(source, hookpoint)
    return known.facts(files).facts


def sae_config(source: str, hookpoint: str | None = None) -> dict[str, Any]:
    """What, beside the weights, decides the activations: strings, integers and booleans, ready for JSON."""
    known, files = _recognise(source, hookpoint)
    return known.facts(files).config


def sae_weight_files(source: str, hookpoint: str | None = None) -> list[Path]:
    """The files whose bytes are the weights, for digests."""
    return [_recognise(source, hookpoint)[1].weights]


def sae_weights_digest(source: str, hookpoint: str | None = None) -> str:
    """Digest of the weights: of the tensors in safetensors, of the file's bytes in any other container."""
    files = sae_weight_files(source, hookpoint)
    return weights_digest(files) if files[0].suffix == ".safetensors" else file_digest(files[0])


def read_sae(source: str, hookpoint: str | None = None) -> SaeArrays:
    """The canonical encoder of `source` (as for sae_facts), float32. The decoder stays on disk."""
    known, files = _recognise(source, hookpoint)
    return known.read(files)


def read_decoder(source: str, hookpoint: str | None = None) -> Decoder:
    """The decoder, float32."""
    known, files = _recognise(source, hookpoint)
    return known.read_decoder(files)


def _recognise(source: str, hookpoint: str | None) -> tuple[Format, SaeFiles]:
    """The one format that claims the source, and its files."""
    found = find_files(on_disk(source), hookpoint, FORMATS)
    claimed = [(known, files) for known, files in found if known.claims(files)]
    if not claimed:
        raise _unclaimed(found)
    if len(claimed) > 1:
        raise _claimed_twice(claimed)
    known, files = claimed[0]
    if known.needs_config and files.config_path is None:
        raise SaeError(f"SAE {source}: {known.config} is missing beside the weights; {accepted(FORMATS)}")
    return known, files


def _unclaimed(found: list[tuple[Format, SaeFiles]]) -> SaeError:
    files = found[0][1]
    names = " or ".join(known.title for known, _ in found)
    return SaeError(f"SAE {files.source}: {files.weights.name} is not as {names} writes it; found {files.listing()}")


def _claimed_twice(claimed: list[tuple[Format, SaeFiles]]) -> SaeError:
    names = " and ".join(dict.fromkeys(files.weights.name for _, files in claimed))
    titles = " and ".join(known.title for known, _ in claimed)
    return SaeError(f"SAE {claimed[0][1].source}: holds {names}, which {titles} claim; keep one format per folder")
