"""Where a model's files are, and how it is loaded. Reference and policy come through the same door."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from errors import DataError, ModelError
from recipe import nearest
from scoring.families import refuse_unless_causal, silence_dropout

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


def adapter_folder(name: str) -> Path:
    """Folder with the files of a PEFT adapter: `name` itself, or the hub id's snapshot. Raises ModelError."""
    folder = Path(name) if Path(name).is_dir() else _snapshot(name, None)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"adapter {name}: it has no adapter_config.json")
    return folder


def load_model(folder: Path, dtype: str, adapters: Sequence[Path] = ()) -> PreTrainedModel:
    """
    A causal language model in `dtype` with dropout off, its adapters merged into the weights one after the other.

    Attention is what transformers picks for the family (sdpa, or eager where the family soft-caps its
    attention): both accept the packed mask. Raises ModelError.
    """
    try:
        refuse_unless_causal(AutoConfig.from_pretrained(folder))
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: {str(error).strip().splitlines()[0]}") from None
    # transformers makes up at random what the files lack, with no more than a log line.
    if absent := sorted(loading["missing_keys"]):
        raise ModelError(f"{folder}: its files lack {len(absent)} of the model's tensors, the first is {absent[0]}")
    for adapter in adapters:
        model = _merge_adapter(model, adapter)
    silence_dropout(model)
    assert isinstance(model, PreTrainedModel)
    # A merged adapter leaves every parameter frozen.
    return model.requires_grad_(True).eval()


def _merge_adapter(model: Any, adapter: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError(f"{adapter}: adapters need peft: pip install 'fpo[lora]'") from None
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def load_tokenizer(name: str, revision: str | None, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the hub; `chat_template`, a file or a Jinja text, replaces its own. ModelError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"tokenizer {name}: {str(error).strip().splitlines()[0]}") from None
    if chat_template is not None:
        tokenizer.chat_template = template_text(chat_template)
    return tokenizer


def template_text(chat_template: str) -> str:
    """A chat template given as its text, or as the path of a file that holds it. Raises DataError."""
    if "{" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise DataError(
            f"chat template {chat_template!r}: no such file{f', nearest is {near}' if near else ''}; "
            "give a Jinja template or the path of one"
        )
    return path.read_text(encoding="utf-8")
