"""Which prompts come next (SPO §4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spo_lightning.algorithms import PromptWeights, draw_prompts


class PrioritizedBatchSampler:
    """Draws one batch of prompt indices after the other, from a random generator of its own.

    Prompts within a batch are distinct, as long as the data set has enough; each comes ``completions_per_prompt``
    times in a row (SPO appendix B; GRPO's groups). With the same seed and the same values every rank draws the same
    batch.

    Args:
        weights: from tracker values to sampling weights (SPO eq. 11).
        batch_size: completions of one batch, B.
        completions_per_prompt: copies of each prompt; divides ``batch_size``.
        seed: of the generator.

    Raises:
        ValueError: ``batch_size`` is not a positive multiple of ``completions_per_prompt``.
    """

    def __init__(self, weights: PromptWeights, batch_size: int, completions_per_prompt: int = 1, seed: int = 0) -> None:
        if batch_size < 1 or completions_per_prompt < 1 or batch_size % completions_per_prompt:
            raise ValueError(
                f"batch_size is {batch_size} and completions_per_prompt {completions_per_prompt}; batch_size must be a "
                "positive multiple of completions_per_prompt: change one of them"
            )
        self.iteration = 0
        """Batches drawn so far."""
        self._weights = weights
        self.num_distinct = batch_size // completions_per_prompt
        """Prompts of one draw, before copies."""
        self.batch_size = batch_size
        """Completions of one batch, B."""
        self.copies = completions_per_prompt
        """Completions of each drawn prompt."""
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, value: Tensor, size: int | None = None, excluded: Tensor | None = None) -> Tensor:
        """Draw the next batch.

        Args:
            value: (M,) float64, the tracker's value of every prompt.
            size: most completions to draw, rounded down to whole prompts; ``None`` takes ``batch_size``.
            excluded: (E,) int64, prompts that are not to be drawn.

        Returns:
            (N,) int64 prompt indices.

        Raises:
            ValueError: the weights wrote to ``value``, or cannot be drawn by.
        """
        written = value._version
        weights = self._weights(value)
        if value._version != written:
            raise ValueError(
                f"{type(self._weights).__name__} wrote to the tracker's values, which it is only to read; use "
                "operations that give a new tensor, as sub instead of sub_"
            )
        num_distinct = self.num_distinct if size is None else size // self.copies
        if excluded is not None and len(excluded):
            weights = weights.index_fill(0, excluded, 0.0)
        self.iteration += 1
        if num_distinct == 0:
            return torch.empty(0, dtype=torch.int64)
        return draw_prompts(weights, num_distinct, self._generator).repeat_interleave(self.copies)

    def state_dict(self) -> dict[str, Any]:
        """Generator state (uint8 tensor) and number of batches drawn."""
        return {"generator": self._generator.get_state(), "iteration": self.iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the stream of batches where ``state_dict`` was taken."""
        self._generator.set_state(state["generator"].cpu())
        self.iteration = state["iteration"]
