"""The processes of a run. All hold the same data and take the same decisions; they share the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

Item = TypeVar("Item")

# One rank may generate much longer than the others, so it is no sign of a fault that they wait. One that has died is
# noticed at once, by its closed connection.
PATIENCE = timedelta(hours=2)


class Ranks:
    """Exchange between the processes of a run; in a run of one process nothing is sent.

    Objects travel over CPU memory (gloo) whatever the devices are: rollouts are large, and the accelerator's memory is
    full.

    To be built by all processes together, once ``torch.distributed`` is initialised.

    Attributes:
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1
        self._group: Any = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of what all hold: every ``world_size``-th item."""
        return items[self.rank :: self.world_size]

    def gather(self, value: Item) -> list[Item]:
        """The values of all processes, in the order of their ranks; must be called by all."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def merge(self, shares: Sequence[Item]) -> list[Item]:
        """Undo ``share``: the items of all processes, in their first order; must be called by all."""
        parts = self.gather(list(shares))
        return [parts[i % self.world_size][i // self.world_size] for i in range(sum(map(len, parts)))]

    def wait(self) -> None:
        """Return when all processes have called this, however long one of them generates."""
        self.gather(None)

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add up numbers over the processes, which must give the same keys in the same order; called by all."""
        if self.world_size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return dict(zip(values, total.tolist(), strict=True))
