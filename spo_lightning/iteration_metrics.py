"""What is logged of one iteration's rollouts, under the names of the documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from spo_lightning.rollouts.collector import Rollout
from spo_lightning.types import CompletionRecord


def _spread(values: Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Rewards, lengths and undecided grades of all completions.

    Rewards are averaged over the decided completions; with none decided there is no ``reward/mean``.
    """
    lengths = torch.tensor([rollout.completion.num_sampled for rollout in rollouts], dtype=torch.float64)
    clipped = [rollout.completion.finish_reason == "length" for rollout in rollouts]
    causes = Counter(rollout.grade.cause for rollout in rollouts if not rollout.grade.decided)
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/min_length": float(lengths.min()),
        "completions/clipped_ratio": sum(clipped) / len(clipped),
        "verifier/undecided": float(causes.total()),
        **{f"verifier/{cause}": float(count) for cause, count in causes.items()},
    }
    rewards = [rollout.grade.value for rollout in rollouts if rollout.grade.value is not None]
    if rewards:
        values = torch.tensor(rewards, dtype=torch.float64)
        metrics |= {"reward/mean": float(values.mean()), "reward/std": _spread(values)}
    return metrics


def learning_metrics(
    reward: Tensor,
    baseline: Tensor,
    advantages: Tensor,
    old_logprobs: Sequence[Tensor],
    sampling_logprobs: Sequence[Tensor],
) -> dict[str, float]:
    """Baselines, advantages, and how far the engine's log-probabilities are from the trainer's.

    Args:
        reward: (N,) float64.
        baseline: (N,) float64.
        advantages: (N,) float64, normalised.
        old_logprobs: N tensors (S_i,), the trainer's.
        sampling_logprobs: N tensors (S_i,), the engine's.
    """
    difference = (torch.cat(tuple(old_logprobs)) - torch.cat(tuple(sampling_logprobs))).abs()
    return {
        "advantage/baseline_mean": float(baseline.mean()),
        "advantage/raw_std": _spread(reward - baseline),
        "advantage/abs_max": float(advantages.abs().max()),
        "sampling/logp_difference_mean": float(difference.mean()),
        "sampling/logp_difference_max": float(difference.max()),
    }


def timing_metrics(seconds: dict[str, float], total: float, tokens: int) -> dict[str, float]:
    """Seconds by stage and sampled tokens per second of the whole iteration."""
    return {
        **{f"timing/{stage}_s": value for stage, value in seconds.items()},
        "timing/iteration_s": total,
        "perf/tokens_per_second": tokens / total,
    }


def completion_records(
    iteration: int, rollouts: Sequence[Rollout], baseline: Tensor, advantages: dict[int, float]
) -> list[CompletionRecord]:
    """Rows of the completions table.

    Args:
        iteration: number of the iteration.
        rollouts: all completions, undecided ones too.
        baseline: (N,) float64, one a rollout.
        advantages: row of the rollout to normalised advantage; undecided rows are absent.
    """
    return [
        CompletionRecord(
            iteration=iteration,
            prompt_id=rollout.prompt.id,
            prompt=rollout.prompt.text,
            completion=rollout.completion.text,
            answer=rollout.grade.answer,
            reference=rollout.prompt.reference,
            reward=rollout.grade.value,
            baseline=float(baseline[row]),
            advantage=advantages.get(row),
            num_tokens=rollout.completion.num_sampled,
            finish_reason=rollout.completion.finish_reason,
        )
        for row, rollout in enumerate(rollouts)
    ]
