"""On GPUs, where there are any: what is shown elsewhere with stand-ins and CPUs, by kernels, streams and NCCL.

``SPO_TEST_DEVICE=cpu`` tries these tests themselves where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_linear_logprobs import Head, make_head, plain
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from spo_lightning.algorithms import linear_logprobs
from spo_lightning.distributed import Ranks
from spo_lightning.experience import TokenSequence
from spo_lightning.micro_batches import MicroBatching
from spo_lightning.passes import score
from spo_lightning.policy import Policy

import cuda_ranks
from cuda_ranks import DEVICE, POLICIES, RESUMED, STRATEGIES
from device_runs import (
    EXACT,
    REDUCED,
    SAVED_AT,
    assert_learned_the_same,
    assert_rounds_to_bfloat16,
    assert_went_on_exactly,
    fit,
    go_on,
    learned,
    train,
)
from once import once
from rank_runs import load, train_on_processes
from runs import make_run, write_inputs
from tiny_models import make_model

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

COUNT = max(1, torch.cuda.device_count()) if DEVICE == "cuda" else 2


def make_run_there(folder: Path, trainer: dict[str, Any] | None = None, **options: Any) -> Any:
    return make_run(folder, trainer={"accelerator": DEVICE, **(trainer or {})}, **options)


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_a_run_on_a_gpu_learns_what_one_on_the_cpu_learns(tmp_path: Path, options: dict[str, Any]) -> None:
    here = train(make_run, tmp_path / "here", **options)
    there = train(make_run_there, tmp_path / "there", **options)
    assert (here[0], there[0]) == ({"cpu"}, {DEVICE})
    assert_learned_the_same(there, here)


@pytest.mark.parametrize("options", REDUCED.values(), ids=REDUCED)
def test_lower_precision_trains(tmp_path: Path, options: dict[str, Any]) -> None:
    devices, metrics, _ = train(make_run_there, tmp_path, **options)
    assert devices == {DEVICE}
    for step in metrics:
        held = step.get("perf/max_memory_allocated_gib", 0.0), step.get("perf/max_memory_reserved_gib", 0.0)
        assert held == (0.0, 0.0) if DEVICE == "cpu" else 0.0 < held[0] <= held[1]
    assert_rounds_to_bfloat16(metrics)


def test_a_resumed_run_goes_on_exactly(tmp_path: Path) -> None:
    assert_went_on_exactly(*go_on(make_run_there, tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where as many ranks as there are GPUs have run all strategies."""
    return once(tmp_path_factory, "cuda", run_strategies)


def run_strategies(path: Path) -> None:
    write_inputs(path)
    train_on_processes(Path(cuda_ranks.__file__), path, COUNT)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_learn_what_one_cpu_learns(folder: Path, tmp_path: Path, name: str) -> None:
    write_inputs(tmp_path)
    one = fit(tmp_path, "one", {}, POLICIES.get(name, {}))
    assert max(step["policy/grad_norm"] for step in one["metrics"]) > 0
    for rank in range(COUNT):
        several = load(folder, name, rank)
        assert several["devices"] == {"cpu" if name == "offload" else DEVICE}
        assert several["completions"] == one["completions"]
        for mine, theirs in zip(one["metrics"], several["metrics"], strict=True):
            assert learned(theirs) == pytest.approx(learned(mine), rel=1e-3, abs=1e-5)
    result = load(folder, name)
    exported = AutoModelForCausalLM.from_pretrained(result["exported"]).state_dict()
    for key, value in one["weights"].items():
        weights = result["weights"][key].to("cpu")
        torch.testing.assert_close(weights, value, rtol=1e-4, atol=1e-6)
        assert name == "lora" or torch.equal(exported[key], weights)


def test_a_resumed_sharded_run_goes_on_exactly(folder: Path) -> None:
    whole, resumed = (load(folder, RESUMED + suffix) for suffix in ("", "-resumed"))
    assert resumed["completions"] == whole["completions"][SAVED_AT:]
    assert all(torch.equal(resumed["weights"][key], value) for key, value in whole["weights"].items())


@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"),
    [(torch.float32, "torch", 1e-5), (torch.bfloat16, "torch", 0.02), (torch.bfloat16, "liger", 0.02)],
)
def test_the_head_computes_what_float64_does(dtype: torch.dtype, backend: Any, tolerance: float) -> None:
    if backend == "liger":
        pytest.importorskip("liger_kernel")
        if DEVICE == "cpu":
            pytest.skip("Liger's kernel is of GPUs")
    head = make_head(p=300, h=64, v=3000)
    head = Head(*(x if x.dtype == torch.int64 else (x.detach() / 4).requires_grad_() for x in head))

    def differentiated(function: Callable[..., Any], hidden: Any, weight: Any, device: str) -> list[torch.Tensor]:
        logprobs, entropy = function(hidden, weight, head.token_ids.to(device), 0.7)
        upstream = head.grad.detach().to(device, logprobs.dtype)
        return [logprobs, entropy, *torch.autograd.grad(logprobs, (hidden, weight), upstream)]

    expected = differentiated(plain, head.hidden, head.weight, "cpu")
    inputs = (x.detach().to(DEVICE, dtype).requires_grad_() for x in (head.hidden, head.weight))
    head_there = partial(linear_logprobs, backend=backend, chunk_elements=300 * 512 if backend == "torch" else None)
    for found, value in zip(differentiated(head_there, *inputs, DEVICE), expected, strict=True):
        error = (found.detach().cpu().double() - value.detach()).norm() / value.detach().norm()
        assert error < tolerance


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_kernels_score_packed_sequences_as_sdpa_scores_padded_ones(attention: str) -> None:
    if attention == "flash_attention_2" and not (DEVICE == "cuda" and is_flash_attn_2_available()):
        pytest.skip("flash attention is not installed")
    lengths = ((40, 10), (17, 4), (90, 1), (61, 30))
    sequences = [TokenSequence(torch.randint(2, 40, (n,)), torch.arange(n) >= prompt) for n, prompt in lengths]
    model = make_model(hidden_size=128).to(DEVICE)
    packing = MicroBatching(200, 0, 0.7, packed=True, device=torch.device(DEVICE))
    padding = MicroBatching(200, 0, 0.7, packed=False, device=torch.device(DEVICE))
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = torch.cat(score(Policy(model), sequences, padding, Ranks()))
        model.set_attn_implementation(attention)
        found = torch.cat(score(Policy(model), sequences, packing, Ranks()))
    assert (found - expected).abs().mean() < 0.05 < 1 < expected.abs().mean()
