"""FSDP2 on two devices of their own, whose collectives refuse tensors of the CPU as NCCL's do."""

from __future__ import annotations

from pathlib import Path

import pytest
import several_devices
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from device_runs import SAVED_AT, fit, learned
from once import once
from rank_runs import load, train_on_processes
from runs import write_inputs

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"), reason="the stand-in cannot do what rotary embeddings do there"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have run all variants."""
    return once(tmp_path_factory, "devices", run_variants)


def run_variants(path: Path) -> None:
    write_inputs(path)
    train_on_processes(Path(several_devices.__file__), path)


def test_the_collectives_refuse_what_nccl_refuses(folder: Path) -> None:
    for rank in range(2):
        assert (folder / f"refused{rank}").read_text() == "No backend type associated with device type cpu"


@pytest.mark.parametrize("name", several_devices.VARIANTS)
def test_two_devices_learn_what_one_cpu_learns(folder: Path, tmp_path: Path, name: str) -> None:
    write_inputs(tmp_path)
    policy = several_devices.VARIANTS[name].get("policy", {})
    one = fit(tmp_path, "one", {}, policy)
    assert max(step["policy/grad_norm"] for step in one["metrics"]) > 0
    for rank in range(2):
        two = load(folder, name, rank)
        assert two["devices"] == {"cpu" if name == "offloaded" else "elsewhere"}
        assert two["completions"] == one["completions"]
        for mine, theirs in zip(one["metrics"], two["metrics"], strict=True):
            assert learned(theirs) == pytest.approx(learned(mine), rel=1e-4, abs=1e-6)
        validated = learned(one["metrics"][-1], ("val/b/avg",))
        assert validated and learned(two["metrics"][-1], ("val/b/avg",)) == validated
    for key, value in one["weights"].items():
        torch.testing.assert_close(load(folder, name)["weights"][key], value, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_on_two_devices_goes_on_exactly(folder: Path) -> None:
    whole, resumed = (load(folder, several_devices.RESUMED + suffix) for suffix in ("", "-resumed"))
    assert resumed["completions"] == whole["completions"][SAVED_AT:]
    assert [learned(step) for step in resumed["metrics"]] == [learned(step) for step in whole["metrics"][SAVED_AT:]]
    assert all(torch.equal(resumed["weights"][key], value) for key, value in whole["weights"].items())


@pytest.mark.parametrize("name", several_devices.VARIANTS)
def test_what_two_devices_export_is_what_they_trained(folder: Path, name: str) -> None:
    result = load(folder, name)
    exported = AutoModelForCausalLM.from_pretrained(result["exported"]).state_dict()
    assert all(torch.equal(exported[key], value) for key, value in result["weights"].items())
