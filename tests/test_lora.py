"""LoRA: only adapters train, their gradient is the closed form's, and what leaves the policy is a plain model."""

import sys
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from spo_lightning.callbacks.checkpoint import IterationCheckpoint
from spo_lightning.errors import ConfigError
from spo_lightning.lora import LoraSettings, merge_adapters
from spo_lightning.policy import PolicyConfig
from spo_lightning.policy_files import export_policy, load_policy
from spo_lightning.sharding import full_state

from runs import make_run, write_inputs
from tiny_models import make_char_tokenizer, make_model

IDS = torch.tensor([[3, 4, 5, 6, 30, 12, 2]])
LAYERS_PER_DECODER = 7  # q, k, v, o, gate, up, down


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path):
    make_model(tmp_path / "start", tied=request.param)
    return str(tmp_path / "start")


def load(folder: str, **settings):
    options = {name: settings.pop(name) for name in ("dtype", "gradient_checkpointing") if name in settings}
    return load_policy(PolicyConfig(folder, lora=LoraSettings(**{"rank": 4, "alpha": 12.0} | settings), **options))


def disturb(policy) -> None:
    """Adapters as after some training: none of them zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1


def adapted_weights(model, scaling: float) -> dict[str, torch.Tensor]:
    """W + scaling B A of every linear layer that ``peft`` has replaced, from its own attributes."""
    return {
        f"{name}.weight": module.base_layer.weight.data
        + scaling * module.lora_B["default"].weight.data @ module.lora_A["default"].weight.data
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def test_a_fresh_policy_computes_what_the_plain_one_does_and_trains_adapters_only(folder):
    policy = load(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert type(policy.model) is type(plain)
    assert policy.model.training
    assert torch.equal(policy.model(IDS).logits, plain(IDS).logits)
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * LAYERS_PER_DECODER * policy.model.config.num_hidden_layers
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert all(parameter.any() == ("lora_A" in name) for name, parameter in trained.items())


def test_the_start_comes_from_the_seed_and_draws_from_no_other_stream(folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = PolicyConfig(folder, lora=LoraSettings())
    first, again, other = (load_policy(config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) is ("lora_A" not in name)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 3.0), (True, 6.0)])
def test_the_adapted_model_is_the_plain_one_with_merged_weights(folder, rslora, scaling):
    policy = load(folder, rslora=rslora)
    disturb(policy)
    policy.model.double()
    expected = adapted_weights(policy.model, scaling)
    merged = full_state(policy, keep=True)
    plain = AutoModelForCausalLM.from_pretrained(folder).double()
    assert set(merged) == {name for name, _ in plain.named_parameters()}
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-12, atol=1e-12)
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(policy.model(IDS).logits, plain(IDS).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapter_gradients_follow_from_those_of_the_merged_weights(folder, checkpointing):
    """With G the gradient of W + s B A: that of B is s G A', that of A is s B' G."""
    policy = load(folder, gradient_checkpointing=checkpointing)
    disturb(policy)
    policy.model.double()
    plain = AutoModelForCausalLM.from_pretrained(folder).double()
    plain.load_state_dict(full_state(policy, keep=True), strict=False)
    dense = dict(plain.named_parameters())
    mask = torch.zeros_like(IDS, dtype=torch.bool)
    mask[0, 3:] = True
    positions = torch.arange(IDS.shape[1])[None]
    policy(IDS, positions, mask, 1.0)[0].sum().backward()
    log_probabilities = plain(IDS).logits[0].log_softmax(-1)
    sum(log_probabilities[p - 1, IDS[0, p]] for p in range(3, IDS.shape[1])).backward()
    for name, module in policy.model.named_modules():
        if hasattr(module, "lora_A"):
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            gradient = dense[f"{name}.weight"].grad
            torch.testing.assert_close(up.grad, 3.0 * gradient @ down.T, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(down.grad, 3.0 * up.T @ gradient, rtol=1e-6, atol=1e-8)
    assert policy.model.get_input_embeddings().weight.grad is None


def test_merging_by_hand():
    """W + 2 B A with W = [[1, 2], [3, 4]], B = [1, -1]', A = [10, 20]; a bias and a norm pass through."""
    names = ["q.base_layer.weight", "q.base_layer.bias", "q.lora_A.default.weight", "q.lora_B.default.weight", "norm"]
    values = [[[1.0, 2.0], [3.0, 4.0]], [5.0, 6.0], [[10.0, 20.0]], [[1.0], [-1.0]], [7.0]]
    stream = [(name, torch.tensor(value)) for name, value in zip(names, values, strict=True)]
    merged = dict(merge_adapters(stream, LoraSettings(rank=1, alpha=2.0)))
    assert {name: value.tolist() for name, value in merged.items()} == {
        "q.bias": [5.0, 6.0],
        "q.weight": [[21.0, 42.0], [-17.0, -36.0]],
        "norm": [7.0],
    }
    assert stream[0][1].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_merging_holds_one_layer_at_a_time():
    taken = []

    def stream():
        for layer in range(3):
            for part in ("base_layer", "lora_A.default", "lora_B.default"):
                taken.append(layer)
                yield f"{layer}.{part}.weight", torch.ones(1, 1)

    for number, (name, _) in enumerate(merge_adapters(stream(), LoraSettings())):
        assert name == f"{number}.weight"
        assert len(taken) == 3 * (number + 1)


def test_merging_is_in_float32_under_autocast_and_rounds_once():
    """1 + (2^-8 + 2^-20) lies just above the middle of two bfloat16 numbers; a product rounded first falls below it."""
    settings, product = LoraSettings(rank=1, alpha=1.0), 2**-8 + 2**-20
    names = ("q.base_layer.weight", "q.lora_A.default.weight", "q.lora_B.default.weight")
    stream = list(zip(names, [torch.ones(1, 1), torch.full((1, 1), product), torch.ones(1, 1)], strict=True))
    rounded = [(names[0], torch.ones(1, 1, dtype=torch.bfloat16)), *stream[1:]]
    with torch.autocast("cpu", torch.bfloat16):
        assert next(merge_adapters(stream, settings))[1].item() == 1 + product
        merged = next(merge_adapters(rounded, settings))[1]
    assert merged.dtype == torch.bfloat16
    assert merged.item() == 1 + 2**-7


def test_adapters_of_a_bfloat16_model_are_float32(folder):
    policy = load(folder, dtype="bfloat16")
    dtypes = {name: parameter.dtype for name, parameter in policy.bfloat16().named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    assert policy.model(IDS).logits.dtype == torch.bfloat16
    assert {value.dtype for value in full_state(policy, keep=True).values()} == {torch.bfloat16}


def test_conversion_leaves_the_adapters_bits_alone(folder):
    policy = load(folder)
    disturb(policy)
    before = {name: value.clone() for name, value in policy.state_dict().items() if "lora_" in name}
    after = policy.bfloat16().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_export_is_a_plain_model(folder, tmp_path):
    policy = load(folder)
    disturb(policy)
    export_policy(policy.model, make_char_tokenizer(), tmp_path / "out", full_state(policy, keep=True))
    exported = {path.name for path in (tmp_path / "out").iterdir()}
    assert exported == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded(IDS).logits, policy.model(IDS).logits, rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert (loaded(IDS).logits - plain(IDS).logits).abs().max() > 0.1


def test_ranks_without_weights_build_the_same_parameters_on_the_meta_device(folder):
    config = PolicyConfig(folder, lora=LoraSettings())
    whole, empty = load_policy(config), load_policy(config, weights=False)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert [(name, p.shape, p.dtype, p.requires_grad) for name, p in whole.named_parameters()] == [
        (name, p.shape, p.dtype, p.requires_grad) for name, p in empty.named_parameters()
    ]


def test_targets_are_layers_by_the_ends_of_their_names(folder):
    policy = load(folder, target_modules=["q_proj", "0.mlp.up_proj"])
    adapted = {name for name, module in policy.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    }


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "proj", "input_layernorm"])
def test_what_is_no_linear_layer_below_the_head_is_refused(folder, target):
    with pytest.raises(ConfigError, match=rf"\['{target}'\].*take from \['down_proj', 'gate_proj', .*all-linear"):
        load(folder, target_modules=["q_proj", target])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be positive"),
        ({"alpha": float("inf")}, "alpha is inf; it must be positive and finite"),
        ({"target_modules": []}, "target_modules is empty; name linear layers"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoraSettings(**settings)


def test_without_peft_the_remedy_is_told(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install -e \.\[lora\]"):
        load(folder)


def lora_run(folder, **arguments):
    """A small run whose policy has adapters."""
    trainer, module, data = make_run(folder, **arguments)
    module.policy_config = PolicyConfig(str(folder / "start"), lora=LoraSettings(rank=4))
    return trainer, module, data


def test_a_run_moves_adapters_only_and_pushes_and_exports_merged_weights(tmp_path):
    trainer, module, data = lora_run(tmp_path, optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5))
    trainer.fit(module, data)
    start = load_policy(module.policy_config, seed=module.seed).state_dict()
    for name, value in module.policy.state_dict().items():
        assert torch.equal(value, start[name]) is ("lora_" not in name)
    optimized = {id(p) for group in module.optimizers().param_groups for p in group["params"]}
    assert optimized == {id(p) for name, p in module.policy.named_parameters() if "lora_" in name}
    module._push_weights(data.dataset.longest)
    engine = dict(module.engine._model.named_parameters())
    expected = adapted_weights(module.policy.model, scaling=8.0)
    for name, value in expected.items():
        torch.testing.assert_close(engine[name], value, rtol=1e-6, atol=1e-6)
    module.export(tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(parameter, engine[name]) for name, parameter in exported.named_parameters())


def test_a_resumed_run_goes_on_with_the_adapters_of_the_checkpoint(tmp_path):
    write_inputs(tmp_path)
    states = []
    for iterations, resume in ((3, None), (1, None), (3, tmp_path / "checkpoints" / "iteration-000001.ckpt")):
        trainer, module, data = lora_run(
            tmp_path,
            callbacks=[IterationCheckpoint(every_n_iterations=1, keep=9)],
            data={"num_iterations": iterations},
            trainer={"enable_checkpointing": True},
        )
        trainer.fit(module, data, ckpt_path=resume)
        states.append(module.policy.state_dict())
    uninterrupted, stopped, resumed = states
    for name, value in uninterrupted.items():
        assert torch.equal(value, resumed[name])
        assert torch.equal(value, stopped[name]) is ("lora_" not in name)
