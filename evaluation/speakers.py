"""The models that `fpo generate` asks: a run's policy, or any model, through transformers or vLLM."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fpo.errors import ModelError, RunError
from fpo.evaluation.sampling import Engine, Sampling, Written, complete
from fpo.memo import file_facts
from fpo.recipe import load_recipe
from fpo.scoring import (
    adapter_weight_files,
    load_model,
    load_tokenizer,
    model_config,
    model_folder,
    positions,
    weight_files,
)
from fpo.stage2_align.adapters import has_prompt, n_virtual, plain_adapter
from fpo.stage2_align.checkpoints import whole_checkpoint
from fpo.stage2_align.policy import adapter_base
from fpo.stage2_align.run import RECIPE_FILE, read_run


class Speaker(NamedTuple):
    """A model that completes prompts."""

    name: str
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    room: int | None
    """Tokens that a prompt and its completion may have together; None where the model names no limit."""
    facts: dict[str, Any]
    """What tells it from another, in JSON types."""
    today: str
    """ISO date for chat templates that ask for one."""


class _Weights(NamedTuple):
    """Where a model stands."""

    name: str
    folder: Path
    """Of the tokenizer, and of the weights or the adapter."""
    base: Path
    """Of the weights below the adapter, if there is one; else the folder."""
    dtype: str
    today: str
    """The one that a run was trained with; else it is today's."""

    @property
    def adapter(self) -> Path | None:
        return None if self.base == self.folder else self.folder

    @property
    def facts(self) -> dict[str, Any]:
        files = weight_files(self.folder) if self.adapter is None else adapter_weight_files(self.folder)
        return {"weights": [file_facts(file) for file in files], "dtype": self.dtype}


class Opened(NamedTuple):
    """A model as anyone opens it: nothing scores in it."""

    weights: _Weights
    model: Any
    tokenizer: PreTrainedTokenizerBase

    @property
    def room(self) -> int | None:
        """Tokens that a prompt and its completion may have together; None where the model names no limit."""
        room = positions(self.model.config)
        return None if room is None else room - n_virtual(self.model)

    @property
    def engine(self) -> Engine:
        """What completes prompts."""
        return engine_of(self.model, self.tokenizer)


def engine_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """What completes prompts by a model that answers ordinary calls."""
    spoken: Engine = partial(complete, model, tokenizer)
    return _unpadded(spoken) if has_prompt(model) else spoken


def opened(model: str, checkpoint: int | None = None, dtype: str | None = None) -> Opened:
    """
    model       a run folder, a folder of weights, or a hub id
    checkpoint  the run's policy after this step; None as it ended
    dtype       of the weights; None is the run's own, else float32
    Raises RunError where there is no such run or checkpoint, ModelError where nothing can be loaded.
    """
    weights = _weights(model, checkpoint, dtype)
    loaded: Any = load_model(weights.base, weights.dtype)
    if weights.adapter is not None:
        loaded = plain_adapter(loaded, weights.adapter)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Opened(weights, loaded, load_tokenizer(str(weights.folder), None))


def speaker_of(model: str, checkpoint: int | None, dtype: str | None, engine: str) -> Speaker:
    """
    engine  transformers or vllm
    The rest and errors as `opened`.
    """
    if engine == "vllm":
        weights = _weights(model, checkpoint, dtype)
        tokenizer, room = load_tokenizer(str(weights.folder), None), positions(model_config(weights.base))
        return Speaker(
            weights.name, _by_vllm(weights), tokenizer, room, {**weights.facts, "engine": engine}, weights.today
        )
    found = opened(model, checkpoint, dtype)
    facts = {**found.weights.facts, "engine": engine}
    return Speaker(found.weights.name, found.engine, found.tokenizer, found.room, facts, found.weights.today)


def _weights(model: str, checkpoint: int | None, dtype: str | None) -> _Weights:
    run = Path(model)
    if not (run / RECIPE_FILE).is_file():
        if checkpoint is not None:
            raise RunError(f"{model}: --checkpoint is for runs, and this is none (no {RECIPE_FILE})")
        folder = model_folder(model)
        return _Weights(run.name, folder, folder, dtype or "float32", date.today().isoformat())
    if checkpoint is None and not read_run(run)["complete"]:
        raise RunError(f"{run}: this run is not finished; --checkpoint N takes the policy after step N")
    recipe, name = load_recipe(run / RECIPE_FILE), run.resolve().name
    folder = run if checkpoint is None else whole_checkpoint(run, checkpoint)
    base = adapter_base(recipe, folder) if (folder / "adapter_config.json").is_file() else folder
    named = name if checkpoint is None else f"{name}-{checkpoint}"
    today = recipe.data.today or date.today().isoformat()
    return _Weights(named, folder, base, dtype or recipe.policy_arithmetic().dtype, today)


def _unpadded(engine: Engine) -> Engine:
    """Behind a soft prompt PEFT has positions counted through padding, so only prompts of one length go together."""

    def by_length(prompts: Sequence[Sequence[int]], numbers: NDArray[Any], sampling: Sampling) -> list[Written]:
        found: dict[int, Written] = {}
        lengths = np.array([len(ids) for ids in prompts])
        with warnings.catch_warnings():
            # Without padding the model's own position ids are those that PEFT drops.
            warnings.filterwarnings("ignore", "Position ids are not supported")
            for length in np.unique(lengths):
                rows = np.flatnonzero(lengths == length)
                written = engine([prompts[row] for row in rows.tolist()], numbers[rows], sampling)
                found |= dict(zip(rows.tolist(), written, strict=True))
        return [found[row] for row in range(len(prompts))]

    return by_length


def _by_vllm(weights: _Weights) -> Engine:
    try:
        vllm = importlib.import_module("vllm")
    except ImportError:
        raise ModelError("--engine vllm: vllm is not installed here (pip install vllm); leave it out") from None
    llm = vllm.LLM(model=str(weights.base), dtype=weights.dtype, enable_lora=weights.adapter is not None)
    lora = None
    if weights.adapter is not None:
        kind = json.loads((weights.adapter / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
        if kind != "LORA":
            raise ModelError(f"--engine vllm: it reads LoRA adapters, and {weights.adapter} has {kind}; leave it out")
        request = importlib.import_module("vllm.lora.request").LoRARequest
        lora = request(weights.name, 1, str(weights.adapter))

    def engine(prompts: Sequence[Sequence[int]], numbers: NDArray[Any], sampling: Sampling) -> list[Written]:
        # vLLM draws its own numbers, from a seed for each prompt.
        settings = [
            vllm.SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or 0,
                seed=int(row[0] * 2**31),
            )
            for row in numbers
        ]
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = llm.generate(asked, settings, use_tqdm=False, lora_request=lora)
        first = [output.outputs[0] for output in outputs]
        return [Written(list(one.token_ids), one.finish_reason == "stop") for one in first]

    return engine
