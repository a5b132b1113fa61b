"""Options of policy and optimizer do what they claim and change nothing else: compilation, precision, memory."""

import io
import math
import os
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from bitsandbytes.optim import AdamW8bit
from packaging.version import Version
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward

from spo_lightning.callbacks.checkpoint import IterationCheckpoint
from spo_lightning.cli import SPOCLI
from spo_lightning.data import Benchmark, PromptSource
from spo_lightning.errors import ConfigError
from spo_lightning.experience import TokenSequence
from spo_lightning.micro_batches import MicroBatching
from spo_lightning.packing import has_packing_kernels
from spo_lightning.policy import Policy, PolicyConfig, decoder_layers
from spo_lightning.policy_files import load_policy
from spo_lightning.run_checks import check_trainer

from runs import Recorder, make_run, write_inputs
from tiny_models import make_model

ROOT = Path(__file__).parents[1]
DOCUMENTED = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/options.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("overlay", DOCUMENTED)
def test_documented_options_are_configurations(overlay, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    (tmp_path / "overlay.yaml").write_text(overlay)
    configs = ["--config=configs/quickstart.yaml", f"--config={tmp_path / 'overlay.yaml'}"]
    cli = SPOCLI([*configs, f"--trainer.default_root_dir={tmp_path}"], run=False)
    assert cli.model.optimizer_factory([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"] > 0


# torch.compile


@pytest.fixture
def eager_backend():
    """Traces and differentiates as the default backend does, but writes no C++, which takes a minute or two."""
    torch.compiler.set_default_backend("aot_eager")
    torch._dynamo.reset()
    yield
    torch.compiler.set_default_backend("inductor")
    torch._dynamo.reset()


def score_and_differentiate(policy: Policy, rows: int, length: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities of some tokens and the gradient of their sum."""
    ids = torch.randint(2, 40, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = (torch.arange(length) > 2).expand(rows, length)
    attention = torch.ones_like(mask)
    attention[0, length - 2 :] = False
    positions = torch.arange(length).expand(rows, length)
    policy.zero_grad()
    logprobs, _ = policy(ids, positions, mask & attention, 0.7, attention)
    logprobs.sum().backward()
    return logprobs.detach(), {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


def assert_same_computation(policy: Policy, plain: Policy, rows: int, length: int) -> None:
    logprobs, gradient = score_and_differentiate(policy, rows, length)
    expected, expected_gradient = score_and_differentiate(plain, rows, length)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    for name, value in expected_gradient.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_policy_computes_the_same(tmp_path, eager_backend, checkpointing):
    """Both layers and all shapes share one compiled graph."""
    make_model(tmp_path)
    plain = load_policy(PolicyConfig(str(tmp_path)))
    policy = load_policy(PolicyConfig(str(tmp_path), compile=True, gradient_checkpointing=checkpointing))
    assert list(policy.state_dict()) == list(plain.state_dict())
    counters.clear()
    for rows, length in ((2, 12), (3, 20), (4, 31)):
        assert_same_computation(policy, plain, rows, length)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_policy_scores_the_same(tmp_path, eager_backend):
    make_model(tmp_path)
    ids = torch.randint(2, 40, (2, 9))
    logits = []
    with torch.no_grad():
        for compiled in (False, True):
            policy = load_policy(PolicyConfig(str(tmp_path), compile=compiled, gradient_checkpointing=True))
            logits.append(policy.model(ids, use_cache=False).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_a_run_needs_a_graph_for_updates_and_one_for_scores(tmp_path, eager_backend):
    """Also where it checks the engine before a validation: after eight graphs torch goes on without compiling."""
    write_inputs(tmp_path)
    counters.clear()
    trainer, module, data = make_run(
        tmp_path,
        data={"benchmarks": {"b": Benchmark(PromptSource(str(tmp_path / "train.jsonl"), id_column="id"), 2)}},
        policy={"compile": True, "gradient_checkpointing": True},
        trainer={"val_check_interval": 1},
    )
    trainer.fit(module, data)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.skipif("SPO_TEST_INDUCTOR" not in os.environ, reason="writes C++ for a minute or two; SPO_TEST_INDUCTOR=1")
def test_the_default_backend_computes_the_same(tmp_path):
    make_model(tmp_path, num_layers=1)
    torch._dynamo.reset()
    assert_same_computation(
        load_policy(PolicyConfig(str(tmp_path), compile=True)), load_policy(PolicyConfig(str(tmp_path))), 2, 12
    )


def test_a_model_without_named_layers_can_be_neither_compiled_nor_sharded():
    model = make_model()
    model._no_split_modules = []
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM does not name its decoder layers"):
        decoder_layers(model)


# Precision


def test_rotary_frequencies_stay_exact_where_parameters_are_bfloat16(tmp_path):
    """At position 16,000 an angle is position x base^(-2i/d); in bfloat16 the frequencies are off by up to 0.4 %."""
    make_model(tmp_path, max_positions=32768)
    position, channels = 16000, 8
    angles = [position * 10000.0 ** (-2 * i / channels) for i in range(channels // 2)]
    policy = load_policy(PolicyConfig(str(tmp_path))).bfloat16()
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    hidden, positions = torch.zeros(1, 1, 32), torch.tensor([[position]])

    def error(rotary: torch.nn.Module) -> float:
        cosine, sine = (value[0, 0, : channels // 2].tolist() for value in rotary(hidden, positions))
        return max(
            math.hypot(c - math.cos(angle), s - math.sin(angle))
            for c, s, angle in zip(cosine, sine, angles, strict=True)
        )

    assert error(policy.model.model.rotary_emb) < 2e-3
    assert error(policy.model.model.rotary_emb.bfloat16()) > 0.5


@pytest.mark.parametrize(
    ("precision", "kept"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)], ids=lambda value: str(value)
)
def test_precision_of_a_run(tmp_path, precision, kept):
    """Parameters, gradients and optimizer state are float32 under bf16-mixed and bfloat16 under bf16-true."""
    recorder = Recorder()
    trainer, module, data = make_run(tmp_path, trainer={"precision": precision}, callbacks=[recorder])
    gradients = set()
    module.on_before_optimizer_step = lambda optimizer: gradients.update(p.grad.dtype for p in module.parameters())
    trainer.fit(module, data)
    assert {parameter.dtype for parameter in module.policy.parameters()} == {kept}
    assert gradients == {kept}
    states = module.optimizers().optimizer.state.values()
    assert {state[name].dtype for state in states for name in ("exp_avg", "exp_avg_sq")} == {kept}
    assert all(math.isfinite(metrics["policy/loss"]) for metrics in recorder.metrics)
    module._push_weights(data.dataset.longest)
    engine = dict(module.engine._model.named_parameters())
    for name, parameter in module.policy.model.named_parameters():
        assert torch.equal(engine[name], parameter.bfloat16())  # what autocast computes with


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_logprobs_in_bfloat16_are_close_to_float32(tmp_path, precision):
    """bfloat16 rounds to 2^-9 = 0.002 of a number; through two layers logits of size 1 move by some hundredths."""
    make_model(tmp_path, spread=0.05)
    policy = load_policy(PolicyConfig(str(tmp_path)))
    exact, _ = score_and_differentiate(policy, 3, 20)
    if precision == "bf16-true":
        policy.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        rounded, _ = score_and_differentiate(policy, 3, 20)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05


# Memory


def saved_bytes(policy: Policy) -> int:
    """Bytes that one forward pass keeps for the backward pass, parameters aside; a tensor kept twice counts once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(2, 40, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in parameters)


def test_gradient_checkpointing_keeps_a_layers_input_only(tmp_path):
    """A layer then keeps little more than its (2, 64, 32) float32 input, instead of dozens of such tensors."""
    make_model(tmp_path, num_layers=8)
    config = PolicyConfig(str(tmp_path))
    plain = saved_bytes(load_policy(config))
    checkpointed = saved_bytes(load_policy(PolicyConfig(str(tmp_path), gradient_checkpointing=True)))
    layer_input = 2 * 64 * 32 * 4
    assert plain > 8 * 20 * layer_input
    assert checkpointed < 8 * 3 * layer_input


def quadratic_steps(optimizer: torch.optim.Optimizer, weight: torch.Tensor, steps: int) -> list[float]:
    """Distances to the target 1 along gradient steps."""
    distances = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (weight - 1).square().sum()
        loss.backward()
        optimizer.step()
        distances.append(loss.item())
    return distances


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def test_the_8_bit_optimizer_learns_with_two_bytes_a_parameter():
    """Two moments of a byte each, and a float32 scale for every 256; AdamW keeps eight bytes."""
    starts = [torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    weights = [torch.nn.Parameter(start) for start in starts]
    small, plain = AdamW8bit(weights[:1], lr=0.05), torch.optim.AdamW(weights[1:], lr=0.05)
    distances, expected = (
        quadratic_steps(optimizer, weight, 150) for optimizer, weight in zip((small, plain), weights, strict=True)
    )
    assert distances[-1] < 0.01 * distances[0]
    assert distances[20] == pytest.approx(expected[20], rel=0.02)
    assert state_bytes(small) <= 2.1 * weights[0].numel()
    assert state_bytes(plain) >= 8 * weights[1].numel()


def test_the_8_bit_optimizer_goes_on_from_its_state_exactly():
    weight = torch.nn.Parameter(torch.randn(128, 64, generator=torch.Generator().manual_seed(0)))
    optimizer = AdamW8bit([weight], lr=0.02)
    quadratic_steps(optimizer, weight, 5)
    file = io.BytesIO()
    torch.save({"weight": weight.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed = torch.nn.Parameter(loaded["weight"])
    successor = AdamW8bit([resumed], lr=0.02)
    successor.load_state_dict(loaded["optimizer"])
    assert quadratic_steps(optimizer, weight, 5) == quadratic_steps(successor, resumed, 5)
    assert torch.equal(weight, resumed)


def test_a_run_with_the_8_bit_optimizer_resumes_exactly(tmp_path):
    write_inputs(tmp_path)
    states = []
    for iterations, resume in ((3, None), (1, None), (3, tmp_path / "checkpoints" / "iteration-000001.ckpt")):
        trainer, module, data = make_run(
            tmp_path,
            callbacks=[IterationCheckpoint(every_n_iterations=1, keep=9)],
            data={"num_iterations": iterations},
            trainer={"enable_checkpointing": True},
            optimizer=partial(AdamW8bit, lr=1e-2, min_8bit_size=256),
        )
        trainer.fit(module, data, ckpt_path=resume)
        moments = [state["state1"].dtype for state in module.optimizers().optimizer.state.values()]
        assert torch.uint8 in moments
        states.append(module.policy.state_dict())
    uninterrupted, _, resumed = states
    assert all(torch.equal(value, resumed[name]) for name, value in uninterrupted.items())


# Sequences end to end


def test_sequences_laid_end_to_end_do_not_see_each_other(tmp_path):
    """Positions that start again at 0 are all that tells them apart; float64."""
    make_model(tmp_path)
    policy = load_policy(PolicyConfig(str(tmp_path)))
    policy.model.double()
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(2, 40, (1, length), generator=generator) for length in (5, 1, 9, 3)]
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in sequences])[None]
    packed = policy.model.base_model(input_ids=torch.cat(sequences, 1), position_ids=positions, use_cache=False)
    alone = [policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state for ids in sequences]
    torch.testing.assert_close(packed.last_hidden_state, torch.cat(alone, 1), rtol=1e-10, atol=1e-10)


class FlashKernel:
    """In place of flash attention's kernels, which need CUDA: knows sequences by their bounds alone."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.dtype, list[int], int]] = []

    def flash_attn_func(self, query, key, value, **settings):
        raise AssertionError("sequences that lie end to end would see each other")

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
    ):
        """(T, heads, D) of sequences end to end."""
        assert causal and max_seqlen_q is max_seqlen_k and torch.equal(cu_seqlens_q, cu_seqlens_k)
        self.calls.append((cu_seqlens_q.dtype, cu_seqlens_q.tolist(), max_seqlen_q))
        parts = zip(*(x.transpose(0, 1).split(cu_seqlens_q.diff().tolist(), 1) for x in (q, k, v)), strict=True)
        attend = partial(scaled_dot_product_attention, is_causal=True, scale=softmax_scale, enable_gqa=True)
        return torch.cat([attend(*part) for part in parts], 1).transpose(0, 1)


def test_flash_attention_is_told_where_sequences_begin_and_finds_it_out_in_no_layer(tmp_path, monkeypatch):
    """Also, scores and gradients are those of sequences that are padded."""
    kernel = FlashKernel()
    monkeypatch.setattr("transformers.integrations.hub_kernels.load_and_register_attn_kernel", lambda *_: kernel)
    if Version(transformers.__version__) >= Version("5.19"):  # before, each layer asks, whatever it is told
        monkeypatch.setattr("transformers.modeling_flash_attention_utils._is_packed_sequence", None)
    AttentionInterface.register("flash_stand_in", flash_attention_forward)
    make_model(tmp_path)
    sequences = [
        TokenSequence(torch.arange(2, 2 + length), torch.arange(length) >= prompt)
        for length, prompt in ((5, 2), (9, 4), (3, 1))
    ]
    found = []
    for attention in ("flash_stand_in", "sdpa"):
        policy = load_policy(PolicyConfig(str(tmp_path), attn_implementation=attention, gradient_checkpointing=True))
        policy.model.double()
        micro = MicroBatching(1000, 0, 1.0, packed=has_packing_kernels(attention))
        batch = micro.build(sequences)
        logprobs, _ = policy(batch.input_ids, batch.position_ids, batch.completion_mask, 1.0, batch.attention_mask)
        logprobs.square().sum().backward()
        found.append((logprobs.detach(), [parameter.grad for parameter in policy.parameters()]))
    assert kernel.calls == [(torch.int32, [0, 5, 14, 17], 9)] * 4  # 2 layers, and again in the backward pass
    assert type(kernel.calls[0][2]) is int
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_packing_is_the_default_where_the_attention_has_kernels_for_it():
    efficient = ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn", "flex_attention"]
    assert all(has_packing_kernels(name) for name in efficient)
    assert not any(has_packing_kernels(name) for name in ("sdpa", "eager"))


# Liger's head


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "message"),
    [
        ("cpu", "bfloat16", True, "needs a CUDA device"),
        ("cuda", "bfloat16", False, "pip install"),
        ("cuda", "float32", True, "takes bfloat16 only, and the policy computes in float32"),
        ("cuda", "bfloat16", True, None),
    ],
)
def test_liger_is_refused_where_it_cannot_run(device, dtype, installed, message, monkeypatch):
    monkeypatch.setattr("spo_lightning.run_checks.find_spec", lambda name: "found" if installed else None)
    module = SimpleNamespace(
        trainer=SimpleNamespace(precision="32-true", max_steps=-1, strategy=None),
        policy_config=PolicyConfig("policy", head="liger"),
        device=torch.device(device),
        generation_dtype=dtype,
    )
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        check_trainer(module)
