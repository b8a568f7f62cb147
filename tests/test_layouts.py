"""The layout that the check chooses goes through both stages: cache, provenance, training, parity, evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import TinyWorld, build_tiny_world
from transformers import AutoModelForCausalLM

from fpo.errors import ModelError
from fpo.recipe import Recipe
from fpo.scoring import check as check_module
from fpo.stage1_cache import build_caches
from fpo.stage1_cache.score import ReferenceScorer, TokenGroups
from fpo.stage2_align import align, evaluate_run

pytestmark = pytest.mark.usefixtures("private_memory")


def recipe_of(world: TinyWorld, hookpoint: str) -> Recipe:
    feature = {**world.raw_recipe()["features"][0], "hookpoint": hookpoint}
    return world.recipe(features=[feature], training={"num_train_epochs": 1})


@pytest.mark.parametrize(
    ("family", "hookpoint", "layout"),
    [
        ("bloom", "transformer.h.1", "rows"),
        ("falcon_mamba", "backbone.layers.1", "rows"),
        ("llama", "model.layers.1", "packed"),
    ],
)
def test_both_stages_use_and_report_the_layout_that_is_right(
    family: str, hookpoint: str, layout: str, tmp_path: Path
) -> None:
    world = build_tiny_world(tmp_path / "world", n_train=12, n_test=3, family=family)
    recipe = recipe_of(world, hookpoint)
    train, held_out = build_caches(recipe, tmp_path / "store")
    assert (train.layout, held_out.layout) == (layout, layout)
    record = json.loads((tmp_path / "store" / train.cache.key / "records" / "000000.json").read_text())
    assert record["provenance"]["layout"] == layout

    pairs = train.cache.shard(0)
    model = AutoModelForCausalLM.from_pretrained(world.root / "model").eval()
    prompt, chosen, rejected = (pairs.input_ids[a:b] for a, b in zip(pairs.splits[:3], pairs.splits[1:4], strict=True))
    for side, completion in enumerate((chosen, rejected)):
        tokens = torch.tensor(np.concatenate([prompt, completion]).astype(np.int64))[None]
        with torch.no_grad():
            logps = model(input_ids=tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
        plain = logps.gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :].sum()
        assert float(plain) == pytest.approx(float(pairs.ref_logps[side]), abs=1e-4)

    report = align(recipe, train.cache, tmp_path / "run")
    assert report.layout == layout
    assert report.parity is not None
    assert report.parity < 1e-5
    assert evaluate_run(recipe, held_out.cache, tmp_path / "run")["eval_loss"] > 0


def test_a_reference_that_no_layout_measures_is_refused_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = build_tiny_world(tmp_path / "world", n_train=12, n_test=3)
    right = check_module._score
    monkeypatch.setattr(check_module, "_score", lambda *args: [logps + 0.01 for logps in right(*args)])
    monkeypatch.setattr(ReferenceScorer, "score", lambda *_: pytest.fail("something was scored"))
    with pytest.raises(ModelError, match="llama: this model cannot be scored"):
        build_caches(world.recipe(), tmp_path / "store")


def test_the_check_is_made_on_the_longest_and_shortest_pairs_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = build_tiny_world(tmp_path / "world", n_train=30, n_test=6)
    seen: list[np.ndarray] = []
    check = ReferenceScorer.check

    def noting(self: ReferenceScorer, few: TokenGroups) -> None:
        seen.append(np.diff(few.splits.astype(np.int64)).reshape(-1, 3))
        check(self, few)

    monkeypatch.setattr(ReferenceScorer, "check", noting)
    reports = build_caches(world.recipe(), tmp_path / "store")
    assert len(seen) == 2
    for report, lengths in zip(reports, seen, strict=True):
        sizes = np.concatenate([report.cache.shard(sid).sizes for sid in range(len(report.cache.shard_groups))])
        assert (lengths.sum(1).max(), lengths.sum(1).min()) == (sizes.max(), sizes.min())
