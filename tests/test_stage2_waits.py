"""
No step makes the host wait for the device, whatever the objective. Forward and backward run on torch's meta device,
whose tensors have shapes and no values: there is nothing to wait for, so torch itself refuses whatever would ask.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_stage2_objectives import EVERYTHING, scored_world, settings
from tiny_saes import random_sae, write_saelens
from tiny_world import D_SAE, TinyWorld, add_conversations
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

import fpo.scoring.features as feature_module
import fpo.scoring.sae.encoder as sae_module
from fpo.objectives import OBJECTIVES
from fpo.recipe import Recipe
from fpo.scoring import Layout
from fpo.stage1_cache import build_caches
from fpo.stage2_align.finite import FiniteWatch
from fpo.stage2_align.measure import ObjectiveMeter
from fpo.stage2_align.policy import load_policy
from fpo.stage2_align.stream import PairStream, on_device
from fpo.stage2_align.sums import MetricSums
from fpo.stage2_align.trainer import PairTrainer

aten = torch.ops.aten


class Wait(AssertionError):
    """What would have made the host wait for the device."""


# How torch refuses what asks a meta tensor for a value, or for a shape that depends on values.
REFUSED = (Wait, RuntimeError, NotImplementedError, TypeError)


class ValuesAndCopies(TorchDispatchMode):
    """
    What waits on a GPU and passes on the meta device: assignment under a mask, segment_reduce that looks at its
    lengths, and copies from the host, whose memory is not pinned. A host's scalar goes with the kernel that reads it.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [leaf for leaf in (*given, *tree_leaves(result)) if isinstance(leaf, Tensor) and leaf.is_meta]
        if not on_device:
            return result
        packet = func.overloadpacket
        if packet in (aten.index_put, aten.index_put_) and any(index.dtype == torch.bool for index in _indices(args)):
            raise Wait(f"{func} under a mask")
        if packet is aten.segment_reduce and not kwargs.get("unsafe", False):
            raise Wait(f"{func} that is not unsafe")
        if any(not tensor.is_meta and (tensor.ndim or packet is aten._to_copy) for tensor in given):
            raise Wait(f"{func} copies from the host")
        return result


def _indices(args: Any) -> list[Tensor]:
    return [index for index in args[1] if index is not None]


class Literals(TorchFunctionMode):
    """Numbers of Python that become a tensor of the device, as its contents or as an index: a copy from the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        literal = not isinstance(args[-1], Tensor)
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor) and literal and result.is_meta:
            raise Wait(f"{func.__name__} copies from the host")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(index, list | np.ndarray) for index in indices):
                raise Wait(f"{func.__name__} copies its indices from the host")
        return result


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Inside, whatever would make the host wait for a meta tensor raises one of REFUSED."""
    with Literals(), ValuesAndCopies():
        yield


class On(NamedTuple):
    """Tensors of a device."""

    device: str

    @property
    def values(self) -> Tensor:
        return torch.rand(4, 3, device=self.device, requires_grad=True)

    @property
    def mask(self) -> Tensor:
        return torch.ones(4, dtype=torch.bool, device=self.device)

    @property
    def places(self) -> Tensor:
        return torch.ones(4, dtype=torch.long, device=self.device)


WAITS: dict[str, Callable[[On], Any]] = {
    "item": lambda on: on.values[0, 0].item(),
    "tolist": lambda on: on.places.tolist(),
    "bool": lambda on: bool(on.mask[0]),
    "if": lambda on: 1 if (on.values > 0).any() else 0,
    "int": lambda on: int(on.places[0]),
    "float": lambda on: float(on.values.detach().sum()),
    "range": lambda on: range(on.places[0]),  # type: ignore[call-overload]
    "slice": lambda on: on.values[: on.places[0]],
    "size": lambda on: torch.full((2,), on.places[0], device=on.device),
    "split": lambda on: on.values.split(on.places.tolist()),
    "tensor_split": lambda on: torch.tensor_split(on.values, on.places),
    "nonzero": lambda on: on.mask.nonzero(),
    "where": lambda on: torch.where(on.mask),
    "argwhere": lambda on: torch.argwhere(on.mask),
    "mask": lambda on: on.values[on.mask],
    "assignment under a mask": lambda on: on.values.detach().__setitem__(on.mask, 0.0),
    "index_put under a mask": lambda on: on.values.index_put((on.mask,), on.values[0]),
    "masked_select": lambda on: on.values.masked_select(on.mask[:, None]),
    "unique": lambda on: on.places.unique(),
    "unique_consecutive": lambda on: torch.unique_consecutive(on.places),
    "bincount": lambda on: torch.bincount(on.places),
    "one_hot": lambda on: torch.nn.functional.one_hot(on.places),
    "repeat_interleave": lambda on: torch.repeat_interleave(on.places, on.places),
    "segment_reduce": lambda on: torch.segment_reduce(on.values, "sum", lengths=on.places),
    "equal": lambda on: torch.equal(on.places, on.places),
    "allclose": lambda on: torch.allclose(on.values, on.values),
    "cpu": lambda on: on.values.cpu(),
    "to cpu": lambda on: on.values.to("cpu"),
    "numpy": lambda on: on.values.detach().numpy(),
    "copy to the host": lambda on: torch.zeros(4, 3).copy_(on.values.detach()),
    "to the device": lambda on: torch.ones(3).to(on.device),
    "scalar to the device": lambda on: torch.ones(()).to(on.device),
    "index of the host": lambda on: on.values[torch.zeros(2, dtype=torch.long)],
    "index that is a list": lambda on: on.values[[0, 1]],
    "index that is an array": lambda on: on.values[np.array([0, 1]), 0],
    "tensor": lambda on: torch.tensor([1, 2], device=on.device),
    "as_tensor": lambda on: torch.as_tensor(np.arange(2), device=on.device),
    "new_tensor": lambda on: on.values.new_tensor([1, 2]),
    "backward of a function": lambda on: Asks.apply(on.values).sum().backward(),
    "backward of a hook": lambda on: _hooked(on.values).sum().backward(),
}


class Asks(torch.autograd.Function):
    """Asks the device for a value in backward alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * grad.sum().item()


def _hooked(x: Tensor) -> Tensor:
    x.register_hook(lambda grad: grad.masked_fill_(grad[grad > 0].sum() > 0, 0.0))
    return x * 2


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_the_device_is_noticed(name: str) -> None:
    """Of a host's tensors it is right."""
    with no_waits():
        WAITS[name](On("cpu"))
    with pytest.raises(REFUSED), no_waits():
        WAITS[name](On("meta"))


def test_what_does_not_wait_passes() -> None:
    on = On("meta")
    with no_waits():
        x, places, mask = on.values, on.places, on.mask[:, None]
        owners = torch.repeat_interleave(torch.arange(4, device="meta"), places, output_size=9)
        torch.segment_reduce(x, "sum", lengths=places, unsafe=True)
        picked = torch.where(mask, x[places], 0.0).masked_fill(mask, 1.0)
        best = picked.topk(2, dim=-1)
        (best.values.sum() + x.new_zeros(4).index_add(0, owners, x[owners, 0]).sum() * torch.ones(())).backward()
        assert x.grad is not None


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.autocast knows no meta device; nothing here is in it."""
    monkeypatch.setattr(sae_module, "_full_precision", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Scored pairs and conversations, with a JumpReLU SAE, a gated one and a TopK one."""
    world = scored_world(tmp_path_factory.mktemp("waits") / "world")
    tensors = random_sae(seed=6, d_in=32, d_sae=D_SAE)
    write_saelens(world.root / "topk", tensors, "topk", k=4, metadata={})
    write_saelens(world.root / "gated", tensors, "gated", metadata={})
    (world.root / "conversations.json").write_text(json.dumps(add_conversations(world, 8, 4)), encoding="utf-8")
    return world


def check_step(world: TinyWorld, recipe: Recipe, run: Path, layout: Layout = Layout.PACKED) -> None:
    """A step of this recipe, from the batch on the device to the gradient of every weight."""
    cache = build_caches(recipe, world.store)[0].cache
    batch: Any = next(iter(PairStream(cache, seed=0, per_device=4, layout=layout, objective=recipe.objective)))
    meter = ObjectiveMeter.of(recipe)
    model = load_policy(recipe, meter, run).to("meta")  # type: ignore[arg-type]
    sums = MetricSums()
    trainer: Any = SimpleNamespace(
        meter=meter.to(torch.device("meta")), args=SimpleNamespace(world_size=1), router_coefficient=0.0, sums=sums
    )
    moved = on_device(batch, torch.device("meta"))
    with no_waits():
        loss = PairTrainer.compute_loss(trainer, model, moved)
        FiniteWatch(run, 1e-4).note(loss, 1)
        loss.backward()
    assert loss.is_meta
    assert all(weight.grad is not None for weight in model.parameters())
    assert "loss" in sums.names


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_waits(world: TinyWorld, tmp_path: Path, name: str) -> None:
    check_step(world, world.recipe(objective=settings(name), cache=EVERYTHING), tmp_path)


@pytest.mark.parametrize("name", ["dpo", "kto", "plackett_luce", "mixture"])
def test_no_objective_with_a_feature_term_waits(world: TinyWorld, tmp_path: Path, name: str) -> None:
    objective = {**settings(name), "features": {"k": 8}}
    check_step(world, world.recipe(objective=objective, cache=EVERYTHING), tmp_path)


@pytest.mark.parametrize("sae", ["sae", "gated", "topk"])
@pytest.mark.parametrize("feature_set", ["reference", "union", "policy"])
def test_no_feature_set_waits_in_blocks_of_the_budget(
    world: TinyWorld, tmp_path: Path, feature_set: str, sae: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of an SAE whose features need each other. A budget of three tokens: every loop over blocks goes on."""
    for module in (sae_module, feature_module):
        monkeypatch.setattr(module, "MEMORY_BUDGET", 3 * 4 * D_SAE)
    feature = {**world.raw_recipe()["features"][0], "sae": str(world.root / sae), "top_k": 16}
    objective = {"feature_set": feature_set}
    check_step(world, world.recipe(features=[feature], objective=objective), tmp_path)


@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
def test_no_distance_waits(world: TinyWorld, tmp_path: Path, distance: str) -> None:
    """With weights of single features, over completions of which some tokens count."""
    data = json.loads((world.root / "conversations.json").read_text(encoding="utf-8"))
    objective = {"distance": distance, "exclude": [3], "weights": {5: 2.0}}
    check_step(world, world.recipe(data=data, objective=objective), tmp_path)


@pytest.mark.parametrize("feature_set", ["reference", "union"])
def test_several_hookpoints_do_not_wait(world: TinyWorld, tmp_path: Path, feature_set: str) -> None:
    one = world.raw_recipe()["features"][0]
    features = [one, {**one, "hookpoint": "model.layers.0"}]
    names = [feature["hookpoint"] for feature in features]
    objective = {"feature_set": feature_set, "hookpoints": names}
    check_step(world, world.recipe(features=features, objective=objective), tmp_path)


def test_rows_do_not_wait(world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for transformers itself, which asks once a forward whether the positions of its own making begin again."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    check_step(world, world.recipe(), tmp_path, Layout.ROWS)


@pytest.mark.parametrize(("gpu", "asked"), [(True, True), (True, False), (False, True)])
def test_batches_are_pinned_where_there_is_a_gpu(gpu: bool, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    trainer: Any = SimpleNamespace(stream=[], args=SimpleNamespace(dataloader_pin_memory=asked))
    assert PairTrainer.get_train_dataloader(trainer).pin_memory == (gpu and asked)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_pinned_batch_is_moved_without_a_wait(pinned: bool) -> None:
    moves: list[bool] = []

    class Host(Tensor):
        def is_pinned(self, *_: Any) -> bool:
            return pinned

        def to(self, device: str, *, non_blocking: bool) -> Tensor:  # type: ignore[override]
            moves.append(non_blocking)
            return self.as_subclass(Tensor)

    trainer: Any = object.__new__(PairTrainer)
    trainer.args, trainer.is_deepspeed_enabled = SimpleNamespace(device="cpu"), False
    trainer._prepare_inputs({"weight": torch.ones(2).as_subclass(Host)})
    assert moves == [pinned]
