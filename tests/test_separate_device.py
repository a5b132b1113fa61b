"""Runs whose tensors are on a device of their own: what mixes them with the CPU's works on a CPU and fails on a GPU."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import transformers
from packaging.version import Version

from device_runs import (
    EXACT,
    REDUCED,
    assert_learned_the_same,
    assert_rounds_to_bfloat16,
    assert_went_on_exactly,
    go_on,
    train,
)
from runs import make_run

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"), reason="the stand-in cannot do what rotary embeddings do there"
)


def make_run_on_the_device(folder, trainer=None, **options):
    """A small run on the device, for a process of its own: torch keeps the device for good. There is no accelerate."""
    import separate_device
    import transformers.integrations.accelerate

    transformers.integrations.accelerate.is_accelerate_available = lambda: False
    strategy = separate_device.ElsewhereStrategy()
    return make_run(folder, trainer={"accelerator": "auto", "strategy": strategy, **(trainer or {})}, **options)


def mix():
    """What the device says to operations that a GPU refuses, and to some that it allows."""
    from separate_device import DEVICE

    there, generator = torch.arange(3.0, device=DEVICE), torch.Generator()
    refused = {}
    for name, operation in {
        "add": lambda: there + torch.ones(3),
        "cat": lambda: torch.cat([there, torch.ones(3)]),
        "index": lambda: torch.ones(3)[there.long()],
        "stack": lambda: torch.stack([there[0], torch.tensor(1.0)]),
        "sum": lambda: torch.zeros(()).add_(there[0]),
        "out": lambda: torch.add(there[0], there[1], out=torch.zeros(())),
        "generator": lambda: there.uniform_(generator=generator),
        "generator of a new tensor": lambda: torch.rand(3, device=DEVICE, generator=generator),
        "numpy": there.numpy,
    }.items():
        try:
            operation()
        except (RuntimeError, TypeError) as error:
            refused[name] = str(error)
    scalar, index = there + torch.tensor(1.0), there[torch.tensor([2])]
    return refused, [scalar.tolist(), index.tolist(), there.cpu().tolist(), torch.ones(2).to(DEVICE).device.type]


@pytest.fixture(scope="module")
def elsewhere():
    """Calls a function in the process that has the device."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result(120)


def test_the_device_refuses_what_a_gpu_refuses(elsewhere):
    refused, allowed = elsewhere(mix)
    assert all("same device" in refused.pop(name) for name in ("add", "cat", "index", "stack", "sum", "out"))
    assert "to numpy" in refused.pop("numpy")
    assert len(refused) == 2 and all("expected a generator of elsewhere" in reason for reason in refused.values())
    assert allowed == [[1.0, 2.0, 3.0], [2.0], [0.0, 1.0, 2.0], "elsewhere"]


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_a_run_on_the_device_learns_what_one_on_the_cpu_learns(tmp_path, elsewhere, options):
    here = train(make_run, tmp_path / "here", **options)
    there = elsewhere(train, make_run_on_the_device, tmp_path / "there", **options)
    assert (here[0], there[0]) == ({"cpu"}, {"elsewhere"})
    assert_learned_the_same(there, here)


@pytest.mark.parametrize("options", REDUCED.values(), ids=REDUCED)
def test_lower_precision_runs_on_the_device(tmp_path, elsewhere, options):
    there, metrics, _ = elsewhere(train, make_run_on_the_device, tmp_path, **options)
    assert there == {"elsewhere"}
    assert all(step["sampling/push_difference"] > 1e-5 for step in metrics)
    assert_rounds_to_bfloat16(metrics)


def test_a_resumed_run_on_the_device_goes_on_exactly(tmp_path, elsewhere):
    assert_went_on_exactly(*elsewhere(go_on, make_run_on_the_device, tmp_path))
