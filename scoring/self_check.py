"""
Does the SAE fit what the hookpoint gives? A wrong layer, a tensor after the final norm, a missing threshold or a
doubled b_dec train without a complaint; they show in how many features are active (L0) and how much of the
variance is unexplained (FVU), and nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from fpo.errors import ModelError, SelfCheckError
from fpo.scoring.hook_names import INPUT
from fpo.scoring.hookpoints import capture, final_norm_name, hookpoint_names, resolve_hookpoint, same_hookpoint
from fpo.scoring.packing import Packed
from fpo.scoring.sae import Decoder, Sae

# Seen over wrong loads: a wrong layer moves L0 by 1.4x, a missing threshold by 13x, b_dec left in by 3x. Real data
# against the data that an SAE was measured on moves it by up to 2x.
L0_RATIO = 2.5
# Another place fits better only where its FVU is this much lower. On 512 tokens the ratio of two layers' FVU spreads by
# up to 5 % (standard deviation over 40 draws of real tokens); a really wrong layer has at least twice the FVU.
FVU_MARGIN = 0.15
# Up to here an SAE at its best-fitting hookpoint explains so much that model and input scaling must be right: an L0 far
# below the advertised one then means that the file gives an average of early training, as some trainers write.
GOOD_FVU = 0.5
# Above this the SAE explains so little that no choice of hookpoint is worth training against; published SAEs
# reach 0.1-0.45 at their own hookpoint.
FVU_LIMIT = 0.8


@dataclass(frozen=True)
class SelfCheck:
    """What one SAE does on real tokens, at its hookpoint and elsewhere."""

    hookpoint: str
    tokens: int
    """Scored completion tokens that it was measured on."""
    l0: float
    advertised_l0: float | None
    fvu: float
    """At the hookpoint: fraction of variance unexplained."""
    elsewhere: dict[str, float]
    """FVU at the same module of the other layers, and after the final norm."""

    @property
    def best(self) -> str:
        """The hookpoint that the SAE fits best, by more than chance where it is another."""
        other = min(self.elsewhere, key=self.elsewhere.__getitem__, default=self.hookpoint)
        return other if self.elsewhere.get(other, self.fvu) < (1 - FVU_MARGIN) * self.fvu else self.hookpoint

    @property
    def note(self) -> str | None:
        """What a user should know of an SAE that fits all the same."""
        if self._too_few and self._cause() is None:
            return "the advertised L0 is wrong or old: the SAE fits, and far fewer features are active"
        return None

    @property
    def _too_few(self) -> bool:
        return self.advertised_l0 is not None and self.l0 * L0_RATIO < self.advertised_l0

    def raise_if_unfit(self) -> None:
        """SelfCheckError with the figures, the best-fitting hookpoint and the likely cause."""
        figures = f"L0 {self.l0:.1f}" + (f" (advertised {self.advertised_l0:g})" if self.advertised_l0 else "")
        cause = self._cause()
        if cause is not None:
            raise SelfCheckError(
                f"the SAE does not fit {self.hookpoint}: {cause}\n"
                f"  measured on {self.tokens} tokens: {figures}, FVU {self.fvu:.3f}; "
                f"best fit {self.best} with FVU {self.elsewhere.get(self.best, self.fvu):.3f}\n"
                "  mend the recipe, or set self_check: false in this entry of features to go on regardless"
            )

    def _cause(self) -> str | None:
        if math.isnan(self.fvu):
            return "its tokens are all alike, so nothing can be measured"
        if self.best != self.hookpoint:
            return f"it explains {self.best} better, so the hookpoint is probably wrong"
        if not self.fvu <= FVU_LIMIT:
            return f"FVU {self.fvu:.2f} is above {FVU_LIMIT}; probably another model, or another input scaling"
        if self.advertised_l0 and self.l0 > L0_RATIO * self.advertised_l0:
            return "far more features are active than advertised; probably a threshold or bias is not applied"
        if self._too_few and self.fvu > GOOD_FVU:
            return "far fewer features are active than advertised; probably another model or input scaling"
        return None


@torch.inference_mode()
def check_sae(model: PreTrainedModel, sae: Sae, decoder: Decoder, hookpoint: str, packed: Packed) -> SelfCheck:
    """
    Measure an SAE on the scored positions of a packed batch, at its hookpoint and at every comparable place.

    model    with scoring installed, on the device of `sae` and `packed`
    decoder  what read_decoder returns
    """
    places = _places(model, hookpoint, sae.facts.predicts)
    with capture(model, {name for pair in places.items() for name in pair}) as outputs:
        model(**packed._asdict())
    measured: dict[str, tuple[float, float]] = {}
    for name, predicted in places.items():
        x, target = _scored(outputs[name], packed), _scored(outputs[predicted], packed)
        if x.shape[-1] == sae.facts.d_in and target.shape[-1] == len(decoder.b):
            measured[name] = sae.fvu_and_l0(x, decoder, None if predicted == name else target)
    if hookpoint not in measured:
        raise ModelError(f"{places[hookpoint]}: it is not as wide as what the transcoder predicts ({len(decoder.b)})")
    fvu, l0 = measured.pop(hookpoint)
    return SelfCheck(
        hookpoint=hookpoint,
        tokens=len(packed.targets),
        l0=l0,
        advertised_l0=sae.facts.advertised_l0,
        fvu=fvu,
        elsewhere={name: value for name, (value, _) in measured.items()},
    )


def _scored(output: Tensor, packed: Packed) -> Float[Tensor, "N D"]:
    return output.flatten(0, 1)[packed.predictors]


def _places(model: PreTrainedModel, hookpoint: str, predicts: str | None) -> dict[str, str]:
    """The hookpoint and the comparable places, each with the one that a decoder there is held against."""
    others = [name for name in _comparable(model, hookpoint) if not same_hookpoint(name, hookpoint)]
    if predicts is None:
        return {name: name for name in (hookpoint, *others)}
    targets = [name for name in _comparable(model, predicts) if not same_hookpoint(name, predicts)]
    pairs = zip(others, targets, strict=True) if len(others) == len(targets) else ()
    return {hookpoint: predicts, **dict(pairs)}


def _comparable(model: PreTrainedModel, hookpoint: str) -> list[str]:
    """The same place in every layer, and the final norm where the hookpoint is a layer's output."""
    layers = hookpoint_names(model)
    target = resolve_hookpoint(model, hookpoint)
    modules = dict(model.named_modules())
    path = next(name for name, module in modules.items() if module is target)
    owner = next((layer for layer in layers if path == layer or path.startswith(layer + ".")), None)
    if owner is None:
        return []
    inside, side = path[len(owner) :], INPUT if hookpoint.endswith(INPUT) else ""
    norm = final_norm_name(model) if not inside + side else None
    return [layer + inside + side for layer in layers if layer + inside in modules] + ([norm] if norm else [])
