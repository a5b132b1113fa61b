"""Open rollouts as flat tensors and primitives, for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from spo_lightning.rollouts.collection import OpenRollout
from spo_lightning.types import Completion, Prompt, RolloutTask

_COLUMNS = {
    "token_ids": torch.int64,
    "sampling_logprobs": torch.float32,
    "completion_mask": torch.bool,
    "policy_versions": torch.int64,
}


def pack(rollouts: Sequence[OpenRollout]) -> dict[str, Any]:
    """Flatten R rollouts with T tokens in all.

    Returns:
        ``index``, ``iteration``, ``row``, ``group`` and ``length`` (R,) int64, ``baseline`` (R,) float64, the (T,)
        columns of ``Completion``, and three lists of R strings: ``text`` and ``finish_reason``, empty where nothing has
        begun, and ``sampled_text``, some of them ``None``.
    """
    completions = [rollout.completion for rollout in rollouts]

    def whole(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return {
        "index": whole([rollout.task.prompt.index for rollout in rollouts]),
        "iteration": whole([rollout.task.iteration for rollout in rollouts]),
        "row": whole([rollout.task.row for rollout in rollouts]),
        "group": whole([rollout.task.group for rollout in rollouts]),
        "length": whole([0 if c is None else len(c.token_ids) for c in completions]),
        "baseline": torch.tensor([rollout.task.baseline for rollout in rollouts], dtype=torch.float64),
        **{
            name: torch.cat([torch.empty(0, dtype=dtype), *(getattr(c, name) for c in completions if c is not None)])
            for name, dtype in _COLUMNS.items()
        },
        "text": ["" if c is None else c.text for c in completions],
        "finish_reason": ["" if c is None else c.finish_reason for c in completions],
        "sampled_text": [None if c is None else c.sampled_text for c in completions],
    }


def unpack(state: Mapping[str, Any], prompt_at: Callable[[int], Prompt]) -> list[OpenRollout]:
    """Undo ``pack``.

    Args:
        state: what ``pack`` gave.
        prompt_at: gives the prompt of an index.
    """
    lengths = state["length"].tolist()
    columns = {name: [part.clone() for part in state[name].split(lengths)] for name in _COLUMNS}
    rollouts = []
    for number, index in enumerate(state["index"].tolist()):
        task = RolloutTask(
            prompt_at(index),
            state["baseline"][number].item(),
            state["iteration"][number].item(),
            state["row"][number].item(),
            state["group"][number].item(),
        )
        completion = None
        if state["finish_reason"][number]:
            completion = Completion(
                request_id=0,
                prompt_token_ids=task.prompt.token_ids,
                **{name: parts[number] for name, parts in columns.items()},
                text=state["text"][number],
                finish_reason=state["finish_reason"][number],
                sampled_text=state["sampled_text"][number],
            )
        rollouts.append(OpenRollout(task, completion))
    return rollouts
