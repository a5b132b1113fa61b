"""The linear head and its softmax as one differentiable function that holds one tile of the vocabulary at a time.

The forward pass keeps, of the tiles so far, each token's logit, the largest logit, the log of the sum and the entropy.
The backward pass computes each tile's logits again and turns them into its part of the gradients.

The cut runs through the vocabulary and not through the tokens: so a tile needs its own rows of the weight only, each
row of the weight's gradient is written once, as one product over all tokens (nothing is accumulated in bfloat16), and
the products stay large when there are many tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class TiledHead(torch.autograd.Function):
    """The computation of ``linear_logprobs``, which describes and checks the arguments.

    ``matmul_dtype`` is that of both factors of every matrix product, ``width`` the vocabulary entries of a tile.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        temperature: float,
        matmul_dtype: torch.dtype,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """Merge the summaries of the tiles into that of the vocabulary."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        inputs = hidden.to(matmul_dtype)
        parts = (
            _summarize(_linear(inputs, weight, bias, tile).to(dtype), token_ids, tile, temperature)
            for tile in _tiles(len(weight), width)
        )
        softmax = reduce(_merge, parts)
        ctx.save_for_backward(hidden, weight, bias, token_ids, softmax.peak + softmax.log_sum)
        ctx.temperature, ctx.matmul_dtype, ctx.width = temperature, matmul_dtype, width
        ctx.mark_non_differentiable(softmax.entropy)
        return softmax.chosen - softmax.peak - softmax.log_sum, softmax.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Compute each tile's probabilities again, and from them its part of the gradients.

        The gradient of a log-probability with respect to the logits is (one-hot - probabilities) / temperature. A
        token's factor, upstream gradient over temperature, enters on the narrow (P, H) side of the products.
        """
        hidden, weight, bias, token_ids, logsumexp = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype, matmul_dtype, temperature = logsumexp.dtype, ctx.matmul_dtype, ctx.temperature
        inputs = hidden.to(matmul_dtype)
        scale = (grad_logprobs / -temperature).unsqueeze(1)
        scaled_inputs = (hidden * scale).to(matmul_dtype)
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for tile in _tiles(len(weight), ctx.width):
                logits = _linear(inputs, weight, bias, tile).to(dtype)
                probs = torch.add(-logsumexp.unsqueeze(1), logits, alpha=1 / temperature, out=logits).exp_()
                column, inside = _columns(token_ids, tile)
                surplus = probs.scatter_add_(1, column, -inside.to(dtype).unsqueeze(1))
                if grad_bias is not None:
                    grad_bias[tile] = (surplus.T @ scale).squeeze(1)
                surplus = surplus.to(matmul_dtype)
                if grad_hidden is not None:
                    grad_hidden += surplus @ weight[tile].to(matmul_dtype)
                if grad_weight is not None:
                    grad_weight[tile] = surplus.T @ scaled_inputs
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(scale).to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _tiles(vocab_size: int, width: int) -> Iterator[slice]:
    """Consecutive parts of the vocabulary."""
    for start in range(0, vocab_size, width):
        yield slice(start, min(start + width, vocab_size))


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, tile: slice) -> Tensor:
    """(P, width) logits of one tile, in the dtype of the (P, H) inputs."""
    return functional.linear(
        inputs, weight[tile].to(inputs.dtype), None if bias is None else bias[tile].to(inputs.dtype)
    )


def _columns(token_ids: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """(P, 1) int64 column of each token in the tile, any column if it lies outside; and (P,) bool, True inside."""
    inside = (token_ids >= tile.start) & (token_ids < tile.stop)
    return (token_ids.clamp(tile.start, tile.stop - 1) - tile.start).unsqueeze(1), inside


class _Softmax(NamedTuple):
    """What is kept of the softmax over a part of the vocabulary, (P,) each.

    Attributes:
        chosen: logit of the token over temperature, 0 where the token is of another part.
        peak: largest logit over temperature.
        log_sum: log of the sum of the exponentials, relative to the peak.
        entropy: of the softmax over this part alone, in nats.
    """

    chosen: Tensor
    peak: Tensor
    log_sum: Tensor
    entropy: Tensor


def _summarize(logits: Tensor, token_ids: Tensor, tile: slice, temperature: float) -> _Softmax:
    """Summarize the softmax over one tile, whose (P, width) logits are overwritten."""
    column, inside = _columns(token_ids, tile)
    chosen = torch.where(inside, logits.gather(1, column).squeeze(1), 0) / temperature
    peak = logits.amax(1) / temperature
    shifted = torch.add(-peak.unsqueeze(1), logits, alpha=1 / temperature, out=logits)
    weights = shifted.exp()
    total = weights.sum(1)
    log_sum = total.log()
    return _Softmax(chosen, peak, log_sum, log_sum - weights.mul_(shifted).sum(1) / total)


def _merge(left: _Softmax, right: _Softmax) -> _Softmax:
    """Summarize two parts as one: the entropy is that of the choice between them and the mean of theirs."""
    peak = torch.maximum(left.peak, right.peak)
    left_mass, right_mass = (part.peak - peak + part.log_sum for part in (left, right))
    log_sum = torch.logaddexp(left_mass, right_mass)
    left_share, right_share = left_mass - log_sum, right_mass - log_sum
    entropy = left_share.exp() * (left.entropy - left_share) + right_share.exp() * (right.entropy - right_share)
    return _Softmax(left.chosen + right.chosen, peak, log_sum, entropy)
