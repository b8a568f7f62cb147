"""
Log-probabilities of completions. Both stages call this module, so the reference and the policy are
measured by the same code. There is never a (batch, length, vocabulary) tensor: only positions that predict
a completion's token reach the head.

Dimension key:  N scored completion tokens   D hidden   V vocabulary   M most likely tokens   C completions
                A tokens asked for beside each target
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fpo.scoring.packing import Packed

Head = Callable[[Tensor], Tensor]

# Float32 logits of a step that autograd may keep. Beyond it the head runs in chunks whose logits are
# computed again in backward: a third more time on a small model's step, but the step fits at a 256k vocabulary.
LOGITS_BUDGET_BYTES = 1 << 30
CHUNK_BYTES = 1 << 28

# Float32 logits that are summarised at a time. On a CPU they stay in a core's cache, so that all statistics together
# take less than one logsumexp over all rows (docs/log.md); a GPU would wait for the starts of its kernels: not timed.
BLOCK_BYTES = 1 << 19
GPU_BLOCK_BYTES = 1 << 26

# Mean |difference| of token log-probs, nats. float32 on another device or attention kernel stays below 1e-4;
# bfloat16 rounds logits to 3 digits, which moves a token by about 0.02.
LOGPS_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}


class TokenLogps(NamedTuple):
    """What the head says about the scored tokens."""

    logps: Float[Tensor, " N"]
    """Log-probability of each target given what precedes it, in nats, float32."""
    asked_logps: Float[Tensor, "N A"]
    """The same of the tokens that were asked for in the place of each target."""
    top_indices: Int[Tensor, "N M"]
    """The M most likely tokens at each position, most likely first."""
    top_logps: Float[Tensor, "N M"]
    """Their log-probabilities."""
    log_sum_squares: Float[Tensor, " S"]
    """Log of the summed squares of all probabilities at each position, N of them or, where not asked for, none."""
    entropy: Float[Tensor, " N"]
    """Of the next token at each position, nats; without gradient, as what follows."""
    mean_logits: Float[Tensor, " N"]
    """Mean logit over the vocabulary."""
    is_top: Float[Tensor, " N"]
    """1 where no token has a larger logit than the target, else 0."""


def token_logps(
    hidden: Float[Tensor, "N D"],
    targets: Int[Tensor, " N"],
    head: Head,
    *,
    asked: Int[Tensor, "N A"] | None = None,
    top: int = 0,
    squares: bool = False,
) -> TokenLogps:
    """
    Log-probability of each target token.

    hidden   output of the decoder (after its final norm) at the predicting positions
    head     hidden -> logits over the vocabulary
    asked    further tokens in the place of each target; None asks for none
    top      how many most likely tokens to report besides; without gradient
    squares  whether to report log_sum_squares, without gradient; costs another float32 copy of the logits
    """

    columns = targets[:, None] if asked is None else torch.cat([targets[:, None], asked], dim=1)

    def score(hidden_chunk: Tensor, column_chunk: Tensor) -> TokenLogps:
        logits = head(hidden_chunk).float()
        logps, said = _GatheredLogSoftmax.apply(logits, column_chunk)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            best = logits.topk(top, dim=-1)
            best_logps = best.values - logits.logsumexp(-1, keepdim=True) if top else best.values
            summed = _log_sum_squares(logits) if squares else logits.new_empty(0)
        return TokenLogps(logps[:, 0], logps[:, 1:], best.indices, best_logps, summed, *said.unbind(-1))

    vocabulary = _vocabulary(head, hidden)
    total = hidden.shape[0] * vocabulary * 4
    if total <= (LOGITS_BUDGET_BYTES if torch.is_grad_enabled() else CHUNK_BYTES):
        return score(hidden, columns)
    rows = max(1, CHUNK_BYTES // (vocabulary * 4))
    chunks = []
    for hidden_chunk, column_chunk in zip(hidden.split(rows), columns.split(rows), strict=True):
        if torch.is_grad_enabled():
            chunks.append(checkpoint(score, hidden_chunk, column_chunk, use_reentrant=False))
        else:
            chunks.append(score(hidden_chunk, column_chunk))
    return TokenLogps(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def sum_logps(token_logps: Float[Tensor, " N"], packed: Packed) -> Float[Tensor, " C"]:
    """Log-probability of each completion, in nats: the sum over its tokens that count, float32."""
    completion = packed.counting(packed.completion)
    return token_logps.new_zeros(len(packed.counts)).index_add(0, completion, packed.counting(token_logps))


def _log_sum_squares(logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    return (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)


def _vocabulary(head: Head, hidden: Tensor) -> int:
    weight = getattr(head, "weight", None)
    if weight is not None and weight.ndim == 2:
        return int(weight.shape[0])
    # Sharded or wrapped heads do not show their shape: ask one row.
    with torch.no_grad():
        return int(head(hidden[:1]).shape[-1])


def _block_bytes(device: torch.device) -> int:
    return BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES


def _summary(logits: Float[Tensor, "B V"]) -> Float[Tensor, "B 4"]:
    """Of each row: logsumexp, as torch computes it; entropy in nats; mean; maximum."""
    largest = logits.amax(-1, keepdim=True)
    below = logits - largest
    masses = below.exp()
    total = masses.sum(-1, keepdim=True)
    # p = masses / total, so the entropy, -sum p log p, is log(total) - sum p * below: no large numbers cancel.
    entropy = total.log() - masses.mul_(below).sum(-1, keepdim=True) / total
    return torch.cat([total.log() + largest, entropy, logits.mean(-1, keepdim=True), largest], dim=1)


class _GatheredLogSoftmax(torch.autograd.Function):
    """
    log_softmax(logits)[columns], (N, A) of each row, without keeping the (N, V) log-softmax: forward keeps logits and
    one logsumexp per row, backward makes the sum of onehot - softmax in a single buffer. Beside it, without gradient,
    (N, 3): entropy, mean logit and whether the first column has the largest.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        rows = max(1, _block_bytes(logits.device) // (logits.shape[1] * 4))
        blocks = [_summary(block) for block in logits.split(rows)]
        normaliser, entropy, mean, largest = torch.cat(blocks).split(1, dim=-1)
        ctx.save_for_backward(logits, columns, normaliser)
        gathered = logits.gather(-1, columns)
        said = torch.cat([entropy, mean, (gathered[:, :1] == largest).float()], dim=1)
        ctx.mark_non_differentiable(said)
        return gathered - normaliser, said

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, columns, normaliser = ctx.saved_tensors
        grad = grads[0]
        grad_logits = (logits - normaliser).exp_().mul_(-grad.sum(-1, keepdim=True))
        grad_logits.scatter_add_(1, columns, grad)
        return grad_logits, None
