"""The loop that data go round: draw a batch, take its outcome, and all of it in one state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from spo_lightning.algorithms import ValueTracker
from spo_lightning.data.completion_history import CompletionHistory
from spo_lightning.data.prompt_dataset import PromptDataset
from spo_lightning.data.prompt_sampler import PrioritizedBatchSampler
from spo_lightning.errors import ConfigError
from spo_lightning.types import Outcome, PromptBatch


class TrainingStream:
    """Training batches whose baselines are frozen when they are drawn, and what their outcomes teach.

    Draw the next batch only after ``observe`` of the one before. A stream restored from ``state_dict`` goes on
    exactly as the one it was taken from.

    Args:
        dataset: M prompts.
        tracker: their values; gives weights and baselines.
        sampler: draws.
        num_requests: requests that are open after a draw, at least the batch size (SPO appendix B); a draw begins as
            many as have ended since the last one, of prompts that have none open. When prompts come in copies, one that
            has some left may be drawn again if there are too few others.

    Raises:
        ConfigError: more prompts are to be open than there are, while a batch takes fewer.
    """

    def __init__(
        self, dataset: PromptDataset, tracker: ValueTracker, sampler: PrioritizedBatchSampler, num_requests: int
    ) -> None:
        if sampler.batch_size < num_requests > len(dataset) * sampler.copies:
            raise ConfigError(
                f"data.oversampling keeps {num_requests} requests open, {sampler.copies} a prompt, and there are "
                f"{len(dataset)} prompts; lower data.oversampling or data.batch_size, or add prompts"
            )
        self.dataset = dataset
        self.tracker = tracker
        self.sampler = sampler
        self.num_requests = num_requests
        self.history = CompletionHistory(len(dataset))
        self._open: Counter[int] = Counter()

    @property
    def iteration(self) -> int:
        """Number of the next batch."""
        return self.sampler.iteration

    def draw(self) -> PromptBatch:
        """Draw the next batch from the tracker as it stands (SPO eq. 8, 11)."""
        iteration = self.sampler.iteration
        size = max(0, self.num_requests - self._open.total())
        excluded = torch.tensor(sorted(self._open), dtype=torch.int64)
        if len(excluded) + size // self.sampler.copies > len(self.dataset):
            excluded = excluded[:0]
        index = self.sampler.draw(self.tracker.value, size, excluded)
        positions = index.tolist()
        self._open.update(positions)
        stored = ((position, self.history.get(position)) for position in self._open)
        return PromptBatch(
            iteration=iteration,
            size=self.sampler.batch_size,
            copies=self.sampler.copies,
            prompts=tuple(self.dataset[position] for position in positions),
            baseline=self.tracker.baseline(index),
            previous={position: completion for position, completion in stored if completion is not None},
        )

    def observe(self, outcome: Outcome) -> dict[str, float]:
        """Let the outcome of one batch enter tracker and history (SPO eq. 5).

        Of a prompt that occurs more than once, the last completion is kept.

        Returns:
            Metrics ``tracker/...`` over all prompts; those over the batch are absent when no completion was decided.
        """
        factor = self.tracker.update(outcome.index, outcome.reward, outcome.drift, outcome.version)
        for index, stored in zip(outcome.index.tolist(), outcome.completions, strict=True):
            self.history.put(index, stored)
        self._open -= Counter(outcome.ended.tolist())
        value = self.tracker.value
        counts = self.tracker.effective_count_at(int(self.tracker.version.max()))
        metrics = {
            "tracker/value_mean": value.mean().item(),
            "tracker/value_std": value.std(correction=0).item(),
            "tracker/effective_count_mean": counts.mean().item(),
            "tracker/visited_fraction": len(self.history) / len(self.dataset),
        }
        if len(outcome.index):
            metrics["tracker/forgetting_factor_mean"] = factor.mean().item()
            metrics["tracker/drift_mean"] = outcome.drift.mean().item()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Tracker, history, sampler and open requests, as tensors and primitives, with the data set's fingerprint."""
        return {
            "fingerprint": self.dataset.fingerprint,
            "num_prompts": len(self.dataset),
            "tracker": self.tracker.state_dict(),
            "history": self.history.state_dict(),
            "sampler": self.sampler.state_dict(),
            "open": torch.tensor(sorted(self._open.elements()), dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ConfigError: the state belongs to another data set; nothing is changed then.
        """
        self.require_same_prompts(state)
        self.tracker.load_state_dict(state["tracker"])
        self.history.load_state_dict(state["history"])
        self.sampler.load_state_dict(state["sampler"])
        self._open = Counter(state["open"].tolist())

    def require_same_prompts(self, state: Mapping[str, Any]) -> None:
        """Check that a state belongs to this data set.

        Raises:
            ConfigError: it does not.
        """
        if state["fingerprint"] != self.dataset.fingerprint:
            raise ConfigError(
                f"the checkpoint was made with other training prompts ({state['num_prompts']}, fingerprint "
                f"{state['fingerprint']}) than these ({len(self.dataset)}, fingerprint {self.dataset.fingerprint}); "
                "resume with the same rows in the same order, the same columns and max_prompt_tokens, or start a new "
                "run"
            )
