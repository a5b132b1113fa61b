"""What a trainer iterates over: sized iterables that make each batch only when it is asked for.

They take the place of ``torch.utils.data.DataLoader``, which would draw batches ahead of the rewards that decide them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from spo_lightning.data.prompt_dataset import PromptDataset
from spo_lightning.data.sources import PromptSource
from spo_lightning.data.training_stream import TrainingStream
from spo_lightning.errors import below, raise_problems
from spo_lightning.types import BenchmarkBatch, PromptBatch


@dataclass(frozen=True)
class Benchmark:
    """Problems to evaluate on.

    Attributes:
        source: where the problems come from.
        num_samples: completions per problem, the k of avg@k and maj@k; the paper takes 32.
        problems_per_batch: problems that one process answers at a time; null takes all.
    """

    source: PromptSource
    num_samples: int = 32
    problems_per_batch: int | None = None

    def __post_init__(self) -> None:
        problems = below(1, num_samples=self.num_samples)
        if self.problems_per_batch is not None:
            problems += below(1, problems_per_batch=self.problems_per_batch)
        raise_problems(f"bad benchmark {self.source.path!r}", problems)


class PromptLoader:
    """The training batches of a run, each drawn when it is asked for.

    Iterating starts at the stream's iteration, so that a restored stream goes on where it was.

    Args:
        stream: draws the batches.
        num_iterations: batches of the whole run.
    """

    def __init__(self, stream: TrainingStream, num_iterations: int) -> None:
        self._stream = stream
        self._num_iterations = num_iterations

    def __len__(self) -> int:
        return self._num_iterations

    def __iter__(self) -> Iterator[PromptBatch]:
        while self._stream.iteration < self._num_iterations:
            yield self._stream.draw()


class ShardedPromptLoader:
    """One rank's share of some prompts, each to be answered several times: every ``world_size``-th prompt, none twice.

    All ranks get equally many batches, so that they can work together on each; the last one of a rank may hold no
    prompt.

    Args:
        name: ``BenchmarkBatch.benchmark``.
        dataset: the prompts.
        num_samples: completions per prompt.
        prompts_per_batch: prompts of one batch on one rank; ``None`` takes all at once.
        rank: of this process.
        world_size: number of processes.
        positions: which prompts of the data set, in order; ``None`` takes all.
    """

    def __init__(
        self,
        name: str,
        dataset: PromptDataset,
        num_samples: int,
        prompts_per_batch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        positions: Sequence[int] | None = None,
    ) -> None:
        self._name = name
        self._dataset = dataset
        self._num_samples = num_samples
        self._positions = range(len(dataset)) if positions is None else positions
        self._stride = world_size * (prompts_per_batch or max(1, math.ceil(len(self._positions) / world_size)))
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        return math.ceil(len(self._positions) / self._stride)

    def __iter__(self) -> Iterator[BenchmarkBatch]:
        for begin in range(0, len(self._positions), self._stride):
            share = self._positions[begin : begin + self._stride][self._rank :: self._world_size]
            yield BenchmarkBatch(self._name, tuple(self._dataset[position] for position in share), self._num_samples)


class Sealed:
    """Hides a batch from Lightning's precision plugins: they refuse frozen dataclasses and round float64.

    Args:
        batch: what the module is to get.
    """

    __slots__ = ("batch",)

    def __init__(self, batch: PromptBatch | BenchmarkBatch) -> None:
        self.batch = batch


class SealedLoader:
    """A loader whose batches arrive ``Sealed``; ``SPODataModule.transfer_batch_to_device`` opens them.

    Args:
        loader: gives the batches.
    """

    def __init__(self, loader: PromptLoader | ShardedPromptLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Sealed]:
        return (Sealed(batch) for batch in self._loader)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module's checkpoint restores the stream. Without it Lightning warns at every resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""
