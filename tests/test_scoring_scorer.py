"""Groups of one, two, four and nine completions: everything that a scoring model says equals separate forwards."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_scoring_features import relu_identity
from tiny_groups import sequences, some_groups
from tiny_models import layer_of, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from fpo.scoring import Layout, Packed, Scores, install_scoring, pack, pool_top_features, sum_logps
from fpo.scoring.hookpoints import capture

# One, two, four and nine completions, completions of one token, empty prompts, a group of which nothing is scored.
# Every window of the tiny models is 5.
SHAPES = [
    (12, 9),
    (7, 2, 18),
    (4, 1, 1, 6, 3),
    (3, 5, 1, 2, 9, 1, 4, 1, 3, 2),
    (0, 4, 1, 7),
    (0, 1),
    (1, 6, 1),
]
TOP = 4
FAMILIES = ["llama", "gemma2"]


class Separate(NamedTuple):
    """What the family's own forward says about one completion behind its prompt."""

    logps: Tensor
    every_logp: Tensor
    residual: Tensor
    hidden: Tensor
    prompt_residual: Tensor


def separate(model: PreTrainedModel, hookpoint: str) -> list[Separate]:
    found = []
    for _, tokens, prompt in sequences(*some_groups(SHAPES)):
        with capture(model, [hookpoint]) as outputs, torch.no_grad():
            output = type(model).forward(model, input_ids=tokens[None], use_cache=False, output_hidden_states=True)
        at = torch.arange(max(prompt, 1), len(tokens))
        every = output.logits[0, at - 1].log_softmax(-1)
        residual = outputs[hookpoint][0]
        found.append(
            Separate(
                logps=every.gather(-1, tokens[at, None])[:, 0],
                every_logp=every,
                residual=residual[at - 1],
                hidden=output.hidden_states[-1][0, at - 1],
                prompt_residual=residual[: max(prompt - 1, 0)],
            )
        )
    return found


def scored(model: PreTrainedModel, layout: Layout, score_mask: np.ndarray | None = None) -> tuple[Packed, Scores]:
    packed = pack(*some_groups(SHAPES), layout, score_mask=score_mask, prompts=True)
    with torch.no_grad():
        return packed, model(**packed._asdict())


def installed(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    install_scoring(model, (layer_of(family),), TOP, hidden_sums=True)
    return model


def some_mask() -> np.ndarray:
    """Every third scored token does not count, and none of the nine completions' fourth."""
    lengths = pack(*some_groups(SHAPES)).lengths
    mask = np.arange(int(lengths.sum())) % 3 != 0
    fourth = 1 + 2 + 4 + 3
    mask[int(lengths[:fourth].sum()) : int(lengths[: fourth + 1].sum())] = False
    return mask.astype(np.uint8)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_any_size_are_scored_as_by_separate_forwards(family: str, layout: Layout) -> None:
    model = installed(family)
    alone = separate(model, layer_of(family))
    packed, scores = scored(model, layout)

    assert packed.lengths.tolist() == [len(own.logps) for own in alone]
    close(scores.token_logps, torch.cat([own.logps for own in alone]))
    close(scores.residuals[0], torch.cat([own.residual for own in alone]))
    close(sum_logps(scores.token_logps, packed), torch.stack([own.logps.sum() for own in alone]))
    every = torch.cat([own.every_logp for own in alone])
    close(scores.top_logps, every.topk(TOP).values)
    close(scores.top_logps, every.gather(-1, scores.top_indices))
    assert scores.hidden_sums is not None
    close(scores.hidden_sums, torch.stack([own.hidden.sum(0) for own in alone]))
    firsts = np.cumsum([0, *(len(shape) - 1 for shape in SHAPES[:-1])])
    close(scores.prompt_residuals[0], torch.cat([alone[first].prompt_residual for first in firsts]))
    assert (
        packed.prompt_lengths.tolist()
        == [len(alone[first].prompt_residual) for first in firsts]
        == [11, 6, 3, 2, 0, 0, 0]
    )


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_and_pooled_features_are_those_of_the_tokens_that_count(family: str, layout: Layout) -> None:
    """By an SAE whose features are the positive parts of the residual, so that pooling is their mean."""
    model = installed(family)
    mask = some_mask()
    packed, scores = scored(model, layout, mask)
    alone = separate(model, layer_of(family))
    ends = np.cumsum([len(own.logps) for own in alone])
    kept = [torch.from_numpy(part).bool() for part in np.split(mask, ends[:-1])]
    counts = [int(own.sum()) for own in kept]
    assert packed.counts.tolist() == counts
    assert counts.count(0) >= 2

    sae = relu_identity(32)
    pooled = pool_top_features(sae, packed.counting(scores.residuals[0]), packed.counts, "all")
    dense = torch.zeros(len(alone), 32)
    dense[torch.repeat_interleave(pooled.counts), pooled.indices] = pooled.acts
    logps = sum_logps(scores.token_logps, packed)
    assert scores.hidden_sums is not None
    for row, (own, counting) in enumerate(zip(alone, kept, strict=True)):
        close(dense[row], own.residual[counting].relu().sum(0) / max(counts[row], 1))
        close(logps[row], own.logps[counting].sum())
        close(scores.hidden_sums[row], own.hidden[counting].sum(0))
        assert int(pooled.active[row]) == int(dense[row].count_nonzero()) == int(pooled.counts[row])
        assert bool(pooled.active[row]) == bool(counts[row])

    prompts = pool_top_features(sae, scores.prompt_residuals[0], packed.prompt_lengths, "all")
    assert [bool(active) for active in prompts.active] == [True] * 4 + [False] * 3


@pytest.mark.parametrize("layout", Layout)
def test_a_score_mask_changes_no_number_of_any_token(layout: Layout) -> None:
    model = installed("gemma2")
    (_, masked), (_, whole) = scored(model, layout, some_mask()), scored(model, layout)
    for name in ("token_logps", "top_indices", "top_logps"):
        assert torch.equal(getattr(masked, name), getattr(whole, name)), name
    assert torch.equal(masked.residuals[0], whole.residuals[0])
    assert torch.equal(masked.prompt_residuals[0], whole.prompt_residuals[0])


def test_what_nobody_asked_for_is_not_reported() -> None:
    model = tiny_model("llama")
    install_scoring(model, (layer_of("llama"),))
    scores = model(**pack(*some_groups(SHAPES))._asdict())
    assert (scores.prompt_residuals, scores.hidden_sums, scores.router_loss) == ((), None, None)
    assert scores.top_logps.shape[1] == 0


def test_prompts_without_a_token_of_their_own_give_no_residual() -> None:
    model = installed("llama")
    scores = model(**pack(*some_groups([(0, 3), (1, 2, 2)]), prompts=True)._asdict())
    assert [tuple(residual.shape) for residual in scores.prompt_residuals] == [(0, 32)]


def test_hidden_states_are_summed_in_float32_whatever_the_model_computes_in() -> None:
    """64 tokens of bfloat16: their sum in bfloat16 would have 8 bits."""
    model = tiny_model("llama").to(torch.bfloat16)
    install_scoring(model, ("model.norm",), hidden_sums=True)
    with torch.no_grad():
        scores = model(**pack(*some_groups([(2, 60)]))._asdict())
    exact = scores.residuals[0].double().sum(0, keepdim=True)
    assert scores.hidden_sums.dtype == torch.float32
    torch.testing.assert_close(scores.hidden_sums.double(), exact, rtol=1e-5, atol=1e-5)
