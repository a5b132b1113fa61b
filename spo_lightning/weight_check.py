"""Whether engine and trainer hold the same policy: stale or damaged weights are silent otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spo_lightning.distributed import Ranks
from spo_lightning.experience import TokenSequence
from spo_lightning.rollouts.collector import RolloutCollector
from spo_lightning.types import Prompt, SamplingParams

PROBE_TOKENS = 4  # each is a step of the engine
PROBE_SAMPLES = 8  # a completion that ends at once says little
# Mean |difference| of a token's log-probability. bfloat16 gives up to 0.04 on models of a few million parameters, a
# head or a cache left behind by a whole run 0.4 and more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
EXACT = 1e-4  # nothing but float32 rounding: engines give 1e-7 to 1e-5 then, and bfloat16 0.01


class WeightMismatchError(RuntimeError):
    """Engine and trainer disagree about the policy after a push."""


def check_weights(
    collector: RolloutCollector,
    score: Callable[[Sequence[TokenSequence]], list[Tensor]],
    prompt: Prompt,
    temperature: float,
    tolerance: float,
    ranks: Ranks,
) -> float:
    """Have each engine sample a few short completions, and compare their log-probabilities with the trainer's.

    Args:
        collector: of this rank's engine.
        score: log-probabilities under the trainer's policy at ``temperature``; called by all ranks together.
        prompt: the same each time, so that a cache that outlived its weights is found out.
        temperature: of sampling.
        tolerance: largest mean |difference| that rounding explains.
        ranks: all of them call this together.

    Returns:
        The largest mean |difference| of the engines, in nats per token.

    Raises:
        WeightMismatchError: it is above the tolerance, or not a number; on every rank.
    """
    sampling = SamplingParams(max_tokens=PROBE_TOKENS, temperature=temperature)
    mine = collector.generate([prompt] * PROBE_SAMPLES, sampling, range(PROBE_SAMPLES), use_tools=False)
    engines = ranks.gather(mine)
    scored = score([TokenSequence.join(prompt, completion) for completions in engines for completion in completions])
    sampled = [torch.cat([completion.sampling_logprobs for completion in completions]) for completions in engines]
    differences = (torch.cat(sampled) - torch.cat(scored)).abs().split([len(values) for values in sampled])
    drifts = torch.stack([values.mean() for values in differences])
    if not bool((drifts <= tolerance).all()):
        raise WeightMismatchError(
            f"after a push of weights the log-probabilities of {[len(values) for values in sampled]} tokens (a number "
            f"a rank) differ between trainer and engine by {[round(drift, 6) for drift in drifts.tolist()]} nats in "
            f"the mean, where rounding explains {tolerance}: the engine does not generate with the policy that is "
            "trained. If the engine computes in a coarser dtype than the trainer, set model.push_tolerance; otherwise "
            "this is a fault of the engine's weight update"
        )
    return float(drifts.max())
