"""Completions behind prompts that they do not answer: which they are, and what the reference says of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import TinyWorld, add_conversations, build_tiny_world
from transformers import AutoModelForCausalLM

from fpo.errors import DataError
from fpo.recipe import Recipe
from fpo.scoring import Packed, sum_logps
from fpo.stage1_cache import build_caches, find_cache
from fpo.stage1_cache.identity import cache_identities
from fpo.stage1_cache.score import ReferenceScorer
from fpo.stage2_align.measure import ObjectiveMeter
from fpo.stage2_align.policy import load_policy
from fpo.stage2_align.stream import PairStream
from fpo.stage2_align.units import with_mismatched
from fpo.store import Cache, Groups, Mismatched, open_cache

MISMATCHED = {"mismatched": True}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyWorld:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return build_tiny_world(tmp_path / "world", 20, 4)


def every_row(recipe: Recipe, store: Path) -> tuple[Groups, Mismatched]:
    """All groups and their rows, in the order of the dataset."""
    [report, *_] = build_caches(recipe, store)
    cache: Cache = open_cache(store, report.cache.key, columns=[cache_identities(recipe)[0].specs[-1]])
    groups = Groups.concat([cache.shard(sid) for sid in range(len(cache.shard_groups))])
    groups = groups.take(np.argsort(groups.group_id))
    (column,) = groups.columns
    assert isinstance(column, Mismatched)
    return groups, column


def segment(groups: Groups, group: int, place: int) -> np.ndarray:
    """The tokens of a group's prompt (0) or of one of its completions."""
    first = int(groups.completion_starts[group]) + group + place
    start, end = groups.splits[first : first + 2].astype(int)
    return groups.input_ids[start:end].astype(np.int64)


def before_with_another_prompt(groups: Groups, group: int) -> int:
    """The nearest group before, round the end of the data."""
    own = segment(groups, group, 0).tolist()
    order = [(group - step) % len(groups) for step in range(1, len(groups))]
    return next(other for other in order if segment(groups, other, 0).tolist() != own)


def test_behind_each_prompt_stands_the_first_completion_of_the_row_before(world: TinyWorld) -> None:
    """And what the reference says of it is what a forward of these tokens alone gives."""
    groups, column = every_row(
        world.recipe(cache={**MISMATCHED, "shard_pairs": 3}, features=[], objective={"name": "dpo"}), world.store
    )
    model = AutoModelForCausalLM.from_pretrained(world.root / "model").eval()
    longest = max(len(segment(groups, g, 0)) + len(segment(groups, g, p)) for g in range(20) for p in (1, 2))
    cut = 0
    for group in range(20):
        prompt, whole = segment(groups, group, 0), segment(groups, group - 1 if group else 19, 1)
        completion = whole[: longest - len(prompt)]
        cut += len(completion) < len(whole)
        start, end = column.splits[group : group + 2].astype(int)
        assert column.input_ids[start:end].tolist() == completion.tolist()
        assert column.score_mask[start:end].all()
        with torch.no_grad():
            logps = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
        said = logps[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None]).sum()
        assert column.ref_logps[group] == pytest.approx(float(said), rel=1e-5)


def test_the_column_comes_beside_a_base_that_is_there_in_a_pass_of_its_own(
    world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are the same as of one pass for everything, and a second time nothing is scored."""
    both, together = every_row(world.recipe(cache=MISMATCHED), world.root / "together")
    [before, _] = build_caches(world.recipe(), world.store)
    [after, _] = build_caches(world.recipe(cache=MISMATCHED), world.store)
    assert (after.cache.key, after.cache.digest) == (before.cache.key, before.cache.digest)
    assert (after.base_built, after.scored, [column.built for column in after.columns]) == (False, 0, [False, True])
    assert after.tokens_scored > 0
    monkeypatch.setattr(ReferenceScorer, "__init__", lambda *_, **__: pytest.fail("a reference was loaded"))
    groups, alone = every_row(world.recipe(cache=MISMATCHED), world.store)
    assert groups.input_ids.tolist() == both.input_ids.tolist()
    assert alone.ref_logps.tolist() == together.ref_logps.tolist()


def test_other_data_have_other_neighbours_so_no_row_is_copied(world: TinyWorld) -> None:
    """The base's rows of the same pairs are, whatever their order."""
    build_caches(world.recipe(cache=MISMATCHED), world.store)
    path = world.root / "pairs" / "train.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(reversed(rows)) + "\n", encoding="utf-8")
    recipe = world.recipe(cache=MISMATCHED)
    [report, _] = build_caches(recipe, world.store)
    assert (report.scored, report.reused) == (0, 40)
    groups, column = every_row(recipe, world.store)
    start, end = column.splits[3:5].astype(int)
    whole = segment(groups, 2, 1)
    assert column.input_ids[start:end].tolist() == whole[: end - start].tolist()


def test_a_mask_counts_the_same_tokens_behind_another_prompt(world: TinyWorld) -> None:
    data = add_conversations(world, n_train=8, n_test=4)
    groups, column = every_row(world.recipe(data=data, cache=MISMATCHED), world.store)
    assert groups.score_mask is not None
    for group in range(8):
        before = int(groups.completion_starts[before_with_another_prompt(groups, group)])
        start, end = groups.scored_splits[before : before + 2]
        first, last = column.splits[group : group + 2].astype(int)
        assert column.score_mask[first:last].tolist() == groups.score_mask[start:end][: last - first].tolist()


def test_the_first_token_behind_an_empty_prompt_is_not_scored(world: TinyWorld) -> None:
    rows = [
        {"prompt": "", "chosen": "w1 w2 w3", "rejected": "w4 w5"},
        {"prompt": "w6", "chosen": " w7", "rejected": " w8"},
    ]
    path = world.root / "pairs" / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = world.recipe(cache=MISMATCHED, features=[], objective={"name": "dpo"})
    groups, column = every_row(recipe, world.store)
    empty = [len(segment(groups, group, 0)) == 0 for group in (0, 1)]
    for group in (0, 1):
        first = int(column.splits[group])
        assert column.score_mask[first] == (0 if empty[group] else 1)
    more = with_mismatched(groups, column)
    assert more.n_completions.tolist() == [3, 3]
    assert segment(more, 0, 3).tolist() == column.input_ids[: int(column.splits[1])].tolist()
    assert segment(more, 1, 2).tolist() == segment(groups, 1, 2).tolist()
    assert len(more.token_logps) == int(more.scored_splits[-1])
    counted = more.counted.reshape(2, 3)
    assert counted[:, :2].reshape(-1).tolist() == groups.counted.tolist()
    ends = column.splits.astype(int).tolist()
    assert counted[:, 2].tolist() == [int(column.score_mask[a:b].sum()) for a, b in itertools.pairwise(ends)]


def test_rows_of_one_prompt_that_stand_together_have_another_prompts_completion(world: TinyWorld) -> None:
    """As of unpaired data, whose completions of a prompt are neighbours: prompts a a b b, before the first the last."""
    rows = [("w1", "w11", True), ("w1", "w12", False), ("w2", "w13", True), ("w2", "w14", False)]
    unpaired = [{"prompt": prompt, "completion": f" {text}", "label": label} for prompt, text, label in rows]
    path = world.root / "pairs" / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in unpaired), encoding="utf-8")
    data = {"eval_split": None}
    recipe = world.recipe(cache=MISMATCHED, features=[], data=data, objective={"name": "kto"})
    groups, column = every_row(recipe, world.store)
    found = [row.tolist() for row in np.split(column.input_ids, column.splits[1:-1].astype(int))]
    own = [segment(groups, group, 1).tolist() for group in range(4)]
    assert found == [own[3], own[3], own[1], own[1]]
    path.write_text("".join(json.dumps({**row, "prompt": "w1"}) + "\n" for row in unpaired), encoding="utf-8")
    with pytest.raises(DataError, match=r"cache\.mismatched: .*has one prompt alone"):
        build_caches(recipe, world.store)


def test_a_group_that_only_fills_a_process_up_is_none_of_the_mean(world: TinyWorld) -> None:
    """Three groups on two processes are two and a repeat: z is the mean over three, as on one."""
    recipe = world.recipe(cache=MISMATCHED, features=[], objective={"name": "kto"}, data={"split": "train[:3]"})
    cache = find_cache(recipe, build_caches(recipe, world.store) and world.store)
    meter, counted = ObjectiveMeter.of(recipe), []
    model = load_policy(recipe, meter, world.root / "run")
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        stream = PairStream(cache, seed=0, per_device=4, rank=rank, world=world_size, objective=recipe.objective)
        (batch,) = stream
        assert batch is not None
        batch["ref_logps"] = batch["ref_logps"] - torch.arange(len(batch["ref_logps"]))
        logps = sum_logps(model(**Packed.of(batch)._asdict()).token_logps, Packed.of(batch))
        logratios = (logps.detach() - batch["ref_logps"])[batch["mismatched"]]
        counted.append(int(batch["counted_groups"].sum()))
        kept = logratios[batch["counted_groups"]]
        value = meter.measure(model(**Packed.of(batch)._asdict()), batch)
        assert value.evidence.mismatched is not None
        assert float(value.evidence.mismatched) == pytest.approx(float(kept.mean()), rel=1e-5)
    assert counted == [3, 2, 1]
