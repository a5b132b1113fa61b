"""Rewards: what grades a completion.

Names load on first use, so that a grader's worker process imports no more than it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spo_lightning.rewards.exact_match import ExactMatchReward as ExactMatchReward
    from spo_lightning.rewards.function import FunctionReward as FunctionReward
    from spo_lightning.rewards.math_reward import MathVerifyReward as MathVerifyReward

_MODULES = {
    "ExactMatchReward": "exact_match",
    "FunctionReward": "function",
    "MathVerifyReward": "math_reward",
}

__all__ = ["ExactMatchReward", "FunctionReward", "MathVerifyReward"]


def __getattr__(name: str) -> object:
    """Load a reward class on first use. Raises AttributeError on a name this package does not have."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
