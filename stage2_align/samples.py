"""
Samples in training: what the policy writes, for people to read. `samples/step-N.jsonl` has a line per prompt, as
transformers' `generate` continues it with the policy after step N.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fpo.errors import DataError, RecipeError
from fpo.recipe import Generate
from fpo.scoring import ordinary_forward, positions, unwrapped
from fpo.stage2_align.adapters import n_virtual
from fpo.stage2_align.checkpoints import explained_writes
from fpo.stage2_align.run import write_whole
from fpo.stage2_align.trainer import PairTrainer
from fpo.store import Cache


class Samples(TrainerCallback):
    """Continues the same prompts every so many steps, on the first process; nothing of the training changes by it."""

    def __init__(self, trainer: PairTrainer, held_out: Cache, settings: Generate, folder: Path) -> None:
        """
        Raises DataError where no held-out group has a prompt, RecipeError where completions would outgrow the model.

        folder  where the files go
        """
        self.policy: Any = trainer.model
        self.model: Any = unwrapped(trainer.model)
        self.tokenizer = trainer.processing_class
        self.settings, self.folder = settings, folder
        self.prompts = first_prompts(held_out, settings.prompts)
        longest = max(len(ids) for _, ids in self.prompts) + n_virtual(self.policy)
        room = positions(self.model.config)
        if room is not None and longest + settings.max_new_tokens > room:
            raise RecipeError(
                f"generate.max_new_tokens: {settings.max_new_tokens} tokens behind a prompt of {longest} are more than "
                f"the model's {room} positions; lower it to {room - longest}"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero or state.global_step % self.settings.every:
            return
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._sampled(args)]
        file = self.folder / f"step-{state.global_step}.jsonl"
        with explained_writes(file, "free some space, then continue with --resume"):
            self.folder.mkdir(exist_ok=True)
            write_whole(file, "".join(lines))

    @torch.no_grad()
    def _sampled(self, args: TrainingArguments) -> list[dict[str, Any]]:
        training = self.model.training
        self.model.eval()
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), ordinary_forward(self.model), warnings.catch_warnings():
            # PEFT drops generate's position ids before a soft prompt; the model's own are the same without padding.
            warnings.filterwarnings("ignore", "Position ids are not supported")
            torch.manual_seed(args.seed)
            rows = [self._row(group, ids.to(args.device)) for group, ids in self.prompts]
        self.model.train(training)
        return rows

    def _row(self, group: int, prompt: torch.Tensor) -> dict[str, Any]:
        temperature = self.settings.temperature
        # One prompt at a time: a padded batch would round otherwise than the prompt alone.
        tokens = self.policy.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=self.settings.max_new_tokens,
            do_sample=temperature > 0,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
            **({"temperature": temperature} if temperature else {}),
        )[0, len(prompt) :]
        return {
            "group_id": group,
            "prompt": self.tokenizer.decode(prompt),
            "completion": self.tokenizer.decode(tokens),
        }


def first_prompts(cache: Cache, count: int) -> list[tuple[int, torch.Tensor]]:
    """Id and prompt of a cache's first groups, in its order, of those whose prompt has a token. Raises DataError."""
    found: list[tuple[int, torch.Tensor]] = []
    for sid in range(len(cache.shard_groups)):
        groups = cache.shard(sid)
        prompts, _ = groups.lengths
        starts = groups.splits[groups.completion_starts[:-1] + np.arange(len(groups))].astype(np.int64)
        for group, start, length in zip(groups.group_id.tolist(), starts.tolist(), prompts.tolist(), strict=True):
            if length:
                found.append((group, torch.from_numpy(groups.input_ids[start : start + length].astype(np.int64))))
            if len(found) == count:
                return found
    if not found:
        raise DataError(f"generate: no group of the held-out cache {cache.key[:12]} has a prompt to continue")
    return found
