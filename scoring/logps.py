"""
Log-probabilities of completions. Both stages call this module, so the reference and the policy are
measured by the same code. There is never a (batch, length, vocabulary) tensor: only positions that predict
a completion's token reach the head.

Dimension key:  N scored completion tokens   D hidden   V vocabulary   M most likely tokens   C completions
                A tokens asked for beside each target   B rows of a block
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fpo.scoring.packing import Packed

# What a step may keep of its logits for backward, which makes as much again of gradient. Beyond it the head runs again
# in backward, in chunks: a third more time for it, but the step fits at a 256k vocabulary. Chunks of 256 MiB take a
# quarter less time than those of 32, for each adds to the gradient of 256k rows of weights; larger ones gain little.
LOGITS_BUDGET_BYTES = 1 << 30
CHUNK_BYTES = 1 << 28

# Float32 logits that are summarised at a time. On a CPU they stay in its cache, so that all statistics together take
# less than one logsumexp over all rows (docs/log.md); a GPU would wait for the starts of its kernels: not timed.
BLOCK_BYTES = 1 << 21
GPU_BLOCK_BYTES = 1 << 26

# Mean |difference| of token log-probs, nats. float32 on another device or attention kernel stays below 1e-4;
# bfloat16 rounds logits to 3 digits, which moves a token by about 0.02.
LOGPS_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}


@runtime_checkable
class Head(Protocol):
    """Hidden states to logits, in two steps."""

    def project(self, hidden: Tensor) -> Tensor:
        """(N, D) to (N, V), in any dtype: the products with weights."""

    def adjust(self, projected: Tensor) -> Tensor:
        """The logits of some of these rows, such as soft-capped ones; without weights, so that backward can redo it."""

    def row_bytes(self, hidden: Tensor) -> int:
        """What autograd keeps of (N, V), of each row: what `project` gives, and where that needs more copies, these."""

    @property
    def draws(self) -> bool:
        """Whether `project` draws random numbers."""


class TokenLogps(NamedTuple):
    """What the head says about the scored tokens."""

    logps: Float[Tensor, " N"]
    """Log-probability of each target given what precedes it, in nats, float32."""
    asked_logps: Float[Tensor, "N A"]
    """The same of the tokens that were asked for in the place of each target."""
    top_indices: Int[Tensor, "N M"]
    """The M most likely tokens at each position, most likely first; without gradient, as what follows."""
    top_logps: Float[Tensor, "N M"]
    """Their log-probabilities."""
    log_sum_squares: Float[Tensor, " N"]
    """Log of the summed squares of all probabilities at each position."""
    entropy: Float[Tensor, " N"]
    """Of the next token at each position, nats."""
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
) -> TokenLogps:
    """
    Log-probability of each target token.

    hidden   output of the decoder (after its final norm) at the predicting positions
    asked    further tokens in the place of each target; None asks for none
    top      how many most likely tokens to report besides
    """
    columns = targets[:, None] if asked is None else torch.cat([targets[:, None], asked], dim=1)
    score = functools.partial(_score, head, top)
    row_bytes, training = head.row_bytes(hidden), torch.is_grad_enabled()
    if len(hidden) * row_bytes <= (LOGITS_BUDGET_BYTES if training else CHUNK_BYTES):
        return score(hidden, columns)
    # All rows in chunks, or none: FSDP2 lets go of the weights when one of several calls has gone backward, so every
    # other call has to gather them again.
    again = functools.partial(checkpoint, score, use_reentrant=False, preserve_rng_state=head.draws)
    rows = max(1, CHUNK_BYTES // row_bytes)
    chunks = zip(hidden.split(rows), columns.split(rows), strict=True)
    parts = [again(*chunk) if training else score(*chunk) for chunk in chunks]
    return TokenLogps(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def sum_logps(token_logps: Float[Tensor, " N"], packed: Packed) -> Float[Tensor, " C"]:
    """Log-probability of each completion, in nats: the sum over its tokens that count, float32."""
    completion = packed.counting(packed.completion)
    return token_logps.new_zeros(len(packed.counts)).index_add(0, completion, packed.counting(token_logps))


def _score(head: Head, top: int, hidden: Float[Tensor, "N D"], columns: Int[Tensor, "N A1"]) -> TokenLogps:
    found = _GatheredLogSoftmax.apply(head.project(hidden), columns, head.adjust, top)  # type: ignore[no-untyped-call]
    logps, said, top_indices, top_logps = found
    return TokenLogps(logps[:, 0], logps[:, 1:], top_indices, top_logps, *said.unbind(-1))


def _block_rows(projected: Tensor) -> int:
    return max(1, (BLOCK_BYTES if projected.device.type == "cpu" else GPU_BLOCK_BYTES) // (projected.shape[1] * 4))


def _summary(logits: Float[Tensor, "B V"], columns: Int[Tensor, "B A1"], top: int) -> tuple[Tensor, ...]:
    """
    Of each row: log-probs of the columns (B, A1); log_sum_squares, entropy in nats, mean logit and whether no logit is
    above the first column's (B, 4); the `top` most likely tokens and their log-probs (B, M); logsumexp (B, 1).
    """
    largest = logits.amax(-1, keepdim=True)
    below = logits - largest
    masses = below.exp()
    total = masses.sum(-1, keepdim=True)
    root = torch.linalg.vector_norm(masses, dim=-1, keepdim=True)
    # p = masses / total, so the entropy, -sum p log p, is log(total) - sum p * below: no large numbers cancel.
    entropy = total.log() - masses.mul_(below).sum(-1, keepdim=True) / total
    normaliser = total.log() + largest  # as torch computes it
    gathered, best = logits.gather(-1, columns), logits.topk(top, dim=-1)
    is_top = (gathered[:, :1] == largest).float()
    said = torch.cat([2 * (root / total).log(), entropy, logits.mean(-1, keepdim=True), is_top], dim=1)
    return gathered - normaliser, said, best.indices, best.values - normaliser, normaliser


class _GatheredLogSoftmax(torch.autograd.Function):
    """
    log_softmax(adjust(projected))[columns], (N, A) of each row, and nothing of (N, V) beside `projected`: logits are
    made in blocks, in forward and again in backward, which keeps one logsumexp per row.

    Beside it, without gradient, (N, 4) log_sum_squares, entropy, mean logit and whether the first column has the
    largest; (N, M) the most likely tokens and their log-probs.
    """

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, columns: Tensor, adjust: Callable[[Tensor], Tensor], top: int
    ) -> tuple[Tensor, ...]:
        rows, n = _block_rows(projected), len(projected)
        # Made before the blocks: what outlives a block and is made in one breaks the allocator's free memory up.
        logps, said, top_logps, normaliser = (
            projected.new_empty(n, width, dtype=torch.float32) for width in (columns.shape[1], 4, top, 1)
        )
        top_indices = columns.new_empty(n, top)
        outputs = (logps, said, top_indices, top_logps, normaliser)
        for block, asked, *into in zip(*(x.split(rows) for x in (projected, columns, *outputs)), strict=True):
            for output, found in zip(into, _summary(adjust(block).float(), asked, top), strict=True):
                output.copy_(found)
        ctx.save_for_backward(projected, columns, normaliser)
        ctx.adjust, device = adjust, projected.device.type
        ctx.autocast = torch.autocast(
            device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        ctx.mark_non_differentiable(said, top_indices, top_logps)
        return outputs[:-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        projected, columns, normaliser = ctx.saved_tensors
        grad_projected = torch.empty_like(projected)
        rows = _block_rows(projected)
        parts = (tensor.split(rows) for tensor in (grad_projected, projected, columns, normaliser, grads[0]))
        for into, block, asked, subtracted, grad in zip(*parts, strict=True):
            with torch.enable_grad(), ctx.autocast:
                leaf = block.detach().requires_grad_()
                logits = ctx.adjust(leaf).float()
            # The sum of onehot - softmax over the columns, each times its gradient.
            grad_logits = (logits.detach() - subtracted).exp_().mul_(-grad.sum(-1, keepdim=True))
            grad_logits.scatter_add_(1, asked, grad)
            into.copy_(*torch.autograd.grad(logits, leaf, grad_logits))
        return grad_projected, None, None, None
