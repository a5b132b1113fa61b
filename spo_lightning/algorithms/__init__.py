"""The mathematics of SPO, on tensors: importing this loads torch and nothing heavier."""

from spo_lightning.algorithms.advantages import AdvantageEstimator, TokenNormalized, TrajectoryNormalized
from spo_lightning.algorithms.aggregation import Aggregation, BatchTotals, aggregate
from spo_lightning.algorithms.drift import DriftEstimator, KLEstimate, MeanAbsLogRatio, truncate_completion
from spo_lightning.algorithms.forgetting import ConstantForgetting, EventTime, ForgettingRule, FrozenStart, KLHalfLife
from spo_lightning.algorithms.group_advantages import GroupNormalized, LeaveOneOut
from spo_lightning.algorithms.linear_logprobs import linear_logprobs
from spo_lightning.algorithms.logprobs import selected_logprobs
from spo_lightning.algorithms.losses import CISPOLoss, GSPOLoss, PolicyLoss, PPOClipLoss
from spo_lightning.algorithms.off_policy import ImportanceSampling, OffPolicyCorrection, OffPolicyWeights
from spo_lightning.algorithms.sampling import PrioritizedWeights, PromptWeights, UniformWeights, draw_prompts
from spo_lightning.algorithms.value_tracker import Smoothing, ValueTracker

__all__ = [
    "AdvantageEstimator",
    "Aggregation",
    "BatchTotals",
    "CISPOLoss",
    "ConstantForgetting",
    "DriftEstimator",
    "EventTime",
    "ForgettingRule",
    "FrozenStart",
    "GSPOLoss",
    "GroupNormalized",
    "ImportanceSampling",
    "KLEstimate",
    "KLHalfLife",
    "LeaveOneOut",
    "MeanAbsLogRatio",
    "OffPolicyCorrection",
    "OffPolicyWeights",
    "PPOClipLoss",
    "PolicyLoss",
    "PrioritizedWeights",
    "PromptWeights",
    "Smoothing",
    "TokenNormalized",
    "TrajectoryNormalized",
    "UniformWeights",
    "ValueTracker",
    "aggregate",
    "draw_prompts",
    "linear_logprobs",
    "selected_logprobs",
    "truncate_completion",
]
