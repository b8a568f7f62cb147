"""
What a run saves at its end, read back from the disk: a run is complete when the policy stands in its folder, whole.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fpo.errors import ModelError, RunError
from fpo.scoring import adapter_weight_files, weight_files
from fpo.stage2_align.trainer import PairTrainer

# Every tensor of a policy: the names that it may have in a file (tied weights have several), and its shape.
Expected = list[tuple[tuple[str, ...], tuple[int, ...]]]


def expected_weights(model: nn.Module) -> Expected:
    """What the files of a model must hold; of a PEFT model, its adapters. To be asked before anything shards it."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        state: dict[str, Any] = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    # Under DeepSpeed's ZeRO-3 a parameter here is empty and knows its shape by another name.
    shapes = {id(tensor): tuple(getattr(tensor, "ds_shape", tensor.shape)) for tensor in state.values()}
    return [(tuple(aliases), shapes[tensor]) for tensor, aliases in names.items()]


def save_policy(trainer: PairTrainer, folder: Path, expected: Expected) -> None:
    """Save the trained policy whole, however it is sharded, and read it back. Raises RunError where it is not there."""
    if trainer.is_fsdp_enabled:
        # Shards are for checkpoints: Trainer writes a model that opens anywhere only from a full state dict.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        read_back(folder, expected)


def read_back(folder: Path, expected: Expected) -> None:
    """RunError where the weight files of a folder lack a tensor, hold it in another shape, or numbers that are none."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for file in _files(folder):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no dict
                    tensor = tensors.get_tensor(name)
                    shapes[name] = tuple(tensor.shape)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        raise _not_saved(folder, f"{name} in {file.name} holds numbers that are not finite")
    except ModelError:
        what = "none were written (DeepSpeed ZeRO-3 writes them where stage3_gather_16bit_weights_on_model_save is set)"
        raise _not_saved(folder, what) from None
    except (SafetensorError, OSError) as error:
        raise _not_saved(folder, str(error).splitlines()[0]) from None
    for names, shape in expected:
        for name in names:
            if shapes.get(name, shape) != shape:
                raise _not_saved(folder, f"{name} has shape {shapes[name]}, the policy's is {shape}")
    absent = [names[0] for names, _ in expected if not any(name in shapes for name in names)]
    # Some families save their tensors split or joined under other names: then their numbers must add up.
    if absent and sum(map(math.prod, shapes.values())) < sum(math.prod(shape) for _, shape in expected):
        raise _not_saved(
            folder, f"{len(absent)} of the policy's {len(expected)} tensors are missing, first {absent[0]}"
        )


def _files(folder: Path) -> list[Path]:
    adapter = (folder / "adapter_config.json").is_file()
    return adapter_weight_files(folder) if adapter else weight_files(folder)


def _not_saved(folder: Path, what: str) -> RunError:
    return RunError(
        f"{folder}: the saved weights are not the policy's: {what}; the run is not complete, --resume saves it again "
        "from its last checkpoint"
    )
