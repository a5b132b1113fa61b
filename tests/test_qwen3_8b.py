"""configs/qwen3_8b.yaml: the paper's numbers, its composition with the strategies, and its plan for 8 x 80 GB."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from spo_lightning.memory_layout import layout_of
from spo_lightning.memory_settings import Settings
from spo_lightning.plan_command import PlanCLI, plan, report
from spo_lightning.policy import PolicyConfig, decoder_layers
from spo_lightning.policy_files import load_policy

from tiny_models import make_char_tokenizer

ROOT = Path(__file__).parents[1]
GIB = 2**30
PARAMETERS = 8_190_735_360
LAYER = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 12288 + 2 * 128 + 2 * 4096
ROOT_UNIT = 2 * 151_936 * 4096 + 4096
ARCHITECTURE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "eos_token_id": 151_645,
}


@pytest.fixture(scope="module")
def qwen3_8b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Qwen3-8B")
    make_char_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(ARCHITECTURE))
    return folder


@pytest.fixture
def parse(qwen3_8b, monkeypatch):
    """Parses the shipped configuration under some overlays."""

    def parse(*overlays, devices=8, file=None):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr("sys.argv", ["spo"])
        files = [f"--config=configs/{name}.yaml" for name in ("qwen3_8b", *overlays)]
        files += [f"--config={file}"] if file else []
        return PlanCLI([*files, f"--trainer.devices={devices}", f"--model.policy.path={qwen3_8b}"]).config

    return parse


def test_the_settings_are_the_paper_s(parse):
    config = parse()
    model, data = config.model, config.data
    training = (model.sampling.max_tokens, model.sampling.temperature, model.sampling.top_p, model.sampling.top_k)
    assert training == (16_384, 1.0, 1.0, 0)
    evaluation = model.eval_sampling
    assert (evaluation.max_tokens, evaluation.temperature, evaluation.top_p, evaluation.top_k) == (
        32_768,
        0.6,
        0.95,
        20,
    )
    loss = model.loss.init_args
    assert (loss.clip_ratio_low, loss.clip_ratio_high, loss.aggregation) == (0.2, 0.28, "token-mean")
    optimizer = model.optimizer
    assert optimizer.class_path == "torch.optim.AdamW"
    assert (optimizer.init_args.lr, optimizer.init_args.weight_decay, model.lr_scheduler) == (1e-6, 0.1, None)
    assert (data.batch_size, model.num_minibatches, data.completions_per_prompt) == (2048, 8, 1)
    assert (data.train.path, data.train.name) == ("open-r1/DAPO-Math-17k-Processed", "en")
    assert (data.train.prompt_column, data.train.answer_column) == ("prompt", "solution")
    forgetting = data.forgetting.init_args
    assert (forgetting.min_factor, forgetting.max_factor, forgetting.kl_half_life) == (0.875, 0.96, 0.06)
    assert data.prompt_weights.init_args.exploration == 0.05
    assert (model.tool_use.max_turns, model.tool_use.format.class_path.rpartition(".")[2]) == (8, "CodeTags")
    assert (data.value_start.init_args.num_samples, data.initial_effective_count) == (8, 1 / (1 - 0.875))


def test_it_trains_float32_masters_in_bfloat16_and_a_longest_sequence_fits(parse):
    config = parse()
    assert (config.trainer.precision, config.model.policy.dtype) == ("bf16-mixed", "float32")
    assert config.model.policy.gradient_checkpointing
    tools = config.model.tool_use.max_tool_tokens
    assert config.model.micro_batch_tokens >= config.data.max_prompt_tokens + config.model.sampling.max_tokens + tools
    longest_answer = config.data.max_prompt_tokens + config.model.eval_sampling.max_tokens + tools
    assert longest_answer <= ARCHITECTURE["max_position_embeddings"]


@pytest.mark.parametrize(
    ("overlay", "devices", "shards"),
    [("single", 1, 1), ("ddp", 8, 1), ("fsdp", 8, 8), ("fsdp2", 8, 8)],
)
def test_it_composes_with_every_strategy(parse, overlay, devices, shards):
    config = parse(f"strategy/{overlay}", devices=devices)
    layout, _ = layout_of(config.trainer)
    assert (layout.devices, layout.shards, layout.sharded) == (devices, shards, shards > 1)
    assert config.data.batch_size == 2048
    assert config.trainer.precision == "bf16-mixed"


def test_the_model_is_cut_into_36_layers_and_a_root(qwen3_8b):
    policy = load_policy(PolicyConfig(str(qwen3_8b)), weights=False)
    parameters = list(policy.parameters())
    assert {p.device.type for p in parameters} == {"meta"}
    assert {p.dtype for p in parameters} == {torch.float32}
    assert sum(p.numel() for p in parameters) == PARAMETERS == 36 * LAYER + ROOT_UNIT
    layers = decoder_layers(policy.model)
    assert [sum(p.numel() for p in layer.parameters()) for layer in layers] == [LAYER] * 36
    in_layers = {p for layer in layers for p in layer.parameters()}
    assert sum(p.numel() for p in parameters if p not in in_layers) == ROOT_UNIT


TOOLS = 4096  # tokens that tools may add to a completion
LONGEST = 2048 + 16_384 + TOOLS
CACHED_TOKEN = 36 * 2 * (8 * 128) * 2  # keys and values of 36 layers, 8 heads of 128, bfloat16


@pytest.mark.parametrize("overlay", ["fsdp", "fsdp2"])
def test_sharded_over_8_it_fits_80_gib(parse, overlay):
    planned = plan(Settings.from_config(parse(f"strategy/{overlay}")), 80 * GIB)
    per_device = PARAMETERS / 8
    assert planned["parameters"].update == planned["gradients"].update == 4 * per_device
    assert planned["optimizer state"].update == pytest.approx(8 * per_device, rel=1e-4)
    assert planned["gathered units"].update == 2 * (ROOT_UNIT + 2 * LAYER)
    hidden_states = LONGEST * 4096 * 2
    assert planned["activations"].update == pytest.approx(36 * hidden_states, rel=0.2)
    assert planned["engine weights"].rollout == 2 * PARAMETERS  # bfloat16, as autocast computes
    assert planned["engine cache"].rollout == pytest.approx(0.6 * 80 * GIB - 2 * PARAMETERS)
    assert planned["weights on their way"].rollout == 4 * (ROOT_UNIT + 151_936 * 4096)
    rollouts = (4 + 8) * per_device + 0.6 * 80 * GIB + 4 * (ROOT_UNIT + 151_936 * 4096) + 2 * GIB
    assert planned.total("rollout") == pytest.approx(rollouts, rel=1e-4)
    assert planned.peak == planned.total("rollout") < 0.9 * 80 * GIB


def test_its_cache_holds_several_longest_requests(parse):
    text = report(Settings.from_config(parse("strategy/fsdp")), 80 * GIB)
    tokens = int((0.6 * 80 * GIB - 2 * PARAMETERS) / CACHED_TOKEN)
    training, benchmark = tokens // LONGEST, tokens // (2048 + 32_768 + TOOLS)
    assert (training, benchmark) == (10, 6)
    assert f"at most {tokens:,} tokens: 10 training requests of 22,528, or 6 benchmark requests of 38,912," in text
    assert f"keeps {2 * PARAMETERS / GIB:.1f} GiB of weights per device in host memory" in text


def test_every_engine_overlay_is_tested():
    assert {path.stem for path in (ROOT / "configs/engine").glob("*.yaml")} == {"transformers", "vllm", "vllm_server"}


def test_with_the_transformers_engine_it_holds_few_requests(parse, tmp_path):
    few = tmp_path / "few.yaml"
    few.write_text("model: {engine: {init_args: {max_batch_size: 2}}}")
    planned = plan(Settings.from_config(parse("strategy/fsdp", "engine/transformers", file=few)), 80 * GIB)
    assert planned["engine weights"].rollout == 2 * PARAMETERS
    rows, width = 2, 2048 + 32_768 + TOOLS
    assert planned["engine cache"].rollout == rows * width * 5 / 4 * CACHED_TOKEN
    assert planned.peak < 0.9 * 80 * GIB


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="decoding copies more than that there")
def test_a_conversation_is_read_again_behind_a_tool_s_result(parse, tmp_path):
    without = tmp_path / "without.yaml"
    without.write_text("model: {tool_use: null}")
    with_tools, alone = (
        plan(Settings.from_config(parse("strategy/fsdp", "engine/transformers", file=file)), 80 * GIB)["engine work"]
        for file in (None, without)
    )
    assert with_tools.rollout > 2 * alone.rollout  # 38,912 tokens and their mask at once


def test_with_vllm_s_own_overlay_it_fits(parse):
    planned = plan(Settings.from_config(parse("strategy/fsdp", "engine/vllm")), 80 * GIB)
    assert planned["engine cache"].rollout == pytest.approx(0.5 * 80 * GIB - 2 * PARAMETERS)
    assert planned.peak < 0.9 * 80 * GIB


def test_with_servers_the_update_is_what_needs_most(parse):
    planned = plan(Settings.from_config(parse("strategy/fsdp", "engine/vllm_server")), 80 * GIB)
    assert planned.total("rollout") == pytest.approx((4 + 8) * PARAMETERS / 8 + 2 * GIB, rel=1e-4)
    assert planned.peak == planned.total("update")
