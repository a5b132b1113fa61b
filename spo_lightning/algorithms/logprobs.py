"""Log-probabilities of given tokens, and the entropy of the softmax over the whole vocabulary at their positions."""

from __future__ import annotations

import torch
from torch import Tensor

from spo_lightning.errors import raise_problems


def selected_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return each token's log-probability, and the entropy at its position.

    Both are of the whole softmax at this temperature: top-p and top-k, if tokens were sampled with them, do not enter.
    Computed in float32, or in float64 when the logits are. Logits of minus infinity (forbidden tokens) are allowed.

    Args:
        logits: (..., V) float, the scores that predict ``token_ids``: the caller shifts them by one position.
        token_ids: (...) int64, in [0, V).
        temperature: divides the logits, as when the tokens were sampled; positive and finite.

    Returns:
        Log-probabilities (...) float32 or float64 with gradient, and entropies in nats, same shape and dtype, detached.

    Raises:
        ValueError: shapes do not fit together, or the temperature is not positive and finite.
    """
    problems = temperature_problems(temperature)
    if logits.shape[:-1] != token_ids.shape:
        problems.append(f"logits {tuple(logits.shape)} must be token_ids {tuple(token_ids.shape)} and a vocabulary")
    raise_problems("selected_logprobs", problems)
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        scaled = scaled / temperature
    logprobs = scaled.log_softmax(-1)
    selected = logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        probs = logprobs.exp()
        entropy = probs.mul_(logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1).neg_()
    return selected, entropy


def temperature_problems(temperature: float) -> list[str]:
    """Say what is wrong with a sampling temperature, in at most one sentence."""
    if 0 < temperature < float("inf"):
        return []
    return [f"temperature is {temperature}; it must be positive and finite, greedy samples have no log-probability"]
