"""Metrics of an iteration that no run on a CPU has."""

from __future__ import annotations

import pytest
import torch

from spo_lightning.iteration_metrics import memory_metrics


def test_memory_is_told_in_gib_of_the_given_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, gib in (("allocated", 3), ("reserved", 5)):
        monkeypatch.setattr(torch.cuda, f"max_memory_{name}", lambda device, gib=gib: (gib + device.index) * 2**30)
    found = memory_metrics(torch.device("cuda", 1))
    assert found == {"perf/max_memory_allocated_gib": 4.0, "perf/max_memory_reserved_gib": 6.0}
    assert memory_metrics(torch.device("cpu")) == {}
