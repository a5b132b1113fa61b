"""What is logged of one iteration's rollouts, under the names of the documentation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spo_lightning.algorithms import GroupNormalized, ImportanceSampling, OffPolicyCorrection
from spo_lightning.algorithms.group_advantages import degenerate
from spo_lightning.algorithms.off_policy import MAX_LOG_RATIO
from spo_lightning.rollouts.collector import Rollout
from spo_lightning.rollouts.tool_results import num_results
from spo_lightning.types import CompletionRecord


def _spread(values: Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Rewards, lengths and undecided grades of all completions.

    Rewards are averaged over the decided completions; with none decided there is no ``reward/mean``. A part that the
    reward names, as ``reward/<part>``, is averaged over the completions that have it.
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
    parts: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        for part, value in rollout.grade.parts.items():
            parts[part].append(value)
    return metrics | {f"reward/{part}": sum(values) / len(values) for part, values in parts.items()}


def tool_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Turns that tools answered, and tokens of their results, as means over all completions."""
    masks = [rollout.completion.completion_mask for rollout in rollouts]
    return {
        "tools/turns_mean": sum(num_results(mask) for mask in masks) / len(masks),
        "tools/tokens_mean": sum(int((~mask).sum()) for mask in masks) / len(masks),
    }


def learning_metrics(reward: Tensor, baseline: Tensor, advantages: Tensor) -> dict[str, float]:
    """Baselines and advantages of the decided completions.

    Args:
        reward: (N,) float64.
        baseline: (N,) float64.
        advantages: (N,) float64, normalised.
    """
    return {
        "advantage/baseline_mean": float(baseline.mean()),
        "advantage/raw_std": _spread(reward - baseline),
        "advantage/abs_max": float(advantages.abs().max()),
    }


def signal_metrics(reward: Tensor, baseline: Tensor, group: Tensor) -> dict[str, float]:
    """How much there is to learn from a batch (SPO Figure 3).

    ``signal/reward_variance`` and ``signal/advantage_variance`` are sample variances of the rewards and of
    ``reward - baseline``; ``signal/near_zero_...`` is the share of completions whose ``|reward - baseline|`` is at most
    that. Where prompts have several completions, ``signal/degenerate_groups`` is the share of these prompts whose
    rewards are all equal, and ``signal/group_advantage_variance`` the variance of GRPO's advantages in the others.

    Args:
        reward: (N,) float64.
        baseline: (N,) float64.
        group: (N,) int64, of copies of a prompt that were drawn together.
    """
    advantage = reward - baseline
    metrics = {
        "signal/reward_variance": _spread(reward) ** 2,
        "signal/advantage_variance": _spread(advantage) ** 2,
        **{f"signal/near_zero_{most:g}": float((advantage.abs() <= most).double().mean()) for most in (1e-4, 0.02)},
    }
    groups, row, size = group.unique(return_inverse=True, return_counts=True)
    if int(size.max()) > 1:
        equal = degenerate(reward, group)
        kept = ~equal[row]
        within = GroupNormalized()(reward, baseline, torch.ones_like(group), group)[kept]
        metrics["signal/degenerate_groups"] = float(equal[size > 1].double().mean())
        metrics["signal/group_advantage_variance"] = _spread(within) ** 2
    return metrics


def curriculum_metrics(baseline: Tensor) -> dict[str, float]:
    """Which prompts a batch holds: the share of each fifth of the tracker's range, as ``curriculum/value_0.0_0.2``.

    Args:
        baseline: (N,) float64, values in [0, 1] when the prompts were drawn; a value on a border belongs above it.
    """
    fifth = (baseline * 5).floor().clamp(0, 4).long()
    shares = torch.bincount(fifth, minlength=5).double() / len(baseline)
    return {f"curriculum/value_{i / 5:.1f}_{(i + 1) / 5:.1f}": share for i, share in enumerate(shares.tolist())}


def mismatch_metrics(
    old_logprobs: Sequence[Tensor],
    sampling_logprobs: Sequence[Tensor],
    correction: OffPolicyCorrection | None,
    equal: int = 0,
) -> dict[str, float]:
    """How far the engine's log-probabilities are from the trainer's, and what a correction does about it.

    ``sampling/kl`` is the mean over tokens of ``r - 1 - log r``, r = old / sampler, an estimate of KL(sampler ||
    trainer) per token that is never negative. Log ratios are limited to 20 before they are exponentiated.
    ``sampling/effective_sample_size`` is ``(sum w)^2 / (n sum w^2)`` over the n tokens: the share of them that, equally
    weighted, would give as much certainty. With a correction w are its weights (0 when it masks all), and there are
    also the shares of tokens that it truncated and masked; without one w are the untruncated ratios.

    Args:
        old_logprobs: N tensors (S_i,), the trainer's; together at least one token.
        sampling_logprobs: N tensors (S_i,), the engine's.
        correction: what the update used.
        equal: further tokens of the batch, whose old log-probabilities are the engine's: their weight is 1. They do not
            count in ``sampling/logp_difference_...``, which is about what was computed twice.
    """
    weigh = ImportanceSampling(cap=None) if correction is None else correction
    greatest, parts = [], []
    for old, sampling in zip(old_logprobs, sampling_logprobs, strict=True):
        if len(old) == 0:
            continue
        log_ratio = old.double() - sampling.double()
        weighed = weigh(old[None], sampling[None], torch.ones_like(old[None], dtype=torch.bool))
        weights = weighed.weights.double()
        divergence = log_ratio.clamp(max=MAX_LOG_RATIO).expm1() - log_ratio
        values = (log_ratio.abs(), divergence, weights, weights.square(), weighed.truncated, weighed.masked)
        greatest.append(log_ratio.abs().max())
        parts.append(torch.stack([value.sum(dtype=torch.float64) for value in values]))
    count = sum(len(old) for old in old_logprobs)
    difference, divergence_sum, weight, square, truncated, masked = torch.stack(parts).sum(0).tolist()
    tokens, weight, square = count + equal, weight + equal, square + equal
    metrics = {
        "sampling/logp_difference_mean": difference / count,
        "sampling/logp_difference_max": float(torch.stack(greatest).max()),
        "sampling/kl": divergence_sum / tokens,
        "sampling/effective_sample_size": weight**2 / (tokens * square) if square else 0.0,
    }
    if correction is not None:
        metrics["sampling/truncated_fraction"] = truncated / tokens
        metrics["sampling/masked_fraction"] = masked / tokens
    return metrics


def timing_metrics(
    seconds: Mapping[str, float], total: float, tokens: int, idle: Mapping[str, float]
) -> dict[str, float]:
    """Seconds by stage, sampled tokens per second of the whole iteration, and what a background engine idled."""
    return {
        **{f"timing/{stage}_s": value for stage, value in seconds.items()},
        **{f"timing/{name}": value for name, value in idle.items()},
        "timing/iteration_s": total,
        "perf/tokens_per_second": tokens / total,
    }


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Most GiB that tensors took on this GPU since the program began, and that torch's allocator held for them."""
    if device.type != "cuda":
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"perf/max_memory_allocated_gib": allocated / 2**30, "perf/max_memory_reserved_gib": reserved / 2**30}


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
