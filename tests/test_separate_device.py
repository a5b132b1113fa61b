"""Runs whose tensors are on a device of their own: what mixes them with the CPU's works on a CPU and fails on a GPU."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import transformers
from lightning.pytorch import Callback
from packaging.version import Version

from spo_lightning.algorithms import CISPOLoss, GroupNormalized, GSPOLoss, ImportanceSampling, TokenNormalized
from spo_lightning.callbacks.checkpoint import IterationCheckpoint
from spo_lightning.data import Benchmark, DrawValues, PromptSource
from spo_lightning.lora import LoraSettings
from spo_lightning.tools.settings import ToolUse
from spo_lightning.types import SamplingParams

from launched_runs import even_length
from runs import Recorder, make_run, write_inputs
from tool_runs import Count, LetterFormat

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"), reason="the stand-in cannot do what rotary embeddings do there"
)

EXACT = {
    "tied": {},
    "untied": {"write": {"tied": False}},
    "lora": {"policy": {"lora": LoraSettings(rank=2)}},
    "checkpointing": {"policy": {"gradient_checkpointing": True}, "old_logprobs": "trainer"},
    "padding_free": {"padding_free": True},
    "gspo": {"loss": GSPOLoss(), "advantage": TokenNormalized(), "old_logprobs": "engine"},
    "carried": {"data": {"oversampling": 1.5}},
    "eager": {"policy": {"attn_implementation": "eager"}},
    "grpo": {"advantage": GroupNormalized(), "data": {"completions_per_prompt": 4}, "reward": even_length},
    "cispo": {"loss": CISPOLoss(), "correction": ImportanceSampling("sequence", mask_below=0.5, mask_above=1.5)},
    "truncated": {"sampling": SamplingParams(max_tokens=8, temperature=0.7, top_p=0.9, top_k=20)},
    "tools": {
        "tool_use": ToolUse([Count()], LetterFormat(), max_turns=2, max_tool_tokens=16),
        "sampling": SamplingParams(max_tokens=16),
    },
}
REDUCED = {
    "bf16-true": {"trainer": {"precision": "bf16-true"}, "policy": {"dtype": "bfloat16"}},
    "bf16-mixed": {"trainer": {"precision": "bf16-mixed"}},
    "bf16-mixed lora": {"trainer": {"precision": "bf16-mixed"}, "policy": {"lora": LoraSettings(rank=2)}},
}


class Watch(Callback):
    """Where the policy is while it trains."""

    def __init__(self) -> None:
        self.devices: set[str] = set()

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.devices |= {parameter.device.type for parameter in module.parameters()}


def make_run_on_the_device(folder, trainer=None, **options):
    """A small run on the device, for a process of its own: torch keeps the device for good. There is no accelerate."""
    import separate_device
    import transformers.integrations.accelerate

    transformers.integrations.accelerate.is_accelerate_available = lambda: False
    strategy = separate_device.ElsewhereStrategy()
    return make_run(folder, trainer={"accelerator": "auto", "strategy": strategy, **(trainer or {})}, **options)


def train(make, folder, write=None, **options):
    """Devices of the policy, metrics by iteration, and the trained parameters."""
    write_inputs(folder, **write or {})
    watch, recorder = Watch(), Recorder()
    trainer, module, data = make(folder, callbacks=[watch, recorder], **options)
    trainer.fit(module, data)
    return watch.devices, recorder.metrics, dict(module.policy.state_dict())


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


def go_on(folder):
    """Interrupted and resumed runs with a drawn start, and a test; and the same run without interruption."""
    benchmarks = {"a": Benchmark(PromptSource(str(folder / "train.jsonl"), id_column="id"), 2)}
    results = []
    write_inputs(folder)
    for stops in ([2, 4], [4]):
        ckpt_path = None
        for stop in stops:
            data = {"num_iterations": stop, "value_start": DrawValues(2), "benchmarks": benchmarks}
            callbacks = [IterationCheckpoint(2, 2), recorder := Recorder()]
            trainer, module, data = make_run_on_the_device(
                folder, callbacks=callbacks, data=data, trainer={"enable_checkpointing": True}
            )
            trainer.fit(module, data, ckpt_path=ckpt_path)
            ckpt_path = str(folder / "checkpoints" / "last.ckpt")
        (tested,) = trainer.test(module, data, verbose=False)
        results.append((recorder.metrics[-1], tested, dict(module.policy.state_dict())))
    return results


@pytest.fixture(scope="module")
def elsewhere():
    """Calls a function in the process that has the device."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result(120)


def without_time(metrics):
    return {
        k: value for k, value in metrics.items() if not k.endswith("_s") and not k.startswith(("perf/", "sampling/"))
    }


def test_the_device_refuses_what_a_gpu_refuses(elsewhere):
    refused, allowed = elsewhere(mix)
    assert all("same device" in refused.pop(name) for name in ("add", "cat", "index", "stack", "sum", "out"))
    assert "to numpy" in refused.pop("numpy")
    assert len(refused) == 2 and all("expected a generator of elsewhere" in reason for reason in refused.values())
    assert allowed == [[1.0, 2.0, 3.0], [2.0], [0.0, 1.0, 2.0], "elsewhere"]


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_a_run_on_the_device_learns_what_one_on_the_cpu_learns(tmp_path, elsewhere, options):
    here, metrics, weights = train(make_run, tmp_path / "here", **options)
    there, device_metrics, device_weights = elsewhere(train, make_run_on_the_device, tmp_path / "there", **options)
    assert (here, there) == ({"cpu"}, {"elsewhere"})
    assert max(step["policy/grad_norm"] for step in metrics) > 0
    for one, other in zip(metrics, device_metrics, strict=True):
        assert without_time(other) == pytest.approx(without_time(one), rel=1e-4, abs=1e-6)
    for name, value in weights.items():
        # AdamW makes steps of 1e-2 of any gradient, so also of one that is little more than rounding.
        torch.testing.assert_close(device_weights[name], value, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("options", REDUCED.values(), ids=REDUCED)
def test_lower_precision_runs_on_the_device(tmp_path, elsewhere, options):
    there, metrics, _ = elsewhere(train, make_run_on_the_device, tmp_path, **options)
    assert there == {"elsewhere"}
    assert metrics[-1]["policy/grad_norm"] > 0
    assert all(1e-5 < step["sampling/push_difference"] < 0.05 for step in metrics)  # of bfloat16, and no more


def test_a_resumed_run_on_the_device_goes_on_exactly(tmp_path, elsewhere):
    (metrics, tested, weights), (whole_metrics, whole_tested, whole_weights) = elsewhere(go_on, tmp_path)
    assert without_time(metrics) == without_time(whole_metrics)
    assert tested == whole_tested and tested["step"] == 3 and "test/a/avg_at_2" in tested
    assert all(torch.equal(weights[name], value) for name, value in whole_weights.items())
