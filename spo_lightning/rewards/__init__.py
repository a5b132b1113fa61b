"""Rewards: what grades a completion.

Names load on first use, so that a grader's worker process imports no more than it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spo_lightning.lazy_names import lazy_names

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


__getattr__ = lazy_names(__name__, _MODULES)
