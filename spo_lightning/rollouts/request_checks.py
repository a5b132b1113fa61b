"""What engines refuse, in the same words."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from spo_lightning.types import RolloutRequest

UNUSABLE = "the engine's weights are unusable; call update_weights() with a full set, then step()"
REMEDY = "look at the last update for a diverged loss or an overflow of the dtype, and push finite weights to go on"
ASLEEP = "the engine is asleep; call wake_up() before step()"


def length_limit(positions: int, asked: int | None) -> int:
    """Most tokens of prompt and completion together.

    Args:
        positions: positions of the model's configuration.
        asked: the limit asked for; ``None`` takes ``positions``.

    Raises:
        ValueError: the limit leaves no room for a prompt and a token, or exceeds the model's positions.
    """
    if asked is None:
        return positions
    if not 2 <= asked <= positions:
        raise ValueError(
            f"max_model_len is {asked}; it must be at least 2 and at most the {positions} positions of the model's "
            "configuration"
        )
    return asked


def check_requests(
    requests: Sequence[RolloutRequest], open_ids: Container[int], max_model_len: int, num_embeddings: int
) -> None:
    """Check requests against the engine's open ones and the model's limits.

    Args:
        requests: about to be queued.
        open_ids: ids of the open requests.
        max_model_len: most tokens of prompt and completion together.
        num_embeddings: tokens that the model has embeddings for.

    Raises:
        ValueError: an id is open already or comes twice, a prompt is empty, holds an unknown token or leaves no room
            for a sampled one, a seed is negative, or a partial completion is of another prompt or has ended; lists
            every problem.
    """
    problems = []
    seen: set[int] = set()
    for request in requests:
        name, prompt = f"request {request.request_id}", request.prompt_token_ids
        if request.request_id in seen or request.request_id in open_ids:
            problems.append(f"{name} is open already or comes twice; give every open request an id of its own")
        seen.add(request.request_id)
        if not prompt:
            problems.append(f"{name} has an empty prompt; give at least one token")
        elif not 0 <= min(prompt) <= max(prompt) < num_embeddings:
            problems.append(
                f"{name} has token ids from {min(prompt)} to {max(prompt)}, the model knows 0 to {num_embeddings - 1}; "
                "use the policy's own tokenizer"
            )
        partial = request.partial
        taken = len(prompt) + (0 if partial is None else len(partial.token_ids))
        if taken + 1 > max_model_len:
            problems.append(
                f"{name} has {taken} tokens of prompt and partial completion; with one sampled token that passes the "
                f"model length {max_model_len}, so shorten the prompt or raise max_model_len"
            )
        problems += _partial_problems(name, request)
        if request.seed < 0:
            problems.append(f"{name} has seed {request.seed}; it must be 0 or more")
    if problems:
        raise ValueError("requests refused, none was queued: " + "; ".join(problems))


def ids_to_abort(request_ids: Iterable[int], open_ids: Container[int]) -> list[int]:
    """The ids, each once.

    Raises:
        KeyError: one is not open.
    """
    ids = list(dict.fromkeys(request_ids))
    unknown = [i for i in ids if i not in open_ids]
    if unknown:
        raise KeyError(f"requests {unknown} are not open; abort only what was submitted and not returned")
    return ids


def _partial_problems(name: str, request: RolloutRequest) -> list[str]:
    partial, most = request.partial, request.sampling.max_tokens
    problems = []
    if partial is not None and partial.prompt_token_ids != request.prompt_token_ids:
        problems.append(f"{name} goes on from a partial completion of another prompt; submit that prompt")
    if partial is not None and (partial.num_sampled >= most or partial.finish_reason != "aborted"):
        problems.append(
            f"{name} goes on from a completion that has ended ({partial.finish_reason}, {partial.num_sampled} of "
            f"{most} tokens); take it as it is"
        )
    return problems
