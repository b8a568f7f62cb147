"""A hookpoint is the module whose output the SAE reads, by one name, whatever stands around the model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, LLAMA_LIKE, layer_of, tiny_model
from torch import nn

from fpo.errors import ModelError
from fpo.scoring.hook_names import in_our_words
from fpo.scoring.hookpoints import (
    capture,
    check_hookpoint,
    final_norm_name,
    hookpoint_names,
    hookpoint_width,
    resolve_hookpoint,
    same_hookpoint,
)

TOKENS = torch.arange(1, 9)[None]
INSIDE = {
    "gpt2": ("transformer.h.1.attn", "transformer.h.1.mlp"),
    "gpt_neox": ("gpt_neox.layers.1.attention", "gpt_neox.layers.1.mlp"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_outputs_are_the_hidden_states_except_the_last_which_is_before_the_final_norm(family):
    model = tiny_model(family)
    names = hookpoint_names(model)
    assert names[1] == layer_of(family)
    assert len(names) == model.config.num_hidden_layers
    norm = final_norm_name(model)
    assert norm is not None
    with torch.no_grad(), capture(model, [*names, norm]) as outputs:
        hidden_states = model(TOKENS, output_hidden_states=True).hidden_states
    for name, expected in zip(names[:-1], hidden_states[1:-1], strict=True):
        assert torch.equal(outputs[name], expected)
    assert torch.equal(outputs[norm], hidden_states[-1])
    assert not torch.allclose(outputs[names[-1]], hidden_states[-1])
    with torch.no_grad():
        assert torch.equal(resolve_hookpoint(model, norm)(outputs[names[-1]]), hidden_states[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_outputs_are_one_tensor_of_hidden_size(family):
    model = tiny_model(family)
    names = INSIDE.get(family, ("model.layers.1.self_attn", "model.layers.1.mlp"))
    with torch.no_grad(), capture(model, names) as outputs:
        model(TOKENS)
    assert [tuple(outputs[name].shape) for name in names] == [(1, 8, 32)] * 2
    for name in names:
        check_hookpoint(model.config.to_dict(), name)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_input_is_what_the_module_is_called_with(family):
    """Held against what stands before it: the layer before, the norm before, and the projection of what is captured."""
    model = tiny_model(family)
    layer = layer_of(family)
    projection = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}.get(family, "self_attn.o_proj")
    norm = {
        "gpt2": "ln_2",
        "gpt_neox": "post_attention_layernorm",
        "gemma2": "pre_feedforward_layernorm",
        "gemma3_text": "pre_feedforward_layernorm",
    }.get(family, "post_attention_layernorm")
    before = hookpoint_names(model)[0]
    places = [before, f"{layer}:input", f"{layer}.{norm}", f"{layer}.mlp:input", f"{layer}.{projection}"]
    with torch.no_grad(), capture(model, [*places, f"{layer}.{projection}:input"]) as outputs:
        model(TOKENS)
        assert torch.equal(outputs[f"{layer}:input"], outputs[before])
        assert torch.equal(outputs[f"{layer}.mlp:input"], outputs[f"{layer}.{norm}"])
        heads = outputs[f"{layer}.{projection}:input"]
        expected = outputs[f"{layer}.{projection}"].clone()
        assert torch.equal(resolve_hookpoint(model, f"{layer}.{projection}")(heads), expected)
    assert heads.shape[-1] == hookpoint_width(model.config.to_dict(), f"{layer}.{projection}:input")
    assert hookpoint_width(model.config.to_dict(), f"{layer}.mlp:input") == 32
    for name in (f"{layer}:input", f"{layer}.mlp:input", f"{layer}.{projection}:input"):
        check_hookpoint(model.config.to_dict(), name)


@pytest.mark.parametrize(
    ("name", "model_type", "path"),
    [
        ("model.layers.3.mlp", "llama", "model.layers.3.mlp"),
        ("layers.3.mlp", "llama", "model.layers.3.mlp"),
        ("h.3.attn", "gpt2", "model.layers.3.attn"),
        ("blocks.3.hook_resid_post", "llama", "model.layers.3"),
        ("blocks.3.hook_resid_pre", "gpt2", "transformer.h.2"),
        ("blocks.0.hook_resid_pre", "gpt2", "transformer.h.0:input"),
        ("blocks.3.hook_resid_mid", "gpt2", "transformer.h.3.ln_2:input"),
        ("blocks.3.hook_resid_mid", "gemma2", "model.layers.3.pre_feedforward_layernorm:input"),
        ("blocks.3.hook_resid_mid", "gpt_neox", "blocks.3.hook_resid_mid"),
        ("blocks.3.hook_mlp_out", "llama", "model.layers.3.mlp"),
        ("blocks.3.hook_mlp_out", "gemma2", "model.layers.3.post_feedforward_layernorm"),
        ("blocks.3.hook_attn_out", "gemma3_text", "model.layers.3.post_attention_layernorm"),
        ("blocks.3.attn.hook_z", "llama", "model.layers.3.self_attn.o_proj:input"),
        ("blocks.3.attn.hook_z", "gpt2", "transformer.h.3.attn.c_proj:input"),
        ("blocks.3.mlp.hook_in", "qwen3", "model.layers.3.mlp:input"),
        ("model.layers.3.mlp.input", "gemma3", "model.layers.3.mlp:input"),
        ("blocks.3.ln2.hook_normalized", "llama", "blocks.3.ln2.hook_normalized"),
    ],
)
def test_names_of_other_libraries_become_ours(name, model_type, path):
    assert in_our_words(name, model_type) == path


@pytest.mark.parametrize("family", FAMILIES)
def test_model_layers_n_means_the_nth_layer_of_every_family(family):
    model = tiny_model(family)
    layer = resolve_hookpoint(model, layer_of(family))
    assert resolve_hookpoint(model, "model.layers.1") is layer
    assert resolve_hookpoint(model, "model.layers.1.mlp") is layer.mlp
    check_hookpoint(model.config.to_dict(), "model.layers.1")


def test_a_multimodal_model_answers_to_the_names_of_its_text_model():
    """The vision tower has a list of layers, too, here of the same length: it is not the decoder's."""
    from transformers import AutoModelForImageTextToText, Gemma3Config

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**LLAMA_LIKE, "model_type": "gemma3_text"}, vision_config={**vision, "image_size": 28}
    )
    model = AutoModelForImageTextToText.from_config(config)
    assert hookpoint_names(model)[2] == "model.language_model.layers.2"
    layer = resolve_hookpoint(model, "model.language_model.layers.2")
    assert resolve_hookpoint(model, "model.layers.2") is layer
    assert type(layer).__name__ == "Gemma3DecoderLayer"
    check_hookpoint(config.to_dict(), "model.layers.2")
    with pytest.raises(ModelError, match="3 layers"):
        check_hookpoint(config.to_dict(), "model.layers.3")


class Wrapper(nn.Module):
    """What DDP does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


# peft 0.21 still asks transformers 5.23 for the old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_wrappers_do_not_change_the_name_of_a_place():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    layer, names = resolve_hookpoint(model, "model.layers.1"), hookpoint_names(model)
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for wrapped in (lora, Wrapper(lora), Wrapper(Wrapper(model))):
        assert resolve_hookpoint(wrapped, "model.layers.1") is layer
        assert hookpoint_names(wrapped) == names
        with capture(wrapped, ["model.layers.1"]) as outputs:
            wrapped(TOKENS)
        assert outputs["model.layers.1"].shape == (1, 8, 32)


def test_a_bare_decoder_has_names_of_its_own():
    model = tiny_model("llama").model
    assert hookpoint_names(model) == ["layers.0", "layers.1", "layers.2"]
    assert final_norm_name(model) == "norm"
    assert resolve_hookpoint(model, "model.layers.1") is model.layers[1]


def test_captured_outputs_carry_gradients_and_hooks_leave_with_the_context():
    model = tiny_model("llama")
    expected = model(TOKENS).logits
    with capture(model, ["model.layers.0", "model.layers.2"]) as outputs:
        assert torch.equal(model(TOKENS).logits, expected)
    outputs["model.layers.2"].square().sum().backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad.any()
    assert model.lm_head.weight.grad is None
    outputs.clear()
    model(TOKENS)
    assert outputs == {}
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_gradient_of_the_plain_model(use_reentrant):
    grads = []
    for checkpointed in (False, True):
        model = tiny_model("llama").train()
        if checkpointed:
            # transformers 5.23 renames it.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": use_reentrant})
        embeddings = model.get_input_embeddings()(TOKENS)
        with capture(model, ["model.layers.1"]) as outputs:
            model(inputs_embeds=embeddings)
        outputs["model.layers.1"].square().sum().backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)


def test_hooks_leave_when_the_forward_fails():
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="stop"), capture(model, ["model.layers.0"]):
        raise RuntimeError("stop")
    assert not model.model.layers[0]._forward_hooks


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("llama", "model.layers.3", "this model has 3 layers, model.layers.0 to model.layers.2"),
        ("llama", "transformer.h.1", "this model has 3 layers, model.layers.0 to model.layers.2"),
        ("llama", "model.layers.1.self_atn", "nearest: model.layers.1.self_attn"),
        ("llama", "model.layer.1", "nearest: model.layers.1"),
        ("gpt2", "transformer.h.7", "this model has 3 layers, transformer.h.0 to transformer.h.2"),
        ("gpt2", "transformer.h.1.self_attn", "nearest: transformer.h.1.attn"),
        ("llama", "", "no hookpoint"),
    ],
)
def test_an_unknown_hookpoint_names_the_layers_and_what_is_near(family, name, message):
    with pytest.raises(ModelError) as error, capture(tiny_model(family), [name]):
        pass
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match="Linear has no list of decoder layers"):
        resolve_hookpoint(nn.Linear(2, 2), "model.layers.0")


LLAMA = {"model_type": "llama", "num_hidden_layers": 12}
GPT2 = {"model_type": "gpt2", "n_layer": 12}


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (LLAMA, "model.layers.12", "this model has 12 layers, model.layers.0 to model.layers.11"),
        (GPT2, "transformer.h.12.mlp", "this model has 12 layers, transformer.h.0 to transformer.h.11"),
        ({"n_layer": 2}, "model.layers.2", "this model has 2 layers"),
        (LLAMA, "transformer.h.3", "did you mean model.layers.3?"),
        (GPT2, "gpt_neox.layers.3", "did you mean transformer.h.3?"),
        (LLAMA, "model.layers.3.self_atn", "did you mean model.layers.3.self_attn?"),
        (LLAMA, "model.layers.3.attn", "a layer of a llama model has self_attn, mlp"),
        (LLAMA, "model.layer.3", "did you mean model.layers.3?"),
        (LLAMA, "model.layers.3.mpl:input", "did you mean model.layers.3.mlp?"),
        (LLAMA, "model.layers.12.mlp:input", "this model has 12 layers"),
        (LLAMA, "blocks.2.ln2.hook_normalized", "no module gives or reads it"),
        (LLAMA, "hidden_states.3", "did you mean model.layers.2?"),
        (LLAMA, "hidden_states.12", "did you mean model.layers.11?"),
        (LLAMA, "hidden_states.0", "no module gives or reads it"),
    ],
)
def test_a_config_alone_refuses_a_hookpoint_that_cannot_be(config, name, message):
    with pytest.raises(ModelError) as error:
        check_hookpoint(config, name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA, "model.layers.11"),
        (LLAMA, "model.layers.3.mlp.down_proj"),
        (LLAMA, "model.layers.3.self_attn.o_proj:input"),
        (LLAMA, "model.layers.0:input"),
        (LLAMA, "model.norm"),
        (GPT2, "transformer.h.3.attn"),
        (GPT2, "model.layers.3.attn"),
        ({"model_type": "unheard_of", "num_hidden_layers": 4}, "model.layers.3.mixer"),
        ({"model_type": "unheard_of"}, "anything"),
    ],
)
def test_a_config_lets_pass_what_fits_and_what_it_cannot_tell(config, name):
    check_hookpoint(config, name)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("model.layers.3", "model.language_model.layers.3", True),
        ("transformer.h.3.mlp", "model.layers.3.mlp", True),
        ("model.layers.3", "model.layers.3.mlp", False),
        ("model.layers.3", "model.layers.4", False),
        ("model.norm", "model.norm", True),
        ("transformer.h.3.mlp:input", "model.layers.3.mlp:input", True),
        ("model.layers.3.mlp:input", "model.layers.3.mlp", False),
        ("model.layers.3:input", "model.layers.3", False),
    ],
)
def test_same_hookpoint_looks_past_prefixes(one, other, same):
    assert same_hookpoint(one, other) is same
