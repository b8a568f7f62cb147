"""Where a model's files are, and how it is loaded. Reference and policy come through the same door."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, PreTrainedModel

from errors import ModelError
from recipe import nearest

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def model_folder(name: str, revision: str | None = None) -> Path:
    """
    Folder with the files of a model: `name` itself where it is a folder, else the hub id's snapshot
    (downloaded once, then found in the hub's cache). Raises ModelError.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: this folder has no config.json, so it is no model")
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = nearest(folder.name, siblings)
        hint = f"; nearest is {folder.parent / near}" if near else ""
        raise ModelError(f"{name}: no such folder, and not a hub id (owner/name){hint}")
    return _snapshot(name, revision)


@functools.cache
def _snapshot(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except LocalEntryNotFoundError:
        raise ModelError(f"{name}: neither a folder here nor in the hub's cache, and the hub is not reached") from None
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{name}: {str(error).strip().splitlines()[0]}") from None


def model_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands in the folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'}: not JSON ({error})") from None
    assert isinstance(config, dict)
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, sorted by name. Raises ModelError where there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder}: {missing[0]} is missing; {index.name} lists {len(names)} files")
        return [folder / name for name in names]
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    raise ModelError(
        f"{folder}: no model.safetensors; save the model again with save_pretrained to get safetensors weights"
    )


def load_model(folder: Path, dtype: str, adapter: Path | None = None) -> PreTrainedModel:
    """
    A causal language model in `dtype` with dropout off, its adapter merged into the weights.

    Attention is what transformers picks for the family (sdpa, or eager where the family soft-caps its
    attention): both accept the packed mask. Raises ModelError.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{folder}: {str(error).strip().splitlines()[0]}") from None
    if adapter is not None:
        model = _merge_adapter(model, adapter)
    model.config.use_cache = False
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


def _merge_adapter(model: Any, adapter: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError(f"{adapter}: adapters need peft: pip install 'fpo[lora]'") from None
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()
