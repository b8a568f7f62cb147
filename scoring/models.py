"""Where a model's files are, and how it is loaded. Reference and policy come through the same door."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fpo.errors import DataError, ModelError
from fpo.nearest import nearest
from fpo.scoring.configs import model_config, one_line
from fpo.scoring.families import silence_dropout, text_decoder

# Everything but the weights, which go by the names that the index gives: beside them repositories hold the same
# tensors in other formats (consolidated.safetensors, original/), as large again.
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_OTHER_FORMATS = ["original/*", "onnx/*", "openvino/*"]
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
# Any of these makes a tokenizer; tokenizer_config.json alone does not.
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "*vocab*", "*.tiktoken", "merges.txt", "tekken.json", "*.bpe")


def model_folder(name: str, revision: str | None = None) -> Path:
    """
    Folder with the files of a model: `name` itself where it is a folder, else the hub id's snapshot
    (downloaded once, then found in the hub's cache). Raises ModelError.
    """
    folder = Path(name)
    if folder.is_dir():
        return _whole_model(name, folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = nearest(folder.name, siblings)
        hint = f"; nearest is {folder.parent / near}" if near else ""
        raise ModelError(f"{name}: no such folder, and not a hub id (owner/name){hint}")
    return _whole_model(name, _snapshot(name, revision))


def _whole_model(name: str, folder: Path) -> Path:
    """The folder, unless an adapter lies in it: transformers would merge that in silence, and the key not name it."""
    is_adapter = (folder / _ADAPTER_CONFIG).is_file()
    if not (folder / "config.json").is_file():
        hint = "; an adapter is named as reference.adapter" if is_adapter else ""
        raise ModelError(f"{name}: this folder has no config.json, so it is no model{hint}")
    if is_adapter:
        raise ModelError(
            f"{name}: an adapter ({_ADAPTER_CONFIG}) lies in the model's folder; move it to a folder of its own, "
            "and name that one as reference.adapter if it is meant"
        )
    return folder


@functools.cache
def _snapshot(name: str, revision: str | None) -> Path:
    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=_SMALL_FILES, ignore_patterns=_OTHER_FORMATS)
        )
        weights = _indexed_names(folder) if (folder / _INDEX).is_file() else [_SINGLE, _ADAPTER]
        # The commit that the first call found: a branch may move between the two.
        return Path(snapshot_download(name, revision=folder.name, allow_patterns=weights))
    except LocalEntryNotFoundError:
        raise ModelError(f"{name}: neither a folder here nor in the hub's cache, and the hub is not reached") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(f"{name}: {one_line(error)}") from None


def weight_files(folder: Path) -> list[Path]:
    """
    The safetensors files that transformers loads from a model's folder, sorted by name: model.safetensors, and only
    without it the files of the index. Raises ModelError where there are none or one is missing.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        raise ModelError(
            f"{folder}: no model.safetensors; save the model again with save_pretrained to get safetensors weights"
        )
    names = _indexed_names(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: {missing[0]} is missing; {_INDEX} lists {len(names)} files")
    return [folder / name for name in names]


def adapter_weight_files(folder: Path) -> list[Path]:
    """The safetensors file that PEFT loads from an adapter's folder. Raises ModelError where there is none."""
    if not (folder / _ADAPTER).is_file():
        raise ModelError(f"{folder}: no {_ADAPTER}; save the adapter again with save_pretrained")
    return [folder / _ADAPTER]


def _indexed_names(folder: Path) -> list[str]:
    """File names in a folder's weights index, sorted. Raises ModelError for anything but names inside the folder."""
    try:
        names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder / _INDEX}: no index of weights ({one_line(error)})") from None
    if not names or outside:
        raise ModelError(f"{folder / _INDEX}: it names {outside[0] if outside else 'no file'}; download it again")
    return names


def adapter_folder(name: str) -> Path:
    """Folder with the files of a PEFT adapter: `name` itself, or the hub id's snapshot. Raises ModelError."""
    folder = Path(name) if Path(name).is_dir() else _snapshot(name, None)
    if not (folder / _ADAPTER_CONFIG).is_file():
        raise ModelError(f"adapter {name}: it has no {_ADAPTER_CONFIG}")
    return folder


def load_model(folder: Path, dtype: str, adapters: Sequence[Path] = ()) -> PreTrainedModel:
    """
    A causal language model in `dtype` with dropout off, its adapters merged into the weights one after the other.

    Only what tokens pass through requires gradients: the decoder and the head, not the towers of a multimodal
    model, and nothing of a quantised one. Attention is what transformers picks for the family (sdpa, or eager where
    the family soft-caps its attention): both accept the packed mask. Raises ModelError.
    """
    model_config(folder)  # what is no causal language model is refused before any weights load
    weight_files(folder)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            # Listed below, by name and shapes; transformers would only say that there are some.
            ignore_mismatched_sizes=True,
        )
    except (ValueError, OSError, KeyError, RuntimeError, ImportError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder}: {one_line(error)}") from None
    if mismatched := sorted(loading["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise ModelError(
            f"{folder}: config.json does not fit the weights: {name} is {_shape(stored)} in the files, "
            f"{_shape(wanted)} by config.json ({len(mismatched)} such tensors)"
        )
    # transformers makes up at random what the files lack, with no more than a log line.
    if absent := sorted(loading["missing_keys"]):
        raise ModelError(f"{folder}: its files lack {len(absent)} of the model's tensors, the first is {absent[0]}")
    for adapter in adapters:
        model = _merge_adapter(model, adapter)
    silence_dropout(model)
    assert isinstance(model, PreTrainedModel)
    _require_gradients(model)
    return model.eval()


def is_quantised(model: nn.Module) -> bool:
    """Whether the weights are in a quantised format (bitsandbytes, GPTQ, fp8), which no optimiser can move."""
    return getattr(model, "hf_quantizer", None) is not None


def tower_modules(model: PreTrainedModel) -> list[str]:
    """Paths of the linear modules that no token passes through: those of a multimodal model's towers, projectors."""
    scored = {module for part in _scored_parts(model) for module in part.modules()}
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and module not in scored]


def _scored_parts(model: PreTrainedModel) -> list[nn.Module]:
    """What a text token passes through: the decoder and the head."""
    return [part for part in (text_decoder(model), model.get_output_embeddings()) if part is not None]


def _require_gradients(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    for part in [] if is_quantised(model) else _scored_parts(model):
        for parameter in part.parameters():
            # A merged adapter leaves every parameter frozen; integers have no gradient.
            parameter.requires_grad_(parameter.is_floating_point())


def _merge_adapter(model: Any, adapter: Path) -> Any:
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        raise ModelError(f"{adapter}: adapters need peft: pip install 'fpo[lora]'") from None
    (file,) = adapter_weight_files(adapter)
    try:
        with safe_open(file, framework="pt") as tensors:
            stored = set(tensors.keys())
        with warnings.catch_warnings():
            # "Found missing adapter keys": refused below.
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, adapter)
    except (ValueError, TypeError, OSError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"adapter {adapter} does not fit the model: {_first_mismatch(error)}") from None
    if adapted.active_peft_config.is_prompt_learning:
        raise ModelError(f"adapter {adapter}: a soft prompt is no change of weights; a reference has none")
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # Embeddings that were saved along go by the names of the model itself.
    if different := sorted((stored - adapted.state_dict().keys()) ^ wanted):
        where = "the model has no place for it" if different[0] in stored else "the adapter's file lacks it"
        raise ModelError(
            f"adapter {adapter} does not fit the model: {different[0]}: {where} ({len(different)} such tensors)"
        )
    try:
        return adapted.merge_and_unload()
    except (ValueError, NotImplementedError) as error:  # some quantised formats
        raise ModelError(f"adapter {adapter}: it cannot be merged into the model: {one_line(error)}") from None


def _first_mismatch(error: BaseException) -> str:
    """The first tensor among torch's size mismatches, of which it prints one line each; else the whole message."""
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch for" in line]
    more = f" ({len(lines)} such tensors)" if len(lines) > 1 else ""
    return lines[0].rstrip(".") + more if lines else one_line(error)


def load_tokenizer(name: str, revision: str | None, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the hub; `chat_template`, a file or a Jinja text, replaces its own. ModelError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # files of strangers, read by libraries without a common base class for complaints
        if "custom code" in str(error):
            raise ModelError(
                f"tokenizer {name}: it brings code of its own (auto_map), which is never run; "
                "set data.tokenizer to one that transformers knows"
            ) from None
        if Path(name).is_dir() and not any(any(Path(name).glob(pattern)) for pattern in _TOKENIZER_FILES):
            raise ModelError(
                f"tokenizer {name}: no tokenizer files there (tokenizer.json or its like); "
                "save the tokenizer beside the model, or set data.tokenizer"
            ) from None
        raise ModelError(f"tokenizer {name}: {one_line(error)}") from None
    if chat_template is not None:
        tokenizer.chat_template = template_text(chat_template)
    return tokenizer


def template_text(chat_template: str) -> str:
    """A chat template given as its text, or as the path of a file that holds it. Raises DataError."""
    if "{" in chat_template:
        return chat_template
    path = Path(chat_template)
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise DataError(
            f"data.chat_template: {chat_template!r}: no such file{f', nearest is {near}' if near else ''}; "
            "give a Jinja template or the path of one"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template: {path} cannot be read: {error}") from None


def _shape(size: Sequence[int]) -> str:
    return "x".join(map(str, size)) or "a number"
