"""The check finds the layout in which a model is measured rightly, or says in a line why there is none."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import build
from test_scoring_packing import SHAPES
from tiny_groups import separate_forwards, some_groups
from tiny_models import FAMILIES, ROWS_FAMILIES, layer_of, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, PreTrainedModel, T5Config

from fpo.errors import ModelError
from fpo.scoring import Layout, choose_layout, extremes, install_scoring, load_model, load_tokenizer, pack
from fpo.scoring import attention as attention_module
from fpo.scoring import check as check_module
from fpo.scoring.families import silence_dropout
from fpo.scoring.packing import attention_mask

# Longer than every window below, and a short pair behind it.
LONG_AND_SHORT = [(20, 20, 12), (2, 3, 4)]


def checked(model: PreTrainedModel, shapes: list[tuple[int, ...]] = LONG_AND_SHORT) -> Layout:
    silence_dropout(model)
    install_scoring(model)
    return choose_layout(model, *some_groups(shapes))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_can_share_a_prompt_is_packed(family: str) -> None:
    assert checked(tiny_model(family)) is Layout.PACKED


@pytest.mark.parametrize("family", ROWS_FAMILIES)
def test_what_cannot_share_a_prompt_stands_in_rows_with_the_same_numbers_hookpoints_and_gradients(family: str) -> None:
    model = tiny_model(family)
    assert checked(model) is Layout.ROWS
    hookpoint = layer_of(family)
    groups = some_groups(SHAPES)
    weights = torch.randn(sum(chosen + rejected for _, chosen, rejected in SHAPES))
    expected_logps, expected_residuals = separate_forwards(model, *groups, hookpoint)
    ((expected_logps * weights).sum() + expected_residuals.square().sum()).backward()
    expected_grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    install_scoring(model, (hookpoint,))
    scores = model(**pack(*groups, Layout.ROWS)._asdict())
    ((scores.token_logps * weights).sum() + scores.residuals[0].square().sum()).backward()

    torch.testing.assert_close(scores.token_logps, expected_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.residuals[0], expected_residuals, rtol=1e-5, atol=1e-5)
    for name, expected in expected_grads.items():
        grad = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-5 * max(float(expected.abs().max()), 1.0))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_both_layouts_score_an_empty_prompt_and_a_completion_of_one_token_alike(family: str) -> None:
    model = tiny_model(family)
    install_scoring(model)
    groups = some_groups([(0, 4, 1), (3, 1, 1), (0, 1), (1, 1, 2, 1)])
    rows = pack(*groups, Layout.ROWS)
    assert rows.lengths.tolist() == [3, 0, 1, 1, 0, 1, 2, 1]
    assert rows.targets.tolist() == pack(*groups).targets.tolist()
    own = functools.partial(check_module._family_logits, model)
    alone = [check_module._plain(model, own, sequence).logps for sequence in check_module._Groups(*groups).sequences()]
    torch.testing.assert_close(model(**rows._asdict()).token_logps, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "stray", [{"sliding_window": 5}, {"final_logit_softcapping": 0.5}, {"logit_scale": 0.1, "logits_scaling": 9.0}]
)
def test_what_a_family_does_not_read_in_its_config_changes_nothing(stray: dict[str, object]) -> None:
    plain, with_stray = tiny_model("llama"), tiny_model("llama", **stray)
    for model in (plain, with_stray):
        assert checked(model) is Layout.PACKED
    packed = pack(*some_groups(SHAPES))
    assert torch.equal(plain(**packed._asdict()).token_logps, with_stray(**packed._asdict()).token_logps)


@pytest.mark.parametrize(
    "case", ["cohere", "cohere2", "granite", "granitemoe", "minicpm3", "llama4_text", "gemma2", "gpt_neo"]
)
def test_factors_caps_chunks_and_local_layers_are_the_family_s_own(case: str) -> None:
    model = build(case)
    shapes = [(30, 40, 20), (1, 2, 3)]
    expected = {"gpt_neo": Layout.ROWS, "llama4_text": Layout.MASKED}
    assert checked(model, shapes) is expected.get(case, Layout.PACKED)


@pytest.mark.parametrize("case", ["llama, RoPE dynamic", "phi3, RoPE longrope"])
def test_positions_that_depend_on_the_batch_are_refused_beyond_their_reach(case: str) -> None:
    model = build(case)
    with pytest.raises(
        ModelError, match=r"a sequence of 70 tokens, and beyond 64 .* set data.max_length to 64 or less"
    ):
        checked(model, [(30, 40, 20), (1, 2, 3)])
    assert checked(model) is Layout.PACKED
    with pytest.raises(ModelError, match="a sequence of 70 tokens, and beyond 64"):
        model(**pack(*some_groups([(30, 40, 20)]))._asdict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_the_place_in_the_row_is_never_packed_beyond_its_reach(dtype: torch.dtype) -> None:
    """A temperature that moves log-probs by less than bfloat16 rounds them."""
    model = build("llama4_text").to(dtype)
    for module in model.modules():
        if hasattr(module, "floor_scale"):
            module.floor_scale, module.attn_scale = 48.0, 1e-3
    assert checked(model) is Layout.ROWS
    assert checked(model, [(10, 20, 10), (2, 3, 4)]) is Layout.MASKED
    with pytest.raises(ModelError, match="a packed row of 56 tokens, and beyond 47"):
        model(**pack(*some_groups(LONG_AND_SHORT), Layout.MASKED)._asdict())


def test_rounding_of_bfloat16_does_not_hide_a_wrong_layout() -> None:
    assert checked(build("mpt").to(torch.bfloat16), [(30, 40, 20), (1, 2, 3)]) is Layout.ROWS


def test_a_family_whose_own_forward_fails_says_so() -> None:
    with pytest.raises(ModelError, match="xlstm: its own forward fails: expected m1 and m2 to have the same dtype"):
        checked(build("xlstm").to(torch.bfloat16))


@pytest.mark.parametrize("case", ["falcon", "persimmon", "opt, layerdrop"])
def test_dropout_is_off_wherever_a_family_reads_it_and_stays_in_the_saved_config(case: str) -> None:
    model = build(case)
    layout = checked(model)
    assert layout is (Layout.MASKED if case == "falcon" else Layout.PACKED)
    packed = pack(*some_groups(SHAPES), layout)
    evaluated = model(**packed._asdict()).token_logps
    model.train()
    assert torch.equal(model(**packed._asdict()).token_logps, evaluated)
    assert 0.5 in {value for name, value in vars(model.config).items() if "drop" in name}


def test_a_router_that_draws_lots_is_refused() -> None:
    with pytest.raises(ModelError, match="phimoe: two forwards of the same tokens in training mode differ"):
        checked(build("phimoe"), [(30, 40, 20), (1, 2, 3)])


def test_a_state_that_a_longer_batch_leaves_behind_is_found() -> None:
    class Stateful(nn.Module):
        """Embeddings that double for good once they have seen 40 tokens in a row."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.weight, self.factor = inner, inner.weight, 1.0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            self.factor = 2.0 if ids.shape[1] >= 40 else self.factor
            return self.factor * self.inner(ids)

    model = tiny_model("gpt2")
    model.transformer.wte = Stateful(model.transformer.wte)
    with pytest.raises(ModelError, match="this model cannot be scored"):
        checked(model)


def test_groups_of_any_size_are_checked_completion_by_completion() -> None:
    shapes = [(3, 5, 1, 2, 9, 1, 4, 1, 3, 2), (12, 9), (0, 4, 1, 7), (0, 1)]
    assert checked(tiny_model("gemma2"), shapes) is Layout.PACKED
    assert checked(tiny_model("bloom"), shapes) is Layout.ROWS


def test_a_branch_that_sees_too_much_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third completion sees its prompt with the first completion; without a third there is nothing to find."""

    def wrong(states: Any, branch: Any) -> torch.Tensor:
        _, parts = states
        if branch.trunk is not None and branch.own == branch.trunk + 2:
            return torch.cat([parts[branch.trunk], parts[branch.own]], dim=2)
        return seen(states, branch)

    seen = attention_module._seen
    monkeypatch.setattr(attention_module, "_seen", wrong)
    assert checked(tiny_model("llama"), [(3, 4, 5), (2, 3)]) is Layout.PACKED
    assert checked(tiny_model("llama"), [(3, 4, 5, 6), (2, 3)]) is Layout.MASKED


def test_a_mask_that_is_wrong_for_the_third_completion_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the third completion for the second, so that the third looks at both. CodeGen's attention is its own."""
    monkeypatch.setattr(
        "fpo.scoring.masks.attention_mask",
        lambda group, branch, *rest, **more: attention_mask(group, branch.clamp(max=2), *rest, **more),
    )
    assert checked(build("codegen"), [(3, 4, 5), (2, 3)]) is Layout.MASKED
    assert checked(build("codegen"), [(3, 4, 5, 6), (2, 3)]) is Layout.ROWS


def test_a_wrong_mask_is_found_and_rows_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fpo.scoring.masks.attention_mask",
        lambda group, *_, **__: torch.ones(group.shape[0], 1, group.shape[1], group.shape[1], dtype=torch.bool).tril(),
    )
    assert checked(build("codegen")) is Layout.ROWS


def test_a_model_that_no_layout_reproduces_is_refused_with_each_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = check_module._score
    monkeypatch.setattr(check_module, "_score", lambda *args: [logps + 0.01 for logps in wrong(*args)])
    with pytest.raises(ModelError) as refused:
        checked(tiny_model("llama"))
    said = str(refused.value).splitlines()
    assert said[0].startswith("llama: this model cannot be scored")
    assert [line.split(" nats")[0] for line in said[1:]] == [f"  {layout}: off by 0.01" for layout in Layout]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(ModelError, match=r"llama: weights give NaN or infinity: model.layers.1.mlp.up_proj;"):
        checked(model)


@pytest.mark.parametrize(("config", "kind"), [(BertConfig(), "looks at what follows"), (T5Config(), "an encoder and")])
def test_an_encoder_is_refused_by_its_config_before_weights_are_looked_for(
    config: BertConfig | T5Config, kind: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{config.model_type} is not a causal language model: .*{kind}"):
        load_model(tmp_path, "float32")


DATA = Path(__file__).parents[2] / "shared/data"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs a trained model and real pairs")
def test_rounding_refuses_no_pair_of_short_answers() -> None:
    """One token of text that the model did not write: rounding moves its log-prob by up to 0.1 nats."""
    model = load_model(DATA / "models/stories260K", "bfloat16")
    install_scoring(model)
    tokenizer = load_tokenizer(str(DATA / "models/stories260K"), None)
    lines = (DATA / "pairs/llms_from_scratch.str.jsonl").read_text().splitlines()[:40]
    for row in map(json.loads, lines):
        prompt, chosen, rejected = (tokenizer(row[side])["input_ids"] for side in ("prompt", "chosen", "rejected"))
        ids = np.array([*prompt[-60:], chosen[1], rejected[-1]])
        assert (
            choose_layout(model, ids, np.array([0, len(ids) - 2, len(ids) - 1, len(ids)]), np.array([2]))
            is Layout.PACKED
        )


def few_of(shapes: list[tuple[int, ...]]) -> list[int]:
    _, splits, n_completions = some_groups(shapes)
    return extremes(splits, n_completions).tolist()


def test_extremes_are_the_longest_sequence_the_longest_group_the_largest_and_the_shortest() -> None:
    """Sequences 150 170 12 170 15 13, groups 290 190 22 180 25 16; the last two have three completions."""
    shapes = [(10, 140, 140), (150, 20, 20), (2, 10, 10), (160, 10, 10), (10, 5, 5, 5), (10, 3, 2, 1)]
    assert few_of(shapes[:4]) == [1, 0, 2]
    assert few_of(shapes) == [1, 0, 4, 5]
    assert few_of(shapes[:1]) == [0]


def test_the_shortest_group_stands_last_also_where_it_has_the_longest_sequence() -> None:
    """Sequences 10 and 8, groups 11 and 14."""
    assert few_of([(2, 8, 1), (2, 6, 6)]) == [1, 0]


def test_the_check_looks_at_evenly_spaced_tokens_where_all_logits_would_be_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(check_module, "CHUNK_BYTES", 3 * 97 * 4)
    assert check_module._looked_at(21, model).tolist() == [0, 10, 20]
    assert check_module._looked_at(2, model).tolist() == [0, 1]
    assert checked(model) is Layout.PACKED


def test_a_multimodal_model_is_scored_by_its_text_decoder() -> None:
    text = {**FAMILIES["gemma3_text"], "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert checked(model) is Layout.PACKED


def test_a_layer_of_parallel_streams_says_what_to_name_instead() -> None:
    model = build("gemma3n_text")
    install_scoring(model, ("model.layers.1",))
    with pytest.raises(ModelError, match=r"model.layers.1 gives 4 streams per token.*model.layers.1.mlp"):
        model(**pack(*some_groups(SHAPES))._asdict())


@pytest.mark.parametrize("layout", Layout)
def test_padding_gives_no_gradient_of_nan_where_its_embedding_would_be_zero(layout: Layout) -> None:
    """Gemma 3n divides by the norm of its streams; its token 0 is padding, with an embedding of zeros."""
    model = build("gemma3n_text")
    install_scoring(model)
    packed = pack(*some_groups(SHAPES), layout)
    model(**packed._asdict()).token_logps.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
