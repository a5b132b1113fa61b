"""What vLLM servers are asked: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from typing import Any

from spo_lightning.rollouts.open_request import OpenRequest

# Tokens that a server sends at once. One by one they cost rank 0 more than twice as much (docs/performance.md); those
# that were not sent when a stream breaks off are lost, so they are few beside a completion.
LARGEST_PIECE = 16
PIECES = 32
PROBE = {"token_ids": [0], "stream": True, "sampling_params": {"max_tokens": 1, "logprobs": 0, "detokenize": False}}


def request_body(row: OpenRequest) -> dict[str, Any]:
    """What to send for the rest of an open request.

    Every setting that changes the distribution is sent, so that the model's ``generation_config.json`` has no say.
    Stop strings are found on this side, which has the whole completion, a former part included.
    """
    sampling = row.request.sampling
    greedy = sampling.temperature == 0
    parameters = {
        "stream_interval": max(1, min(LARGEST_PIECE, sampling.max_tokens // PIECES)),
        "max_tokens": row.room,
        "temperature": sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": 0 if greedy else sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": row.part_seed,
        "ignore_eos": True,
        "stop_token_ids": sorted(row.eos_token_ids),
        "logprobs": 0,  # of the sampled token only
        "detokenize": False,
    }
    return {"token_ids": row.prefix, "stream": True, "sampling_params": parameters}
