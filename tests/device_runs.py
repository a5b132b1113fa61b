"""Small runs on devices, and what they have in common with those on the CPU.

The devices are stand-ins (``separate_device.py``, ``several_devices.py``), or GPUs (``test_cuda.py``).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from spo_lightning.algorithms import CISPOLoss, GroupNormalized, GSPOLoss, ImportanceSampling, TokenNormalized
from spo_lightning.callbacks import IterationCheckpoint
from spo_lightning.data.loaders import Benchmark
from spo_lightning.data.sources import PromptSource
from spo_lightning.data.value_start import DrawValues
from spo_lightning.lora import LoraSettings
from spo_lightning.sharding import full_state
from spo_lightning.tools.settings import ToolUse
from spo_lightning.types import SamplingParams

from launched_runs import even_length
from runs import Recorder, make_run, write_inputs
from tool_runs import Count, LetterFormat

ITERATIONS, SAVED_AT = 4, 2
LEARNED = ("policy/", "reward/", "tracker/")

# On one device: settings of runs that learn what the same run learns on the CPU, and of those that round.
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


def train(make, folder, write=None, **options):
    """Devices of the policy, metrics by iteration, and the trained parameters."""
    write_inputs(folder, **write or {})
    watch, recorder = Watch(), Recorder()
    trainer, module, data = make(folder, callbacks=[watch, recorder], **options)
    trainer.fit(module, data)
    return watch.devices, recorder.metrics, dict(module.policy.state_dict())


def go_on(make, folder):
    """Interrupted and resumed runs with a drawn start, and a test; and the same run without interruption."""
    benchmarks = {"a": Benchmark(PromptSource(str(folder / "train.jsonl"), id_column="id"), 2)}
    results = []
    write_inputs(folder)
    for stops in ([2, 4], [4]):
        ckpt_path = None
        for stop in stops:
            data = {"num_iterations": stop, "value_start": DrawValues(2), "benchmarks": benchmarks}
            callbacks = [IterationCheckpoint(2, 2), recorder := Recorder()]
            trainer, module, data = make(folder, callbacks=callbacks, data=data, trainer={"enable_checkpointing": True})
            trainer.fit(module, data, ckpt_path=ckpt_path)
            ckpt_path = str(folder / "checkpoints" / "last.ckpt")
        (tested,) = trainer.test(module, data, verbose=False)
        results.append((recorder.metrics[-1], tested, dict(module.policy.state_dict())))
    return results


def fit(folder: Path, name: str, trainer: dict[str, Any], policy: dict[str, Any], ckpt_path: str | None = None) -> Any:
    """Train, 5 prompts an iteration in two mini-batches, with a drawn start, validations and a checkpoint midway."""
    recorder = Recorder()
    checkpoint = IterationCheckpoint(SAVED_AT, keep=9, dirpath=str(folder / f"{name}-checkpoints"))
    run, module, data = make_run(
        folder,
        callbacks=[recorder, checkpoint],
        data={
            "num_iterations": ITERATIONS,
            "batch_size": 5,
            "value_start": DrawValues(2),
            "benchmarks": {"b": Benchmark(PromptSource(str(folder / "train.jsonl"), id_column="id"), 2, 3)},
        },
        trainer={"logger": False, "enable_checkpointing": True, "val_check_interval": 2, **trainer},
        policy=policy,
        optimizer=partial(torch.optim.SGD, lr=0.05),
        micro_batch_tokens=26,
    )
    run.fit(module, data, ckpt_path=ckpt_path)
    return {
        "metrics": recorder.metrics,
        "completions": [[record.completion for record in records] for records in recorder.records],
        "weights": full_state(module.policy, keep=True),
        "devices": {parameter.device.type for parameter in module.policy.parameters()},
        "exported": module.export(folder / f"{name}-policy"),
    }


def learned(metrics: dict[str, float], groups: tuple[str, ...] = LEARNED) -> dict[str, float]:
    """What a run's metrics tell about the algorithm."""
    return {key: value for key, value in metrics.items() if key.startswith(groups)}


def without_time(metrics):
    return {
        k: value for k, value in metrics.items() if not k.endswith("_s") and not k.startswith(("perf/", "sampling/"))
    }


def assert_learned_the_same(found, expected):
    """Both as ``train`` returns them, to rounding."""
    (_, metrics, weights), (_, expected_metrics, expected_weights) = found, expected
    assert max(step["policy/grad_norm"] for step in expected_metrics) > 0
    for one, other in zip(expected_metrics, metrics, strict=True):
        assert without_time(other) == pytest.approx(without_time(one), rel=1e-4, abs=1e-6)
    for name, value in expected_weights.items():
        # AdamW makes steps of 1e-2 of any gradient, so also of one that is little more than rounding.
        torch.testing.assert_close(weights[name].to("cpu"), value, rtol=1e-4, atol=1e-3)


def assert_rounds_to_bfloat16(metrics):
    """Engine and policy differ by that much at most."""
    assert metrics[-1]["policy/grad_norm"] > 0
    assert all(step["sampling/push_difference"] < 0.05 for step in metrics)


def assert_went_on_exactly(resumed, whole):
    """As ``go_on`` returns them."""
    (metrics, tested, weights), (whole_metrics, whole_tested, whole_weights) = resumed, whole
    assert without_time(metrics) == without_time(whole_metrics)
    assert tested == whole_tested and tested["step"] == 3 and "test/a/avg_at_2" in tested
    assert all(torch.equal(weights[name], value) for name, value in whole_weights.items())
