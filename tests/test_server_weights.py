"""Sets of weights for servers, in files (read with the safetensors library) and in memory; how requests are sent."""

from __future__ import annotations

import json
import re
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, MllamaConfig

from spo_lightning.errors import ConfigError
from spo_lightning.policy import PolicyConfig
from spo_lightning.policy_files import load_policy
from spo_lightning.rollouts import policy_parameters
from spo_lightning.rollouts.open_request import OpenRequest
from spo_lightning.rollouts.policy_parameters import PolicyParameters
from spo_lightning.rollouts.server_broadcast import BroadcastSettings, BroadcastTransfer, _MemorySink
from spo_lightning.rollouts.server_files import FileTransfer
from spo_lightning.rollouts.server_requests import request_body
from spo_lightning.rollouts.server_weights import PushedWeights, WeightLayout, WeightTransfer
from spo_lightning.rollouts.vllm_weights import CheckedStream, hide_tokens, renew_packed
from spo_lightning.rollouts.weights import fitting
from spo_lightning.seeding import SeedStream, derive_seed
from spo_lightning.types import RolloutRequest, SamplingParams
from spo_lightning.unloaded import unloaded_model

from tiny_models import make_char_tokenizer, make_model


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path: Path):
    return make_model(tmp_path / "policy", tied=request.param)


def layout_of(folder: Path, dtype: str = "float32") -> WeightLayout:
    return WeightLayout(str(folder / "policy"), None, dtype)


def in_memory(layout: WeightLayout) -> BroadcastTransfer:
    return BroadcastTransfer(layout, BroadcastSettings("gloo", torch.device("cpu"), None, 0, 5.0, 20_000))


@pytest.fixture
def files(model, tmp_path: Path) -> Iterator[FileTransfer]:
    files = FileTransfer(layout_of(tmp_path), tmp_path / "weights")
    yield files
    files.release()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_file_holds_every_parameter_in_whatever_order_it_came(model, files: FileTransfer, reverse: bool) -> None:
    named = list(model.named_parameters())
    path = files.write(reversed(named) if reverse else named, "3").path
    found = load_file(path)
    assert found.keys() == dict(named).keys()
    assert all(torch.equal(found[name], value) for name, value in named)
    files.remove()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_set_is_in_the_dtype_asked_for(model, tmp_path: Path, dtype: torch.dtype) -> None:
    layout = layout_of(tmp_path, str(dtype).removeprefix("torch."))
    found = load_file(FileTransfer(layout, tmp_path).write(model.named_parameters(), "0").path)
    expected = {name: value.to(dtype) for name, value in model.named_parameters()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    data = in_memory(layout).write(reversed(list(model.named_parameters())), "0").data
    assert torch.equal(data, torch.cat([value.reshape(-1).view(torch.uint8) for value in expected.values()]))
    with pytest.raises(ValueError, match="dtype is 'int8'; weights are pushed as one of float32, bfloat16"):
        layout_of(tmp_path, "int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "glm4_moe"])
def test_experts_are_kept_as_in_a_checkpoint(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    """Transformers holds the experts of a layer in one parameter, and writes each by itself.

    What no gradient changes, such as the correction by which GLM-4 chooses experts, is kept in float32.
    """
    model = make_model(tmp_path / "policy", architecture, tied=False)
    layout = layout_of(tmp_path, str(dtype).removeprefix("torch."))
    named = model.state_dict()
    buffers = named.keys() - dict(model.named_parameters()).keys()
    assert buffers == ({"model.layers.1.mlp.gate.e_score_correction_bias"} if architecture == "glm4_moe" else set())
    found = load_file(FileTransfer(layout, tmp_path / "weights").write(named.items(), "0").path)
    loaded = load_file(tmp_path / "policy" / "model.safetensors")
    saved = {name: value if name in buffers else value.to(dtype) for name, value in loaded.items()}
    assert found.keys() == saved.keys() and len(saved) > len(named)
    for name, value in saved.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    transfer = in_memory(layout)
    data = transfer.write(named.items(), "0").data
    assert torch.equal(data, torch.cat([saved[name].reshape(-1).view(torch.uint8) for name in layout.dtypes]))
    assert [name for names in transfer.buckets for name in names] == list(layout.dtypes)
    assert all(layout.offsets[name] % saved[name].itemsize == 0 for name in saved)
    named.popitem()
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        transfer.write(named.items(), "1")


def test_whole_numbers_are_kept_as_such(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 knows those up to 2**24."""
    kept = {"counts": torch.tensor([2**24 + 1, -(2**40) - 1, 3]), "flags": torch.tensor([True, False, True])}

    def with_buffers(made: Any) -> Any:
        for name, value in kept.items():
            made.model.norm.register_buffer(name, value.to(made.device))
        return made

    monkeypatch.setattr(policy_parameters, "unloaded_model", lambda config: with_buffers(unloaded_model(config)))
    named = with_buffers(model).state_dict()
    layout = layout_of(tmp_path, "bfloat16")
    found = load_file(FileTransfer(layout, tmp_path / "weights").write(named.items(), "0").path)
    transfer = in_memory(layout)
    sink = _MemorySink(transfer.write(named.items(), "0").data, layout)
    for name, value in kept.items():
        torch.testing.assert_close(found[f"model.norm.{name}"], value, rtol=0, atol=0)
        assert sink.holds(f"model.norm.{name}", value) and not sink.holds(f"model.norm.{name}", ~value)


def test_all_that_is_wrong_with_a_push_is_said() -> None:
    first = {"a": "a", "b": "b", "again": "b", "c": "c", "d": "d", "tied": "d"}
    pushed = [(name, torch.full((1,), value)) for name, value in (("a", 1), ("a", 1), ("b", 2), ("again", 3), ("x", 4))]
    pushed += [(name, torch.zeros(2)) for name in ("d", "tied")]
    taken = fitting(
        pushed, "it", first, dict.fromkeys("abcd", (1,)), lambda name, value: (name, float(value)) == ("b", 2.0)
    )
    assert [(name, int(next_value)) for name, next_value in (next(taken), next(taken))] == [("a", 1), ("b", 2)]
    with pytest.raises(ValueError) as error:
        next(taken)
    problems = [
        *("a comes twice", "again differs from b, to which the model ties it", "x is unknown"),
        *("d has shape (2,), the model's is (1,)", "tied has shape (2,), the model's is (1,)", "c is missing"),
    ]
    assert f"do not fit it: {'; '.join(problems)}. Push every" in str(error.value)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_stream_is_read_to_its_end_whatever_goes_wrong(model, tmp_path, monkeypatch, kind: str) -> None:
    layout = layout_of(tmp_path)
    transfer = FileTransfer(layout, tmp_path / "weights") if kind == "file" else in_memory(layout)
    monkeypatch.setattr(PolicyParameters, "saved_form", lambda *_: {}["no such"])
    stream = iter(model.named_parameters())
    with pytest.raises(KeyError, match="no such"):
        transfer.write(stream, "0")
    assert next(stream, None) is None


@pytest.mark.parametrize("broken", ["saved_form", "first"])
def test_a_stream_for_vllm_is_read_to_its_end_and_keeps_the_first_that_went_wrong(model, tmp_path, broken: str) -> None:
    parameters = layout_of(tmp_path).parameters

    def fail(*_: Any) -> Any:
        raise KeyError("no such")

    wrong = {"saved_form": fail} if broken == "saved_form" else {"first": SimpleNamespace(items=lambda: [], get=fail)}
    source = iter([*model.named_parameters(), ("unknown", torch.zeros(1))])
    stream = CheckedStream(source, SimpleNamespace(**{**attributes_of(parameters), **wrong}))
    assert list(stream) == []
    stream.drain()
    assert next(source, None) is None
    with pytest.raises(KeyError, match="no such"):
        stream.check()


def attributes_of(parameters: PolicyParameters) -> dict[str, Any]:
    return {name: getattr(parameters, name) for name in ("first", "shapes", "model_name", "saved_form")}


TEXT = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
RECURRENT = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 8,
}
ENCODER = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
SEEING = {  # settings of the language model and of the encoder of images
    "Qwen3_5": (RECURRENT, ENCODER),
    "Qwen3_5Moe": (RECURRENT | EXPERTS, ENCODER),
    "Llama4": (
        {"intermediate_size_mlp": 16, "num_local_experts": 4, "layer_types": ["full_attention"] * 2},
        {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2},
    ),
}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.2"), reason="there is no Qwen3.5 yet, nor this Llama 4"
)
@pytest.mark.parametrize("name", SEEING)
def test_a_language_model_has_the_names_of_a_checkpoint_that_also_sees(tmp_path: Path, name: str) -> None:
    """Values, too: of each part on its way, and of what Transformers wrote of the whole."""
    text, vision = SEEING[name]
    whole_class = getattr(transformers, f"{name}ForConditionalGeneration")
    whole = whole_class(whole_class.config_class(text_config=TEXT | text, vision_config=vision))
    whole.save_pretrained(tmp_path)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (
        type(policy).__name__ == type(load_policy(PolicyConfig(str(tmp_path))).model).__name__ == f"{name}ForCausalLM"
    )
    parameters = PolicyParameters(AutoConfig.from_pretrained(tmp_path))
    assert parameters.language_model_only
    state = policy.state_dict()
    forms = (parameters.saved_form(name, state[name]) for name in parameters.shapes)
    sent = {part: value for form in forms for part, value in form.items()}
    written = load_file(tmp_path / "model.safetensors")
    assert sent.keys() == parameters.saved_shapes.keys()
    assert sent.keys() == {key for key in written if not re.search("vis|multi_modal", key)}
    for key, value in sent.items():
        assert torch.equal(value, written[key]) and tuple(value.shape) == parameters.saved_shapes[key]


class Seeing(torch.nn.Module):
    """A vLLM model that holds a language model, by the methods and attributes of its that are used."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(tie_word_embeddings=not tied))
        self.packed: list[torch.nn.Module] = []
        language_model = torch.nn.Module()
        language_model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(tie_word_embeddings=tied))
        language_model.logits_processor = torch.nn.Identity()
        language_model.lm_head = torch.nn.Identity()
        language_model.lm_head.quant_method = SimpleNamespace(process_weights_after_loading=self.packed.append)
        self.language_model = language_model

    def get_language_model(self) -> torch.nn.Module:
        return self.language_model


@pytest.mark.parametrize("tied", [True, False])
def test_of_a_model_that_sees_the_head_of_the_language_model_is_meant(tied: bool) -> None:
    model = Seeing(tied)
    renew_packed(model)
    assert model.packed == [model.language_model.lm_head] * tied
    logits = torch.zeros(2, 5)
    hiding = hide_tokens(model, 3)
    assert model.language_model.logits_processor(logits.clone()).isinf().sum(1).tolist() == [2, 2]
    hiding.remove()
    assert model.language_model.logits_processor(logits).isfinite().all()


def test_a_language_model_that_is_not_found_in_its_checkpoint_is_refused() -> None:
    text = {"num_hidden_layers": 1, "cross_attention_layers": []}
    config = MllamaConfig(text_config=text, architectures=["NoSuchForConditionalGeneration"])
    message = "is a MllamaForCausalLM, a part of the checkpoint's NoSuchForConditional.*TransformersEngine"
    with pytest.raises(ConfigError, match=message):
        PolicyParameters(config)


def test_parameters_that_checkpoints_join_are_refused(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Transformers' conversion lays keys and values in one, as those of some models do."""

    def joined(_: object, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts: dict[str, list[torch.Tensor]] = {}
        for name, value in state.items():
            parts.setdefault(re.sub("[kv]_proj", "kv_proj", name), []).append(value)
        return {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in parts.items()}

    monkeypatch.setattr(policy_parameters, "revert_weight_conversion", joined)
    with pytest.raises(ConfigError, match="checkpoints of Qwen3ForCausalLM join several of its parameters in one"):
        layout_of(tmp_path)


def test_a_parameter_may_have_its_name_in_a_checkpoint_and_another_form(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for Transformers' conversion turns every matrix."""

    def turned(_: object, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.T if value.dim() == 2 else value for name, value in state.items()}

    monkeypatch.setattr(policy_parameters, "revert_weight_conversion", turned)
    path = FileTransfer(layout_of(tmp_path), tmp_path / "weights").write(model.named_parameters(), "0").path
    expected = turned(None, dict(model.named_parameters()))
    assert load_file(path).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in load_file(path).items())


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_tied_parameter_may_come_under_both_names_with_one_value(tmp_path: Path, kind: str) -> None:
    model = make_model(tmp_path / "policy", tied=True)
    layout = layout_of(tmp_path)
    transfer = FileTransfer(layout, tmp_path / "weights") if kind == "file" else in_memory(layout)
    both = dict(model.named_parameters(remove_duplicate=False))
    assert both.keys() - dict(model.named_parameters()).keys() == {"lm_head.weight"}
    transfer.write(both.items(), "0")
    both["lm_head.weight"] = both["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight, to which the model"):
        transfer.write(both.items(), "1")


@pytest.mark.parametrize("writes", [True, False])
def test_what_does_not_fit_is_listed_read_to_its_end_and_leaves_the_last_file(model, tmp_path, files, writes) -> None:
    last = files.write(model.named_parameters(), "1").path
    checker = files if writes else WeightTransfer(layout_of(tmp_path))
    bad = dict(model.named_parameters())
    bad["surplus"] = bad.pop("model.norm.weight")
    bad["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3)
    stream = iter(bad.items())
    with pytest.raises(ValueError) as error:
        checker.write(stream, "2")
    assert "surplus is unknown" in str(error.value)
    assert "model.norm.weight is missing" in str(error.value)
    assert "model.layers.0.mlp.up_proj.weight has shape (3,), the model's is (96, 32)" in str(error.value)
    assert next(stream, None) is None
    assert list(last.parent.iterdir()) == [last]


def test_a_set_in_memory_stays_as_it_is_until_it_is_let_go(model, tmp_path: Path) -> None:
    transfer = in_memory(layout_of(tmp_path))
    transfer.claim()

    def push(value: float) -> PushedWeights:
        torch.nn.init.constant_(model.model.norm.weight, value)
        return transfer.write(model.named_parameters(), str(value))

    first, second = push(7.0), push(8.0)
    transfer.remove(kept={first})  # a server is late: it still loads the first one
    third = push(9.0)
    norms = [weights.data.view(torch.float32) for weights in (first, third)]
    assert [set(norm.tolist()) & {7.0, 8.0, 9.0} for norm in norms] == [{7.0}, {9.0}]
    assert third.data.data_ptr() == second.data.data_ptr()  # no more memory than the sets in use and one
    with pytest.raises(ValueError, match="is missing"):
        transfer.write([], "4")
    assert set(norms[0].tolist()) & {7.0, 9.0} == {7.0}
    transfer.remove()
    assert [len(data) for data in transfer._free] == [transfer.layout.size]  # one for the next push
    transfer.release()


def test_files_stay_until_they_are_removed_and_a_rank_that_does_not_push_writes_none(model, files, tmp_path) -> None:
    first = files.write(model.named_parameters(), "1")
    second = files.write(model.named_parameters(), "2")
    assert set(second.path.parent.iterdir()) == {first.path, second.path}
    files.remove(kept={second})
    assert list(second.path.parent.iterdir()) == [second.path]
    assert WeightTransfer(layout_of(tmp_path)).write(model.named_parameters(), "3") is None


def test_a_folder_is_of_one_run_at_a_time_and_freed_of_what_killed_ones_left(model, files, tmp_path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "weights-77-unfinished.safetensors").touch()
    files.claim()
    assert [path.name for path in folder.iterdir()] == ["lock"]
    files.write(model.named_parameters(), "1")
    second = FileTransfer(layout_of(tmp_path), folder)
    with pytest.raises(RuntimeError, match=f"weights_folder {folder} is in use by another run"):
        second.claim()
    assert len(list(folder.iterdir())) == 2
    files.release()
    second.claim()
    second.release()


def test_a_folder_without_room_for_two_files_is_refused_at_the_start(model, tmp_path: Path) -> None:
    settings = json.loads((tmp_path / "policy" / "config.json").read_text())
    settings["vocab_size"] = 2**40  # 32 channels of 4 bytes: 128 TiB
    (tmp_path / "policy" / "config.json").write_text(json.dumps(settings))
    files = FileTransfer(layout_of(tmp_path), tmp_path / "weights")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="bytes free; it must have room for two files of [0-9]{15} bytes"):
            files.claim()
        files.release()  # gives the lock back


@pytest.fixture
def small_files() -> Iterator[None]:
    """Writing beyond 20 kB fails with an OSError, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_named_read_to_the_end_and_leaves_nothing(model, files, small_files, tmp_path) -> None:
    stream = iter(model.named_parameters())
    with pytest.raises(
        RuntimeError, match=f"cannot write [0-9]+ bytes of weights to weights_folder {tmp_path}/weights"
    ):
        files.write(stream, "2")
    assert next(stream, None) is None
    assert list((tmp_path / "weights").iterdir()) == []


def open_request(prompt: tuple[int, ...], sampling: SamplingParams) -> OpenRequest:
    return OpenRequest(RolloutRequest(0, prompt, sampling, 11), 100, make_char_tokenizer(), (7, 1))


def test_a_body_asks_for_the_rest_of_a_completion_and_settles_every_setting() -> None:
    row = open_request((2, 3), SamplingParams(10, 0.7, 0.9, 5))
    for token in (4, 5, 6):
        assert row.append(token, -1.0, 8) is None
    body = request_body(row)
    assert body["token_ids"] == [2, 3, 4, 5, 6]
    parameters = body["sampling_params"]
    expected = {"max_tokens": 7, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.0, "min_p": 0.0}
    assert {name: parameters[name] for name in expected} == expected
    assert parameters["stop_token_ids"] == [1, 7] and parameters["ignore_eos"]
    greedy = request_body(open_request((2,), SamplingParams(200, 0.0, 0.9, 5)))["sampling_params"]
    assert (greedy["max_tokens"], greedy["top_p"], greedy["top_k"]) == (99, 1.0, 0)
    assert (parameters["stream_interval"], greedy["stream_interval"]) == (1, 6)  # a 32nd of the completion, from 1
    long = request_body(open_request((2,), SamplingParams(8192)))["sampling_params"]
    assert long["stream_interval"] == 16
    seeds = [derive_seed(11, SeedStream.CONTINUATION, sampled) for sampled in (3, 0)]
    assert [parameters["seed"], greedy["seed"]] == seeds and seeds[0] != seeds[1]


def test_a_cut_request_has_the_leading_tokens_and_goes_on_from_them() -> None:
    row = open_request((2, 3), SamplingParams(10))
    for token, version in ((4, 1), (5, 1), (6, 2)):
        row.append(token, -float(token), version)
    cut = row.cut(2)
    completion = cut.completion("aborted")
    assert completion.token_ids.tolist() == [4, 5] and completion.sampling_logprobs.tolist() == [-4, -5]
    assert completion.policy_versions.tolist() == [1, 1]
    assert (cut.room, cut.request.seed, cut.prefix) == (8, 11, [2, 3, 4, 5])
    assert row.cut(0).prefix == [2, 3]
