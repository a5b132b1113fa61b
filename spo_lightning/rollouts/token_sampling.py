"""Drawing one token a row from logits, every row with its own temperature, top-k, top-p and uniform number.

The draw inverts the cumulative distribution, so that one uniform number decides one token and a completion depends only
on its request's own numbers. Probabilities are turned into 64-bit integers before they are summed: integer sums are
exact in any order, on any device, so a token without weight can never be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo_lightning.types import SamplingParams

WEIGHT_SCALE = float(2**50)  # a power of two scales a float32 exactly; the sum of a row stays far below 2**63


@dataclass(frozen=True, slots=True, eq=False)
class RowSettings:
    """The sampling parameters of the N rows of a batch, as tensors on the logits' device.

    Attributes:
        greedy: (N,) bool, True where the temperature is 0.
        temperature: (N,) float32, 1 for greedy rows.
        top_k: (N,) int64, as large as int64 allows where top-k is off.
        top_p: (N,) float64, 1 where top-p is off.
        any_greedy: whether a row is greedy.
        any_filter: whether a row that is not greedy uses top-k or top-p.
    """

    greedy: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    any_greedy: bool
    any_filter: bool

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams], device: torch.device) -> RowSettings:
        """Gather the parameters of N rows. Greedy rows take temperature 1 and no filter."""
        greedy = [p.temperature == 0 for p in params]
        off = torch.iinfo(torch.int64).max
        top_k = [p.top_k if p.top_k and p.temperature else off for p in params]
        top_p = [p.top_p if p.temperature else 1.0 for p in params]
        return cls(
            greedy=torch.tensor(greedy, dtype=torch.bool, device=device),
            temperature=torch.tensor([p.temperature or 1.0 for p in params], dtype=torch.float32, device=device),
            top_k=torch.tensor(top_k, dtype=torch.int64, device=device),
            top_p=torch.tensor(top_p, dtype=torch.float64, device=device),
            any_greedy=any(greedy),
            any_filter=any(k != off for k in top_k) or any(p < 1 for p in top_p),
        )


def filtered_logprobs(logits: Tensor, settings: RowSettings) -> Tensor:
    """Log-probabilities of the distribution that is sampled from: temperature, then top-k, then top-p, renormalised.

    Greedy rows get the plain softmax of their logits.

    Args:
        logits: (N, V), any floating dtype.
        settings: of the same N rows.

    Returns:
        (N, V) float32; -inf for tokens that top-k or top-p removed.
    """
    scaled = logits.float() / settings.temperature[:, None]
    if settings.any_filter:
        scaled = scaled.masked_fill(~_kept_tokens(scaled, settings), -torch.inf)
    return torch.log_softmax(scaled, dim=-1)


def _kept_tokens(scaled: Tensor, settings: RowSettings) -> Tensor:
    """(N, V) bool: the top-k tokens of each row, and of these the fewest whose renormalised mass reaches top-p."""
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    keep = rank < settings.top_k[:, None]
    probs = ordered.double().masked_fill(~keep, -torch.inf).softmax(dim=-1)
    mass_before = probs.cumsum(dim=-1) - probs
    keep &= (mass_before < settings.top_p[:, None]) | (settings.top_p[:, None] == 1)
    return torch.empty_like(keep).scatter_(-1, order, keep)


def draw_tokens(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    Probabilities below 2**-50 count as 0. A token of probability 0 is never drawn.

    Args:
        logprobs: (N, V) float32, normalised.
        uniforms: (N,) float64 in [0, 1).

    Returns:
        (N,) int64 token ids. What is drawn from a row with NaN is unspecified but a valid index.
    """
    cumulative = logprobs.exp().mul_(WEIGHT_SCALE).long().cumsum_(dim=-1)
    # u < 1 makes u * total < total in floating point too, so the truncated target is below the last entry
    target = (uniforms * cumulative[:, -1].double()).long()
    tokens = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
    return tokens.clamp_(max=logprobs.shape[-1] - 1)


def sample_tokens(logits: Tensor, settings: RowSettings, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one token a row, and say how likely it was under the distribution it was drawn from.

    Args:
        logits: (N, V), any floating dtype.
        settings: of the same N rows.
        uniforms: (N,) float64 in [0, 1); greedy rows ignore theirs.

    Returns:
        tokens (N,) int64 and their log-probabilities (N,) float32. For a greedy row it is the log-probability under the
        plain softmax of the logits (that of the distribution really used would always be 0).
    """
    logprobs = filtered_logprobs(logits, settings)
    tokens = draw_tokens(logprobs, uniforms)
    if settings.any_greedy:
        tokens = torch.where(settings.greedy, logprobs.argmax(dim=-1), tokens)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)
