"""
`fpo merge`: a run's adapter in the weights that it was trained on, as one model.

The merged model is read back from the disk and must say what the adapter says: weights that two modules share, for one,
cannot take the update of one of them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fpo.errors import RunError
from fpo.progress import say
from fpo.recipe import Dtype
from fpo.scoring import LOGPS_TOLERANCE, load_model, load_tokenizer, model_config, positions
from fpo.stage2_align.adapters import has_prompt, opened_adapter
from fpo.stage2_align.checkpoints import explained_writes, whole_checkpoint
from fpo.stage2_align.policy import adapter_base
from fpo.stage2_align.run import read_recipe, read_run

# Tokens on which both models are asked.
_ASKED = 64


@dataclass(frozen=True)
class MergeReport:
    """What `fpo merge` says when it is done."""

    folder: Path
    dtype: Dtype
    n_bytes: int
    """Of the weight files."""
    difference: float
    """Mean |difference| of token log-probs between the merged model and the adapter on its base, nats."""


def merge_run(
    run: Path, folder: Path | None = None, checkpoint: int | None = None, dtype: Dtype = "float32"
) -> MergeReport:
    """
    Write a run's policy as one model with its tokenizer, that `from_pretrained` opens.

    folder      new; None is `merged` in the run, or `merged-N` of checkpoint N
    checkpoint  as the policy was after this step, of a run that is still training too
    dtype       of the weights that are written; the sum is taken in float32
    Raises RunError where there is no adapter, the folder exists, or the merged model says something else.
    """
    policy = _policy_folder(run, checkpoint)
    folder = folder or run / ("merged" if checkpoint is None else f"merged-{checkpoint}")
    if folder.exists():
        raise RunError(f"{folder}: exists already, and nothing is written over; give another --output")
    base = adapter_base(read_recipe(run), policy)
    if getattr(model_config(base), "quantization_config", None) is not None:
        raise RunError(
            f"{run}: its adapter stands on quantised weights ({base}), which would round it away; keep it beside them"
        )
    say("merging ...")
    model = opened_adapter(load_model(base, "float32"), policy)
    if has_prompt(model):
        raise RunError(f"{run}: a soft prompt is no change of weights, so none can take it; keep it beside its base")
    expected = _logps(model)
    merged = model.merge_and_unload().to(getattr(torch, dtype))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with explained_writes(folder, "free some space, then merge again"):
        merged.save_pretrained(partial)
        load_tokenizer(str(policy), None).save_pretrained(partial)
        for file in partial.glob("*.safetensors"):  # written for their owner alone
            file.chmod((partial / "config.json").stat().st_mode)
    del model, merged
    difference = float((_logps(load_model(partial, dtype)) - expected).abs().mean())
    if not difference <= LOGPS_TOLERANCE[dtype]:
        shutil.rmtree(partial)
        raise RunError(
            f"{run}: merged, its policy says something else: token log-probs differ by {difference:.2g} nats on "
            f"average (at most {LOGPS_TOLERANCE[dtype]:g} in {dtype}); keep the adapter beside its base"
        )
    partial.rename(folder)
    return MergeReport(folder, dtype, sum(file.stat().st_size for file in folder.glob("*.safetensors")), difference)


def _policy_folder(run: Path, checkpoint: int | None) -> Path:
    """Where the adapter lies."""
    complete = read_run(run)["complete"]
    if checkpoint is None and not complete:
        raise RunError(f"{run}: this run is not finished; merge a checkpoint of it with --checkpoint N")
    policy = run if checkpoint is None else whole_checkpoint(run, checkpoint)
    if not (policy / "adapter_config.json").is_file():
        raise RunError(
            f"{policy}: no adapter lies there to merge; it is a whole model already, from_pretrained opens it"
        )
    return policy


@torch.no_grad()
def _logps(model: PreTrainedModel) -> Tensor:
    """The model's own log-probs of some tokens, drawn once and for all."""
    config = model.config.get_text_config()
    length = min(_ASKED, positions(model.config) or _ASKED)
    ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])
