"""The last completion of each prompt, kept to measure how far the policy has moved since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spo_lightning.types import StoredCompletion

_DTYPES = {"token_ids": torch.int32, "completion_mask": torch.bool, "logprobs": torch.float32}


class CompletionHistory:
    """Prompt index to stored completion. Only visited prompts take memory: 9 bytes a sampled token at most.

    A restart without its state gives every prompt drift 0 on its next visit, as if it were the first.

    Args:
        num_prompts: prompts of the data set; indices are in [0, num_prompts).
    """

    def __init__(self, num_prompts: int) -> None:
        self.num_prompts = num_prompts
        self._stored: dict[int, StoredCompletion] = {}

    def __len__(self) -> int:
        """Prompts that have a stored completion."""
        return len(self._stored)

    def get(self, index: int) -> StoredCompletion | None:
        """The prompt's last completion, ``None`` if it was never visited."""
        return self._stored.get(index)

    def put(self, index: int, stored: StoredCompletion) -> None:
        """Replace the prompt's stored completion.

        Raises:
            IndexError: no such prompt.
            ValueError: a tensor of another dtype than ``StoredCompletion`` documents, or not on the CPU.
        """
        if not 0 <= index < self.num_prompts:
            raise IndexError(f"prompt index {index} is outside [0, {self.num_prompts})")
        for name, dtype in _DTYPES.items():
            tensor: Tensor = getattr(stored, name)
            if tensor.dtype != dtype or tensor.device.type != "cpu":
                raise ValueError(
                    f"{name} is {tensor.dtype} on {tensor.device}; the history keeps {dtype} on the CPU: convert it "
                    "first"
                )
        self._stored[index] = stored

    def state_dict(self) -> dict[str, Any]:
        """Flat tensors: index, lengths (int64), token_ids (int32), completion_mask (bool), logprobs (float32)."""
        items = sorted(self._stored.items())

        def flat(name: str) -> Tensor:
            return torch.cat([torch.empty(0, dtype=_DTYPES[name]), *(getattr(stored, name) for _, stored in items)])

        return {
            "num_prompts": self.num_prompts,
            "index": torch.tensor([index for index, _ in items], dtype=torch.int64),
            "lengths": torch.tensor([len(stored.token_ids) for _, stored in items], dtype=torch.int64),
            **{name: flat(name) for name in _DTYPES},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore exactly what ``state_dict`` gave.

        Raises:
            ValueError: the state is of a data set of another size.
        """
        if state["num_prompts"] != self.num_prompts:
            raise ValueError(
                f"the stored history is of {state['num_prompts']} prompts, the data set has {self.num_prompts}; resume "
                "with the data set of the checkpoint"
            )
        lengths = state["lengths"].tolist()
        masks = state["completion_mask"].split(lengths)
        columns = zip(
            state["index"].tolist(),
            state["token_ids"].split(lengths),
            masks,
            state["logprobs"].split([int(mask.sum()) for mask in masks]),
            strict=True,
        )
        # Copies, so that replacing one completion frees its memory: a view would keep the whole flat tensor alive.
        self._stored = {
            i: StoredCompletion(ids.clone(), mask.clone(), logprobs.clone()) for i, ids, mask, logprobs in columns
        }
