"""Which prompts come next: weights from the tracked values, and a seeded draw without replacement (SPO §4.3)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor

from spo_lightning.errors import raise_problems


class PromptWeights(ABC):
    """Turns tracked values into sampling weights."""

    @abstractmethod
    def __call__(self, value: Tensor) -> Tensor:
        """Return one weight a prompt.

        Args:
            value: (M,) float64, the tracker's values; not written to.

        Returns:
            (M,) float64, finite and not negative; only their ratios matter.
        """


class PrioritizedWeights(PromptWeights):
    """Prompts of uncertain outcome first: ``sqrt(v * (1 - v)) + exploration`` (SPO eq. 11).

    The first term is the standard deviation of a binary reward. Other rewards are scaled from [reward_min, reward_max]
    to [0, 1] first; values outside are moved to the nearer end.

    Args:
        exploration: added to every weight, so that solved and hopeless prompts are still seen; not negative. At 0 a
            prompt of value 0 or 1 is never drawn again.
        reward_min: least reward a completion can get.
        reward_max: largest reward a completion can get.

    Raises:
        ValueError: an argument is not finite or outside its range.
    """

    def __init__(self, exploration: float = 0.05, reward_min: float = 0.0, reward_max: float = 1.0) -> None:
        problems = []
        if not 0 <= exploration < float("inf"):
            problems.append(f"exploration is {exploration}; it must be finite and not negative, the paper uses 0.05")
        if not -float("inf") < reward_min < reward_max < float("inf"):
            problems.append(
                f"rewards reach from {reward_min} to {reward_max}; both must be finite and reward_max the larger"
            )
        raise_problems("PrioritizedWeights", problems)
        self.exploration = exploration
        self.reward_min = reward_min
        self.reward_max = reward_max

    def __call__(self, value: Tensor) -> Tensor:
        """Return the weights of SPO eq. 11; shapes and dtypes as in the base class."""
        success = (value - self.reward_min).div_(self.reward_max - self.reward_min).clamp_(0, 1)
        return success.addcmul_(success, success, value=-1).sqrt_().add_(self.exploration)


class UniformWeights(PromptWeights):
    """Every prompt alike: no curriculum."""

    def __call__(self, value: Tensor) -> Tensor:
        """Return ones; shapes and dtypes as in the base class."""
        return torch.ones_like(value)


def draw_prompts(weights: Tensor, size: int, generator: Generator) -> Tensor:
    """Draw prompts by weight, without replacement unless there are fewer prompts than draws.

    Without replacement the draw is successive: each next prompt is drawn by weight among those that are left. It is
    done at once by giving prompt i the key ``log(u_i) / w_i``, u_i uniform in [0, 1), and taking the largest keys in
    descending order (Efraimidis and Spirakis 2006). Keys are float64, so the 2 ** 24 categories at which
    ``torch.multinomial`` ends are no limit. With replacement, when ``size`` exceeds M, draws are independent. A prompt
    of weight 0 is never drawn.

    Args:
        weights: (M,) float64, finite and not negative.
        size: how many to draw, at least 1.
        generator: CPU generator; the draw depends on it and on the weights only, and advances it.

    Returns:
        (size,) int64, rows in the order drawn, so that a leading part is a draw of its own.

    Raises:
        ValueError: a weight is negative, NaN or infinite, size is below 1, or fewer weights are positive than needed.
    """
    total = float(weights.sum()) if weights.ndim == 1 and len(weights) else 0.0
    problems = []
    if weights.ndim != 1 or not len(weights) or weights.dtype != torch.float64:
        problems.append(
            f"weights are {weights.dtype} {tuple(weights.shape)}; they must be torch.float64 (M,) with M at least 1"
        )
    elif not (float(weights.min()) >= 0 and total < float("inf")):
        problems.append("a weight is negative, NaN or infinite; every weight must be finite and not negative")
    elif total == 0:
        problems.append("all weights are 0; give at least one prompt a positive weight, for example by exploration")
    if size < 1:
        problems.append(f"size is {size}; it must be at least 1")
    raise_problems("draw_prompts", problems)
    if size > len(weights):
        return _draw_with_replacement(weights, size, generator)
    return _draw_without_replacement(weights, size, generator, total)


def _draw_with_replacement(weights: Tensor, size: int, generator: Generator) -> Tensor:
    cumulative = weights.cumsum(0)
    position = torch.rand(size, dtype=torch.float64, generator=generator) * cumulative[-1]
    last_positive = torch.searchsorted(cumulative, cumulative[-1:])  # rounding must not lead past it
    return torch.searchsorted(cumulative, position, right=True).minimum(last_positive)


def _draw_without_replacement(weights: Tensor, size: int, generator: Generator, total: float) -> Tensor:
    keys = torch.rand(len(weights), dtype=torch.float64, generator=generator).log_().div_(weights)
    # A key exceeds -t with probability 1 - exp(-w t), at most w t: about 1.5 * size do here when size is small against
    # M, and sorting these suffices. A draw that leaves too few sorts all keys; the result is the same.
    candidates = (keys > -(1.5 * size + 20) / total).nonzero().squeeze(-1)
    if len(candidates) >= size:
        return candidates[keys[candidates].topk(size).indices]
    positive = int(weights.count_nonzero())
    if positive < size:
        found = f"{positive} of {len(weights)} weights are positive"
        raise_problems("draw_prompts", [f"{found}; drawing {size} prompts needs at least as many, raise exploration"])
    return keys.topk(size).indices
