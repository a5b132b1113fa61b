"""The memory planner against numbers worked out by hand, and against what real passes allocate."""

import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from jsonargparse import Namespace
from packaging.version import Version
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, GptOssConfig, Qwen3Config, Qwen3ForCausalLM

from spo_lightning import plan_command
from spo_lightning.algorithms import linear_logprobs
from spo_lightning.errors import ConfigError
from spo_lightning.lora import LoraSettings
from spo_lightning.memory_engines import VLLMLoad, requests_at_once, vllm_memory
from spo_lightning.memory_layout import layout_of
from spo_lightning.memory_plan import (
    ALLOWANCE,
    EngineMemory,
    Layout,
    MicroBatchMemory,
    ModelSize,
    OptimizerMemory,
    make_plan,
    render,
    verdict,
)
from spo_lightning.memory_trace import FakePolicy, LiveBytes, measure_optimizer
from spo_lightning.policy import checkpoint_activations
from spo_lightning.rollouts.kv_cache import RowCache, cache_keyword
from spo_lightning.rollouts.transformers_engine import TransformersEngine
from spo_lightning.unpadded import hidden_states, use_unpadded

from tiny_models import make_char_tokenizer, make_model

GIB = 2**30
SIZE = ModelSize(total=1000, trained=1000, unit=300, root=100, num_units=3, largest=90)
ADAMW = OptimizerMemory(state=8, step=4)
NO_BATCH = MicroBatchMemory(0, 0, 0)
NO_ENGINE = EngineMemory(0, 0, 0)
BF16_AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)


def plan_of(layout, size=SIZE, compute_bytes=2, micro_batch=NO_BATCH, engine=NO_ENGINE):
    return make_plan(size, layout, 4, 4, compute_bytes, ADAMW, micro_batch, engine)


def states(plan):
    return [plan[name].step for name in ("parameters", "gradients", "optimizer state", "optimizer step")]


def test_adamw_on_float32_takes_16_bytes_a_parameter_and_4_more_in_its_step():
    assert states(plan_of(Layout("single"))) == [4000, 4000, 8000, 4000]


def test_sharding_over_8_devices_takes_an_eighth_of_each():
    assert states(plan_of(Layout("fsdp", 8, sharded=True, shards=8))) == [500, 500, 1000, 500]


def test_offloading_takes_nothing_but_the_gathered_units():
    plan = plan_of(Layout("fsdp", 8, sharded=True, shards=8, offloaded=True))
    assert states(plan) == [0, 0, 0, 0]
    assert plan["gathered units"].update == 2 * (100 + 2 * 300)


@pytest.mark.parametrize(("keeps", "compute_bytes", "expected"), [(False, 2, 1400), (True, 2, 2000), (False, 4, 2800)])
def test_root_and_two_layers_are_gathered_or_everything_is_kept(keeps, compute_bytes, expected):
    layout = Layout("fsdp", 8, sharded=True, shards=8, keeps_gathered=keeps)
    assert plan_of(layout, compute_bytes=compute_bytes)["gathered units"].update == expected


def test_a_model_of_one_layer_gathers_no_more_than_itself():
    size = ModelSize(total=400, trained=400, unit=300, root=100, num_units=1, largest=90)
    assert plan_of(Layout("fsdp", 8, sharded=True, shards=8), size)["gathered units"].update == 2 * 400


def test_gradients_of_gathered_units_wait_in_bfloat16_and_are_reduced_in_float32():
    layout = Layout("fsdp", 8, sharded=True, shards=8)
    assert plan_of(layout)["their gradients"].update == 2 * 100 + 2 * 300 * (2 + 4)
    half_trained = ModelSize(total=1000, trained=500, unit=300, root=100, num_units=3, largest=90)
    assert plan_of(layout, half_trained)["their gradients"].update == 1900


def test_frozen_parameters_have_neither_gradient_nor_state_and_may_be_smaller():
    size = ModelSize(total=1000, trained=10, unit=300, root=100, num_units=3, largest=90)
    plan = make_plan(size, Layout("single"), 2, 4, 2, ADAMW, NO_BATCH, NO_ENGINE)
    assert states(plan) == [990 * 2 + 10 * 4, 40, 80, 40]


def test_a_large_root_is_reduced_when_the_activations_are_gone():
    layout = Layout("fsdp", 8, sharded=True, shards=8)
    size = ModelSize(total=20_000, trained=20_000, unit=100, root=19_000, num_units=10, largest=90)
    batch = MicroBatchMemory(activations=5_000, head=1_000, backward=2_000)
    plan = plan_of(layout, size, micro_batch=batch)
    after_backward = plan["their gradients"].update + plan["activations"].update + plan["head or backward"].update
    assert after_backward == 19_000 * (2 + 4)


def test_ddp_reduces_a_copy_of_the_gradients_unless_buckets_are_views():
    assert plan_of(Layout("ddp", 2, gradient_buckets=True))["gradient buckets"].update == 4000
    assert all(row.name != "gradient buckets" for row in plan_of(Layout("ddp", 2)).rows)


def test_phases_add_up_what_is_there_at_the_same_time():
    batch, engine = MicroBatchMemory(activations=70, head=9, backward=5), EngineMemory(weights=11, cache=23, work=3)
    plan = plan_of(Layout("single"), micro_batch=batch, engine=engine)
    assert plan.total("rollout") == 4000 + 8000 + 11 + 23 + 3 + ALLOWANCE
    assert plan.total("update") == 16_000 + 70 + 9 + ALLOWANCE  # the engine sleeps
    assert plan.total("step") == 20_000 + ALLOWANCE
    assert plan.peak == plan.total("step")


def test_fsdp_gathers_a_unit_and_copies_a_parameter_for_a_push_while_vllm_is_awake():
    layout = Layout("fsdp", 8, sharded=True, shards=8)
    awake = EngineMemory(11, 23, 0, ready_at_push=True)
    plan = plan_of(layout, engine=awake)
    assert plan["weights on their way"].rollout == 4 * (300 + 90)
    assert plan.total("rollout") == 500 + 1000 + 11 + 23 + 1560 + ALLOWANCE
    rows = [row.name for other in (plan_of(Layout("ddp", 8), engine=awake), plan_of(layout)) for row in other.rows]
    assert "weights on their way" not in rows


def test_an_engine_on_other_devices_has_no_rows():
    assert not [row.name for row in plan_of(Layout("single")).rows if "engine" in row.name]


def test_table_and_verdict():
    plan = plan_of(Layout("single"), ModelSize(GIB, GIB, GIB, 0, 1, GIB))
    table = render(plan, 80 * GIB)
    assert table.splitlines()[1].split() == ["parameters", "4.00", "4.00", "4.00"]
    assert table.splitlines()[2].split() == ["gradients", "-", "4.00", "4.00"]
    assert table.splitlines()[-2].split() == ["total", "14.00", "18.00", "22.00"]
    assert table.splitlines()[-1].split() == ["share", "of", "80", "18%", "22%", "28%"]
    assert [verdict(plan, gib * GIB).split(":")[0] for gib in (21, 22, 24, 25)] == [
        "does not fit",
        "tight",
        "tight",
        "fits",
    ]


# vLLM


def vllm_load(**changes):
    load = VLLMLoad(0.5, None, 1, None, True, max_tokens=100, rows=8, longest=(("training", 60), ("benchmark", 100)))
    return replace(load, **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, EngineMemory(2000, 3000, 0, host=2000, ready_at_push=True)),
        ({"ranks": 2}, EngineMemory(1000, 4000, 0, host=1000, ready_at_push=True)),
        ({"keeps_weights": False}, EngineMemory(2000, 3000, 0, host=0, ready_at_push=True)),
        ({"cache_bytes": 9000}, EngineMemory(2000, 9000, 0, host=2000, ready_at_push=True)),
        ({"share": 0.3, "max_tokens": 50}, EngineMemory(2000, 1000, 0, host=2000, ready_at_push=True)),
    ],
)
def test_vllm_fills_its_share_and_its_cache_is_what_weights_leave(changes, expected):
    assert vllm_memory(vllm_load(**changes), weights=2000, token_bytes=20, max_tokens=500, gpu_bytes=10_000) == expected


@pytest.mark.parametrize(
    ("changes", "limit", "problem"),
    [
        ({"share": 0.1}, 500, "gpu_memory_utilization 0.1, is 1.0 GiB, and its weights alone take 2.0"),
        ({"share": 0.21}, 500, "the engine's cache is 0.1 GiB, and a single request of 100 tokens takes 1.0"),
        ({"cache_bytes": GIB // 2}, 500, "the engine's cache is 0.5 GiB, and a single request of 100 tokens takes 1.0"),
        ({"cache_bytes": GIB // 2}, 50, None),
    ],
)
def test_vllm_needs_room_for_its_weights_and_one_longest_request(changes, limit, problem):
    memory = vllm_memory(vllm_load(**changes), 2 * GIB, GIB / 100, limit, 10 * GIB)
    if problem is None:
        assert memory.problem is None
    else:
        assert problem in memory.problem
        assert verdict(plan_of(Layout("single"), engine=memory), 80 * GIB) == f"does not fit: {memory.problem}"


@pytest.mark.parametrize(
    ("changes", "limit", "expected"),
    [
        ({}, 500, "310 tokens: 5 training requests of 60, or 3 benchmark requests of 100, at once"),
        ({"rows": 4}, 80, "310 tokens: 4 training requests of 60, or 3 benchmark requests of 80, at once"),
        ({"max_tokens": 50}, 500, "310 tokens: 6 training requests of 50, or 6 benchmark requests of 50, at once"),
    ],
)
def test_requests_that_a_cache_holds(changes, limit, expected):
    said = requests_at_once(vllm_load(**changes), cache=6215, token_bytes=20, max_tokens=limit)
    assert said == f"vLLM's cache holds at most {expected}"


# Optimizers


@pytest.mark.parametrize(
    ("build", "dtype", "state", "step"),
    [
        (partial(torch.optim.AdamW, lr=1e-6), torch.float32, 8, 4),
        (partial(torch.optim.AdamW, lr=1e-6), torch.bfloat16, 4, 2),
        (partial(torch.optim.AdamW, lr=1e-6, foreach=False), torch.float32, 8, 0),
        (partial(torch.optim.AdamW, lr=1e-6, fused=True), torch.float32, 8, 0),
        (partial(torch.optim.AdamW, lr=1e-6, amsgrad=True), torch.float32, 12, 4),
        (partial(torch.optim.SGD, lr=1e-6), torch.float32, 0, 0),
        (partial(torch.optim.SGD, lr=1e-6, momentum=0.9), torch.float32, 4, 0),
        (partial(torch.optim.Adafactor, lr=1e-6), torch.float32, 4 * (256 + 512) / (256 * 512), None),
    ],
    ids=["adamw", "adamw-bf16", "adamw-loop", "adamw-fused", "amsgrad", "sgd", "momentum", "adafactor"],
)
def test_bytes_of_an_optimizer_for_each_parameter(build, dtype, state, step):
    measured = measure_optimizer(build, dtype)
    assert measured.state == pytest.approx(state, abs=1e-4)  # a step counter of 4 bytes a tensor
    assert step is None or measured.step == pytest.approx(step, abs=1e-4)


def test_parameters_gradients_and_state_of_a_real_step():
    model = make_model(num_layers=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.zeros(1, 8, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    total = sum(p.numel() for p in model.parameters())
    plan = plan_of(Layout("single"), FakePolicy(model.config, torch.float32).size())
    assert plan["parameters"].step == sum(p.untyped_storage().nbytes() for p in model.parameters())
    assert plan["gradients"].step == sum(p.grad.untyped_storage().nbytes() for p in model.parameters())
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert plan["optimizer state"].step == sum(moment.nbytes for moment in moments) == 8 * total


# Traces


def test_live_bytes_follow_storages_not_tensors():
    given = torch.zeros(10)
    with LiveBytes([given]) as memory:
        first = given + 1
        view = first.view(2, 5)
        second = view * 2
        assert (memory.live, memory.peak) == (80, 80)
        del second
        del first
        assert (memory.live, memory.peak) == (40, 80)
        given.add_(1)
        memory.reset_peak()
        del view
        assert (memory.live, memory.peak) == (0, 40)


def small_qwen3(**changes):
    shape = {
        "vocab_size": 211,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    return Qwen3Config(**{**shape, **changes})


def allocated(events):
    """Net and most bytes at once of a profile's allocations."""
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return live, peak


def profiled(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = function()
    return result, *allocated(prof.profiler.kineto_results.events())


def really_allocated(config, dtype, checkpointing, autocast, rows, width, padded):
    """What the allocator reports for activations, and at most in all, over a real forward and backward pass."""
    model = Qwen3ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    if checkpointing:
        checkpoint_activations(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    use_unpadded(model)
    ids = torch.randint(config.vocab_size, (rows, width))
    positions, mask = torch.arange(width).expand(rows, -1), torch.ones(rows, width, dtype=torch.bool)

    def forward():
        with autocast():
            if padded:
                return hidden_states(model.base_model, ids, positions, mask)
            return model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)

    def backward():
        picked = hidden[torch.arange(rows * width)]
        with autocast():
            logprobs, _ = linear_logprobs(
                picked, model.get_output_embeddings().weight, ids.flatten(), chunk_elements=2**25
            )
        logprobs.sum().backward()

    hidden, activations, forward_peak = profiled(forward)
    _, _, backward_peak = profiled(backward)
    return activations, max(forward_peak, activations + backward_peak)


@pytest.mark.parametrize("shape", [(1, 192, False), (3, 96, True)], ids=["one row", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, nullcontext), (torch.float32, BF16_AUTOCAST), (torch.bfloat16, BF16_AUTOCAST)],
    ids=["float32", "autocast", "gathered in bfloat16"],
)
def test_a_micro_batch_is_what_the_allocator_reports(dtype, autocast, checkpointing, shape):
    config = small_qwen3()
    planned = FakePolicy(config, dtype, "sdpa", checkpointing).micro_batch(*shape, autocast)
    activations, peak = really_allocated(config, dtype, checkpointing, autocast, *shape)
    assert planned.activations == pytest.approx(activations, rel=0.1)
    assert planned.peak == pytest.approx(peak, rel=0.1)


def qwen3_bytes_per_token_and_layer(config, norm, linear_inputs):
    """What a decoder layer keeps of a token, by its tensors; see docs/memory.md.

    Args:
        config: shape.
        norm: bytes of a hidden element that a norm keeps: its input in float32, and the normalised one.
        linear_inputs: copies of the two norms' outputs, 2 bytes each, that seven linear layers keep.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    hidden = config.hidden_size * (2 * norm + 2 * linear_inputs)
    attention = (heads + kv_heads) * config.head_dim * (4 + 2 + 2) + (heads + kv_heads) * config.head_dim * 2
    scales = 4 * (2 + heads + kv_heads) + 4 * heads
    return hidden + attention + 4 * config.intermediate_size * 2 + scales


@pytest.mark.parametrize(
    ("dtype", "norm", "linear_inputs"), [(torch.float32, 8, 5), (torch.bfloat16, 6, 2)], ids=["autocast", "gathered"]
)
def test_activations_of_qwen3_by_the_tensors_it_keeps(dtype, norm, linear_inputs):
    tokens = 256
    two, three = (
        FakePolicy(small_qwen3(num_hidden_layers=n), dtype).micro_batch(1, tokens, False, BF16_AUTOCAST).activations
        for n in (2, 3)
    )
    config = small_qwen3()
    casts = 0  # autocast keeps a bfloat16 copy of every matrix that it multiplies with
    if dtype == torch.float32:
        hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_dim
        casts = 2 * (hidden * width * (2 * 6 + 2 * 2) + 3 * hidden * inner)
    assert three - two == casts + tokens * qwen3_bytes_per_token_and_layer(config, norm, linear_inputs)


def test_recomputation_keeps_one_hidden_state_a_layer():
    two, three = (
        FakePolicy(small_qwen3(num_hidden_layers=n), torch.bfloat16, "sdpa", True)
        .micro_batch(2, 64, False, BF16_AUTOCAST)
        .activations
        for n in (2, 3)
    )
    assert three - two == 2 * 64 * 64 * 2


def test_tied_embeddings_count_once():
    size = FakePolicy(small_qwen3(tie_word_embeddings=True), torch.float32).size()
    untied = FakePolicy(small_qwen3(), torch.float32).size()
    assert (untied.total - size.total, untied.root - size.root) == (211 * 64, 211 * 64)
    assert size.root == 211 * 64 + 64
    assert size.largest == 211 * 64
    assert size.total == size.root + 3 * size.unit


def test_adapters_are_what_is_trained_and_keep_their_inputs():
    config, lora = small_qwen3(), LoraSettings(rank=4, target_modules=["q_proj", "down_proj"])
    whole, adapted = FakePolicy(config, torch.float32), FakePolicy(config, torch.float32, lora=lora)
    added = 3 * 4 * ((64 + 96) + (160 + 64))
    assert adapted.size().trained == added
    assert adapted.size().total == whole.size().total + added
    frozen_head = adapted.micro_batch(1, 64, False, nullcontext).head
    assert frozen_head < whole.micro_batch(1, 64, False, nullcontext).head


def test_engine_holds_weights_and_a_cache_that_grows_by_quarters():
    config = small_qwen3()
    engine = FakePolicy(config, torch.float32).engine(rows=5, width=400, prompt_width=100, max_prefill_tokens=200)
    assert engine.weights == 4 * sum(p.numel() for p in Qwen3ForCausalLM(config).parameters())
    assert engine.cache == 5 * (400 + 100) * 3 * 2 * (2 * 16) * 4
    assert engine.host == engine.weights


@pytest.mark.parametrize(("dtype", "ranks", "expected"), [(4, 1, 2), (2, 1, 2), (2, 2, 1), (2, 4, 1)])
def test_keys_and_values_of_a_token_are_split_by_heads(dtype, ranks, expected):
    model = FakePolicy(small_qwen3(), {4: torch.float32, 2: torch.bfloat16}[dtype])
    assert model.token_bytes(ranks) == 3 * 2 * (expected * 16) * dtype


@torch.inference_mode()
@pytest.mark.parametrize(("width", "prompt_width"), [(400, 1), (64, 60)], ids=["decode", "prefill"])
def test_work_of_the_engine_is_what_the_allocator_reports(width, prompt_width):
    config = small_qwen3()
    planned = FakePolicy(config, torch.float32).engine(5, width, prompt_width, max_prefill_tokens=1000)
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    prefilled, cache = DynamicCache(config=config), RowCache(3)
    mask = torch.ones(5, width + 1, dtype=torch.bool)
    mask[0, 0] = False
    model(torch.zeros(5, width, dtype=torch.int64), attention_mask=mask[:, :-1], **cache_keyword(model, prefilled))
    cache.append(prefilled, range(5), 5)

    def decode():
        ids = torch.zeros(5, 1, dtype=torch.int64)
        model(ids, attention_mask=mask, logits_to_keep=1, **cache_keyword(model, cache))

    def prefill():
        ids = torch.zeros(5, prompt_width, dtype=torch.int64)
        keyword = cache_keyword(model, DynamicCache(config=config))
        model(ids, attention_mask=mask[:, :prompt_width], logits_to_keep=1, **keyword)

    peaks = [profiled(step)[-1] for step in (decode, prefill)]
    assert planned.work == pytest.approx(max(peaks), rel=0.1, abs=planned.cache / 100)


# Strategies


def trainer(strategy="auto", devices=8, num_nodes=1):
    return Namespace(strategy=strategy, devices=devices, num_nodes=num_nodes)


def strategy(class_path, **init_args):
    return Namespace(class_path=class_path, init_args=Namespace(**init_args))


FSDP, FSDP2, DDP = "lightning.pytorch.strategies.FSDPStrategy", "spo_lightning.strategies.FSDP2Strategy", "ddp"


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        (trainer(devices=1), Layout("SingleDeviceStrategy")),
        (trainer(), Layout("DDPStrategy", 8, gradient_buckets=True)),
        (trainer(DDP, "0,2"), Layout("DDPStrategy", 2, gradient_buckets=True)),
        (
            trainer(strategy("lightning.pytorch.strategies.DDPStrategy", gradient_as_bucket_view=True), [0, 3, 5]),
            Layout("DDPStrategy", 3, gradient_buckets=True),
        ),
        (trainer("fsdp", "4", 2), Layout("FSDPStrategy FULL_SHARD", 8, sharded=True, shards=8)),
        (
            trainer(strategy(FSDP, sharding_strategy="SHARD_GRAD_OP")),
            Layout("FSDPStrategy SHARD_GRAD_OP", 8, sharded=True, shards=8, keeps_gathered=True),
        ),
        (
            trainer(strategy(FSDP, sharding_strategy="HYBRID_SHARD"), num_nodes=2),
            Layout("FSDPStrategy HYBRID_SHARD", 16, sharded=True, shards=8),
        ),
        (trainer(strategy(FSDP2)), Layout("FSDP2Strategy", 8, sharded=True, shards=8)),
        (
            trainer(strategy(FSDP2, replicas=2, cpu_offload=True), num_nodes=2),
            Layout("FSDP2Strategy", 16, sharded=True, shards=8, offloaded=True),
        ),
    ],
)
def test_strategies_that_the_planner_knows(configured, expected):
    assert layout_of(configured) == (expected, False)


def test_a_strategy_may_recompute_activations_itself():
    assert layout_of(trainer(strategy(FSDP, activation_checkpointing_policy=["x"])))[1]


@pytest.mark.parametrize(
    ("configured", "message"),
    [
        (trainer(devices="auto"), "trainer.devices is auto; say how many"),
        (trainer(devices=-1), "trainer.devices is -1"),
        (trainer("deepspeed"), "the planner knows FSDP2Strategy, FSDPStrategy, DDPStrategy, SingleDeviceStrategy"),
        (trainer("nonsense"), "trainer.strategy is 'nonsense'"),
        (trainer(strategy(FSDP, sharding_strategy="NO_SHARD")), "the planner knows FULL_SHARD"),
        (trainer(strategy(FSDP, mixed_precision="x")), "strategy.mixed_precision is set"),
        (trainer("fsdp_cpu_offload"), "strategy.cpu_offload is set, which FSDPStrategy cannot train with; take fsdp2"),
        (trainer(strategy(FSDP2, replicas=3)), "strategy.replicas is 3; it must divide the number of devices, 8"),
    ],
)
def test_what_the_planner_does_not_know_is_refused(configured, message):
    with pytest.raises(ConfigError, match=message):
        layout_of(configured)


# The command


@pytest.fixture
def spo_plan(tmp_path, monkeypatch, capsys):
    """Runs ``spo plan`` on a small policy, on a machine without the GPUs that the configuration names."""
    folder = tmp_path / "policy"
    make_model(folder, max_positions=512)
    make_char_tokenizer(folder)
    config = tmp_path / "run.yaml"
    config.write_text(
        "trainer: {accelerator: cuda, devices: 4, strategy: ddp}\n"
        f"model:\n  policy: {{path: {folder}}}\n  reward: ExactMatchReward\n  sampling: {{max_tokens: 100}}\n"
        "  micro_batch_tokens: 1024\n  engine: {class_path: TransformersEngine, init_args: {max_batch_size: 16}}\n"
        "data: {num_iterations: 1, batch_size: 32, max_prompt_tokens: 28, train: {path: x.jsonl}}\n"
    )

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["spo", "plan", f"--config={config}", *arguments])
        plan_command.run()
        return capsys.readouterr().out

    run.folder = folder
    return run


def test_the_command_prints_the_plan_of_a_configuration(spo_plan):
    output = spo_plan("--gpu_gb=3")
    parameters = sum(p.numel() for p in make_model().parameters())
    assert f"{parameters:,} parameters, {parameters:,} trained, 2 decoder layers\nDDPStrategy on 4 device(s)" in output
    assert "fits: 2.0 of 3 GiB" in output
    assert "alone" not in output


def test_the_command_knows_adapters(spo_plan):
    output = spo_plan("--model.policy.lora.rank=2", "--model.policy.lora.target_modules=[v_proj]")
    assert f" {2 * 2 * (32 + 16):,} trained" in output


def test_a_mixture_of_experts_is_planned_in_bfloat16_alone(spo_plan, tmp_path, capsys, caplog):
    model = make_model(tmp_path / "policy", "qwen3_moe", max_positions=512)
    with pytest.raises(SystemExit, match="2"):
        spo_plan()
    words = "; if that is about a dtype, plan with trainer.precision bf16-true, and no other dtype of the engine"
    assert words in capsys.readouterr().err
    assert "torch._subclasses" not in str(caplog.records)  # which logs a traceback
    with pytest.raises(SystemExit, match="2"):
        spo_plan("--trainer.precision=bf16-true", VLLM, "--model.engine.dtype=float32")
    assert words in capsys.readouterr().err
    output = spo_plan("--trainer.precision=bf16-true")
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in output


def test_training_rollouts_are_shared_and_benchmarks_are_as_long_as_the_model_allows(spo_plan, monkeypatch):
    loads = []
    monkeypatch.setattr(plan_command, "report", lambda settings, gpu_bytes: loads.append(settings.engine_load))
    spo_plan()
    spo_plan("--data.oversampling=1.1")
    benchmark = "--data.benchmarks={x: {source: {path: y.jsonl}}}"
    spo_plan(benchmark, "--model.eval_sampling.max_tokens=200")
    widths = [(load.rows, load.width, load.prompt_width) for load in loads]
    assert widths == [(8, 128, 28), (9, 128, 28), (16, 228, 28)]


class UnknownEngine(TransformersEngine):
    """Not one of the planner's, though it is derived from one."""


VLLM = "--model.engine=spo_lightning.rollouts.vllm_engine.VLLMEngine"
SERVER = "--model.engine=spo_lightning.rollouts.vllm_server.VLLMServerEngine"


def rollout_of(output):
    """GiB in the column of rollouts, by row."""
    lines = [line.rsplit(maxsplit=3) for line in output.splitlines() if line.endswith("-")]
    return {name.strip(): float(rollout) for name, rollout, *_ in lines if rollout != "-"}


@pytest.mark.parametrize(
    ("arguments", "itemsize", "ranks"),
    [
        ([], 4, 1),
        (["--trainer.precision=bf16-mixed"], 2, 1),
        (["--model.engine.dtype=float16"], 2, 1),
        (["--model.engine.tensor_parallel_size=2"], 4, 2),
        (["--model.policy.lora.rank=2"], 4, 1),  # vLLM gets merged weights
    ],
)
def test_vllm_s_rows_are_weights_and_the_rest_of_its_share(spo_plan, arguments, itemsize, ranks):
    output = spo_plan(VLLM, "--model.engine.gpu_memory_utilization=0.25", "--model.engine.sleep_level=2", *arguments)
    assert rollout_of(output)["engine cache"] == 20  # a quarter of 80; weights and steps are below 0.01
    weights = itemsize * sum(p.numel() for p in make_model().parameters()) / ranks
    tokens = int((20 * GIB - weights) / (2 * 2 * 16 / ranks * itemsize))  # 2 layers, keys and values of 2 heads of 8
    assert f"at most {tokens:,} tokens: 128 training requests of 128, at once" in output
    assert "host memory" not in output
    assert "fits: 22.0 of 80 GiB" in output


def test_vllm_s_settings_are_read(spo_plan, monkeypatch):
    loads = []
    monkeypatch.setattr(plan_command, "report", lambda settings, gpu_bytes: loads.append(settings.engine_load))
    engine = {
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": 5000,
        "tensor_parallel_size": 2,
        "dtype": "float16",
        "sleep_level": 2,
        "max_model_len": 77,
        "max_num_seqs": 9,
    }
    benchmark = "--data.benchmarks={x: {source: {path: y.jsonl}}}"
    spo_plan(VLLM, benchmark, *(f"--model.engine.{name}={value}" for name, value in engine.items()))
    longest = (("training", 128), ("benchmark", 28 + 32_768))
    assert loads[0] == VLLMLoad(0.3, 5000, 2, torch.float16, False, 77, 9, longest)
    spo_plan(VLLM, "--model.eval_sampling.max_tokens=20")
    assert loads[1] == VLLMLoad(0.5, None, 1, None, True, 128, 128, (("training", 128),))


def test_a_server_takes_nothing_of_the_trainer_s_devices(spo_plan):
    output = spo_plan(SERVER, "--model.engine.urls=[http://x]", "--model.engine.weights_folder=/nowhere")
    assert "engine" not in output
    assert "fits: 2.0 of 80 GiB" in output


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        # 0.9 * 8 - 2 of allowance is 5.2 GiB, 0.65 of the device, but for less than a MiB of the trainer's
        ("gpu_memory_utilization=0.99", r"   7\.1 GiB  model.engine gpu_memory_utilization: 0\.64"),
        ("kv_cache_memory_bytes=7500000000", r"   7\.2 GiB  model.engine kv_cache_memory_bytes: 5582\d{6}"),
    ],
)
def test_remedies_of_vllm_leave_a_tenth_of_the_device(spo_plan, argument, expected):
    verdict, remedies = spo_plan(VLLM, "--gpu_gb=8", f"--model.engine.{argument}").split("bring it to:\n")
    assert "does not fit" in verdict
    assert re.search(expected, remedies)


def test_more_ranks_or_a_larger_share_help_weights_that_do_not_fit(spo_plan):
    parameters = 4 * sum(p.numel() for p in make_model().parameters())
    share = 0.75 * parameters / (8 * GIB)
    engine = [f"--model.engine.gpu_memory_utilization={share:.9f}", "--model.engine.max_model_len=16"]
    output = spo_plan(VLLM, "--gpu_gb=8", *engine)
    assert "and its weights alone take 0.0" in output
    texts = [line.split("model.engine ")[1] for line in output.split("bring it to:\n")[1].splitlines()]
    assert texts == ["tensor_parallel_size: 2", "gpu_memory_utilization: 0.64"]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"), reason="convolutions cache what torch cannot follow"
)
def test_of_layers_that_are_not_attention_keys_and_values_are_not_counted_and_packing_is_not_planned(spo_plan, capsys):
    """Two layers, one of them a convolution; and only vLLM runs such a model."""
    folder = spo_plan.folder
    make_model(folder, "lfm2", max_positions=512, num_heads=4, num_kv_heads=2, hidden_size=32)
    packed = "--model.policy.attn_implementation=flash_attention_2"
    output = spo_plan(VLLM, packed, "--model.engine.kv_cache_memory_bytes=1048576")
    assert f"vLLM's cache holds at most {2**20 // (2 * 2 * 8 * 4):,} tokens" in output
    assert "beside keys and values, each request holds what else its layers carry" in output
    for arguments, message in (
        ([], "TransformersEngine cannot run Lfm2ForCausalLM"),
        ([VLLM, packed, "--model.padding_free=true"], "a run refuses it; set it to null"),
    ):
        with pytest.raises(SystemExit):
            spo_plan(*arguments)
        assert message in capsys.readouterr().err


def test_a_model_without_sdpa_is_planned_with_flash_attention_and_packing_with_sdpa_is_refused(spo_plan, capsys):
    """The arguments of gpt-oss' attention are what its sinks need; kernels of flash attention take them."""
    with pytest.raises(SystemExit):
        spo_plan("--model.padding_free=true")
    assert "the planner knows that with flash attention and flex attention, not with sdpa" in capsys.readouterr().err
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    GptOssConfig(vocab_size=64, max_position_embeddings=512, **sizes).save_pretrained(spo_plan.folder)
    assert "fits" in spo_plan(VLLM, "--model.policy.attn_implementation=flash_attention_2")


def test_the_largest_micro_batch_is_padded_unless_sequences_are_packed(spo_plan, monkeypatch):
    shapes = []
    monkeypatch.setattr(plan_command, "_micro_batch", lambda *given: shapes.append(given[-3:]) or NO_BATCH)
    spo_plan()
    spo_plan("--model.micro_batch_tokens=200")
    spo_plan("--model.policy.attn_implementation=flash_attention_2")
    spo_plan("--model.policy.attn_implementation=flash_attention_2", "--model.padding_free=false")
    assert shapes == [(8, 128, True), (2, 100, True), (1, 1024, False), (8, 128, True)]


@pytest.mark.parametrize(
    ("arguments", "compute", "master"),
    [
        (["--trainer.precision=32-true"], torch.float32, torch.float32),
        (["--trainer.precision=bf16-mixed"], torch.float32, torch.float32),
        (["--trainer.precision=bf16-mixed", "--trainer.strategy=fsdp"], torch.bfloat16, torch.float32),
        (["--trainer.precision=bf16-true"], torch.bfloat16, torch.bfloat16),
        (["--model.policy.dtype=bfloat16"], torch.bfloat16, torch.bfloat16),
    ],
)
def test_fsdp_gathers_in_bfloat16_where_autocast_keeps_float32_parameters(
    spo_plan, monkeypatch, arguments, compute, master
):
    seen = []
    monkeypatch.setattr(plan_command, "report", lambda settings, gpu_bytes: seen.append(settings))
    spo_plan(*arguments)
    assert (seen[0].compute_dtype, seen[0].master_dtype) == (compute, master)


def test_remedies_are_what_a_plan_with_them_needs(spo_plan, monkeypatch):
    seen = []
    monkeypatch.setattr(plan_command, "report", lambda settings, gpu_bytes: seen.append(settings))
    spo_plan("--trainer.strategy=fsdp", "--model.micro_batch_tokens=4096")
    settings = seen[0]
    planned = plan_command.plan(settings, 80 * GIB)
    changes = plan_command._changes(settings, planned, planned.total("rollout") * 0.999)
    texts = list(changes)
    assert texts[:4] == [
        "model.policy.gradient_checkpointing: true",
        "model.micro_batch_tokens: 128",
        "shard over twice as many devices, 8",
        "configs/strategy/fsdp2.yaml with cpu_offload: true",
    ]
    assert texts[4].startswith("model.engine max_batch_size: ")
    assert [changed.checkpointing for changed in changes.values()] == [True, False, False, False, False]
    assert changes[texts[2]].layout.shards == 8
    assert changes[texts[3]].layout.offloaded
    assert changes[texts[4]].engine_load.rows < settings.engine_load.rows


def test_a_run_that_does_not_fit_is_told_what_helps_most(spo_plan):
    output = spo_plan("--gpu_gb=0.01")
    assert "does not fit" in output
    lines = output.split("bring it to:\n")[1].splitlines()
    needed = [float(line.split()[0]) for line in lines]
    assert needed == sorted(needed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.precision=16-mixed"], "trainer.precision is 16-mixed; the planner knows"),
        (["--trainer.strategy=deepspeed"], "the planner knows FSDP2Strategy"),
        (["--model.micro_batch_tokens=100"], "is 128, more than micro_batch_tokens=100"),
        (["--model.policy.path=/nowhere"], "model.policy.path /nowhere"),
        ([VLLM, "--model.engine.tensor_parallel_size=3"], "it must divide the number of devices, 4"),
        ([VLLM, "--model.engine.engine_args={block_size: 32}"], "engine_args holds block_size, and the planner"),
        ([VLLM, "--model.engine.dtype=auto"], "model.engine.dtype is auto; the planner knows those of torch"),
        (
            ["--model.engine=test_memory_plan.UnknownEngine"],
            "is UnknownEngine; the planner knows TransformersEngine, V",
        ),
    ],
)
def test_the_command_ends_with_a_message(spo_plan, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        spo_plan(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
