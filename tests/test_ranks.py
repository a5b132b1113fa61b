"""Two to four real processes compute what one computes: DDP, FSDP and FSDP2, on batches that do not divide by them.

The processes train once for the whole file (``rank_runs.py``); the tests compare what they wrote.
"""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from memory_ranks import BUILDS, RETURNED, SHAPE
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from spo_lightning.errors import ConfigError
from spo_lightning.policy import PolicyConfig
from spo_lightning.run_checks import check_trainer
from spo_lightning.sharded_checkpoint import require_same_policy
from spo_lightning.sharding import check_checkpoint
from spo_lightning.strategies import FSDP2Strategy

from cpu_fsdp import CPUFSDPStrategy
from once import once
from rank_runs import (
    CARRYING,
    CLOSE,
    COMPILED,
    EXACT,
    IN_FOUR,
    IN_THREE,
    ITERATIONS,
    PLAIN,
    PROBE,
    SAVED_AT,
    SPREAD,
    STOPPED_AT,
    STRATEGIES,
    VARIANTS,
    assert_same,
    at_the_start,
    in_the_middle,
    load,
    run,
    settings_of,
    tool_settings,
    train_on_processes,
)
from runs import make_run, write_inputs, write_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the two processes left their results."""
    return once(tmp_path_factory, "ranks", train_one_and_several)


def train_one_and_several(path: Path) -> None:
    write_inputs(path)
    write_inputs(path / "tied")
    write_inputs(path / "experts", architecture="glm4_moe", tied=False)
    for config in path.rglob("generation_config.json"):  # ranks without weights must know it too
        config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": [1, 7, 9, 11]}))
    run(path, "one", "auto", 1)
    train_on_several(path)


def train_on_several(path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("rank_runs.py")), str(path)]
    with (path / "log").open("w") as log:
        ended = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, timeout=400, check=False
        )
    assert ended.returncode == 0, (path / "log").read_text()[-6000:]


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Any]:
    """The same run in this process."""
    return run(folder, f"alone-{os.getpid()}", "auto", 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_follow_the_trajectory_of_one(folder, alone, strategy):
    assert len({tuple(rows) for rows in alone["completions"]}) > 1
    assert any(value > 0 for drift in alone["drift"] for value in drift)
    assert_same(load(folder, strategy)["whole"], alone)


@pytest.fixture(scope="module")
def references(folder) -> dict[str, dict[str, Any]]:
    """The runs in this process that the variants must follow."""
    needed = {
        reference: (inputs, {} if policy is COMPILED else policy) for inputs, reference, _, policy in VARIANTS.values()
    }
    return {
        name: run(folder / inputs, f"{name}-{os.getpid()}", "auto", 1, policy=policy, **settings_of(policy))
        for name, (inputs, policy) in needed.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_follow_the_trajectory_of_one_process(folder, references, variant):
    expected = references[VARIANTS[variant][1]]
    start = AutoModelForCausalLM.from_pretrained(folder / VARIANTS[variant][0] / "start").state_dict()
    moved = max((value - start[name]).abs().max().item() for name, value in expected["weights"].items())
    assert moved > 1e-2
    for rank in range(4 if variant in IN_FOUR else 2):
        assert_same(load(folder, variant, rank)["whole"], expected)


def test_replicas_of_a_shard_meet_once_a_step(folder):
    """Not at each of its two micro-batches: three units, two layers and what is around them, in a step an iteration."""
    assert load(folder, "rounds", 0)["whole"]["pair_reductions"] == 3 * ITERATIONS


@pytest.mark.parametrize("variant", [name for name, (*_, policy) in VARIANTS.items() if policy is COMPILED])
def test_compiled_shards_share_graphs_that_know_the_layers_sizes(folder, variant):
    """Both layers, every length and number of rows: training and scoring, each for one size, for any, for one row."""
    for rank in range(2):
        compiled = load(folder, variant, rank)["compiled"]
        assert 4 <= compiled["graphs"] <= 8  # with those of the test's own pass
        assert compiled["of_any_size"] == []


def test_completions_that_call_tools_are_the_same_on_two_processes(folder):
    expected = run(folder, f"tools-{os.getpid()}", "auto", 1, **tool_settings())
    found = load(folder, "tools-ddp")["whole"]
    assert sum(expected["calls"]) > 0
    assert found["calls"] == expected["calls"]  # those of both ranks
    assert_same(found, expected)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *CARRYING])
def test_all_ranks_know_the_same(folder, strategy):
    first, second = (load(folder, strategy, rank)["whole"] for rank in range(2))
    for key in EXACT:
        assert first[key] == second[key]
    for key in (*CLOSE, "weights", "benchmark"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *CARRYING, *PLAIN, "one-file"])
def test_a_resumed_run_equals_the_uninterrupted_one(folder, strategy):
    runs = load(folder, strategy)
    assert len(runs["resumed"]["prompts"]) == ITERATIONS - SAVED_AT
    for key in EXACT:
        assert runs["resumed"][key] == runs["whole"][key][SAVED_AT:]
    for key in CLOSE:
        torch.testing.assert_close(runs["resumed"][key], runs["whole"][key][SAVED_AT:], rtol=0, atol=0)
    torch.testing.assert_close(runs["resumed"]["weights"], runs["whole"]["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_benchmarks_answered_by_two_processes_are_those_of_one(folder, alone, strategy):
    """Eight problems in threes: the ranks get unequal shares."""
    assert {"val/b/avg_at_2", "val/b/maj_at_2", "val/b/pass_at_2"} <= set(alone["benchmark"])
    assert load(folder, strategy)["whole"]["benchmark"] == pytest.approx(alone["benchmark"], rel=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_gradient_that_is_nan_is_named_and_no_other(folder, strategy):
    for rank in range(2):
        norm, blamed = load(folder, strategy, rank)["whole"]["blamed"]
        assert math.isnan(norm)
        assert blamed == ["model.model.layers.1.mlp.up_proj.weight"]


def test_fsdp_waits_for_units_to_be_freed_after_many_passes(folder):
    """With an event too many for each pass it would not wait, and more units than planned would be whole on a GPU."""
    assert load(folder, "fsdp")["whole"]["events"] <= 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_start_that_was_drawn_goes_on_also_from_another_strategy(folder, alone, strategy):
    """No optimizer has taken a step then, and most have no state."""
    started = load(folder, f"{strategy}-from-start")
    assert started.keys() == {"ddp", strategy}
    for found in started.values():
        assert_same(found, alone)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_start_that_two_processes_drew_goes_on_in_one(folder, alone, strategy):
    assert_same(run(folder, f"{strategy}-start-in-{os.getpid()}", "auto", 1, at_the_start(folder, strategy)), alone)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_of_two_processes_goes_on_in_one(folder, alone, strategy):
    middle = in_the_middle(folder, strategy)
    assert middle.is_dir() is (strategy != "ddp")  # sharded ones are folders
    assert_same(run(folder, f"{strategy}-in-one", "auto", 1, middle), alone, SAVED_AT)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_of_one_process_goes_on_in_two(folder, alone, strategy):
    assert_same(load(folder, f"{strategy}-from-one")["whole"], alone, SAVED_AT)


@pytest.mark.parametrize("name", IN_THREE)
def test_a_checkpoint_of_two_processes_or_of_one_goes_on_in_three(folder, alone, name):
    assert len({path.name for path in folder.glob(f"{name}-rank?.pt")}) == 3
    for rank in range(3):
        assert_same(load(folder, name, rank)["whole"], alone, SAVED_AT)


def test_a_checkpoint_of_two_processes_goes_on_in_two_halves_of_four(folder, alone):
    for rank in range(4):
        assert_same(load(folder, "from-two-in-four", rank)["whole"], alone, SAVED_AT)
    written = FileSystemReader(folder / "from-two-in-four-checkpoints" / "last.ckpt").read_metadata()
    tensors = [d for d in written.state_dict_metadata.values() if isinstance(d, TensorStorageMetadata) and d.size]
    assert {len(tensor.chunks) for tensor in tensors} == {2}  # one would be whole on each rank, four shared out by all


def test_one_rank_that_is_told_to_end_stops_both_with_a_sharded_checkpoint_that_resumes_exactly(folder):
    runs, whole = load(folder, "fsdp2-stopped"), load(folder, "fsdp2")["whole"]
    assert [load(folder, "fsdp2-stopped", rank)["stopped"]["told"] for rank in range(2)] == [True, True]
    saved = folder / "fsdp2-stopped-checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == [
        *(f"iteration-{done:06d}.ckpt" for done in (0, STOPPED_AT)),  # a drawn start is saved before the first
        "last.ckpt",
    ]
    assert len(list((saved / "last.ckpt").glob("*.distcp"))) == 2  # a part of each rank
    assert (len(runs["stopped"]["prompts"]), len(runs["resumed"]["prompts"])) == (STOPPED_AT, ITERATIONS - STOPPED_AT)
    for key in EXACT:
        assert runs["stopped"][key] + runs["resumed"][key] == whole[key]
    for key in CLOSE:
        torch.testing.assert_close(runs["stopped"][key] + runs["resumed"][key], whole[key], rtol=0, atol=0)
    torch.testing.assert_close(runs["resumed"]["weights"], whole["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("strategy", CARRYING)
def test_two_processes_carry_over_what_neither_waited_for(folder, strategy):
    """Five of eight open prompts are learned from each time, none twice at once, and the checkpoint knows the rest."""
    whole = load(folder, strategy)["whole"]
    assert [len(rollouts) for rollouts in whole["carried"]] == [3] * ITERATIONS
    still_open: set[int] = set()
    for drawn, ended in zip(whole["prompts"], whole["ended"], strict=True):
        assert len(ended) == 5 and not still_open & set(drawn)
        still_open = (still_open | set(drawn)) - set(ended)
        assert len(still_open) == 3


@pytest.mark.parametrize("strategy", CARRYING)
def test_a_checkpoint_with_carried_rollouts_goes_on_in_one_process(folder, strategy):
    middle = in_the_middle(folder, strategy)
    alone = run(folder, f"{strategy}-in-one", "auto", 1, middle, oversampling=1.6, sampling=SPREAD)
    whole = load(folder, strategy)["whole"]
    assert alone["prompts"][0] == whole["prompts"][SAVED_AT]
    assert [len(rollouts) for rollouts in alone["carried"]] == [3, 3]
    begun = {index: len(tokens) for index, tokens in whole["carried"][SAVED_AT - 1] if tokens}
    assert begun
    lengths = dict(zip(alone["learned"][0], alone["sampled"][0], strict=True))
    lengths |= {index: len(tokens) for index, tokens in alone["carried"][0]}
    assert all(lengths[index] >= length for index, length in begun.items())  # none began anew
    torch.testing.assert_close(alone["baseline"][0], whole["baseline"][SAVED_AT], rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_becomes_a_hugging_face_folder(folder, strategy, capsys):
    trainer, module, data = make_run(folder)
    last = folder / f"{strategy}-checkpoints" / "last.ckpt"
    trainer.export(module, data, str(last), str(folder / f"{strategy}-policy"))
    exported = AutoModelForCausalLM.from_pretrained(folder / f"{strategy}-policy").state_dict()
    weights = load(folder, strategy)["whole"]["weights"]
    assert weights.keys() <= exported.keys()
    for name, value in weights.items():
        assert torch.equal(exported[name], value), name


@pytest.mark.parametrize("variant", ["lora-ddp", "lora-fsdp", "lora-fsdp2"])
def test_the_export_of_a_checkpoint_with_adapters_computes_what_the_run_did(folder, variant, tmp_path):
    """Log-probabilities of all tokens: the run's by ranks that hold adapters, the folder's by Transformers alone."""
    inputs, _, _, policy = VARIANTS[variant]
    last = folder / inputs / f"{variant}-checkpoints" / "last.ckpt"
    assert last.is_dir() is (variant != "lora-ddp")
    trainer, module, data = make_run(folder / inputs, policy=policy)
    trainer.export(module, data, str(last), str(tmp_path / "policy"))
    exported, info = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not any(info.values())
    start = AutoModelForCausalLM.from_pretrained(folder / inputs / "start")
    after, before = (model(PROBE[None]).logits[0, -1].log_softmax(-1) for model in (exported, start))
    assert (after - before).abs().max() > 0.05
    for rank in range(2):
        torch.testing.assert_close(load(folder, variant, rank)["whole"]["next"], after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "margin"), [("fsdp2", 5), ("offload-fsdp2", 5), ("experts-fsdp2", 4), ("lora-fsdp2", 6)]
)
def test_weights_reach_the_engine_without_a_second_full_copy_on_a_rank(folder, variant, margin):
    """A bound in units of the largest parameter, of which a model has 8.6 or, with experts, 4.2; a list counts all.

    Three are the parameter before, the gathered parts, and these put together; gloo's thread may let go of a buffer
    later. Merging holds one more and the adapters.
    """
    for rank in range(2):
        whole = load(folder, variant, rank)["whole"]
        sizes = [value.nbytes for value in whole["weights"].values()]
        for way in ("dropped", "pushed"):
            assert max(sizes) <= whole["bytes"][way] <= margin * max(sizes) < sum(sizes)
        assert whole["bytes"]["kept"] >= sum(sizes)


@pytest.fixture(scope="module")
def growths(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """What the ranks of ``memory_ranks.py`` found, by strategy."""
    path = once(tmp_path_factory, "memory", measure_memory)
    return {name: [json.loads((path / f"{name}-{rank}.json").read_text()) for rank in range(2)] for name in BUILDS}


def measure_memory(path: Path) -> None:
    write_inputs(path, **SHAPE)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RETURNED.items():
            patch.setenv(name, value)
        train_on_processes(Path(__file__).with_name("memory_ranks.py"), path)


def test_a_process_grows_by_a_unit_or_a_parameter_while_weights_are_pushed(growths):
    """FSDP by two layers, the one before and the next; FSDP2 by the embedding, gathered and put together."""
    for strategy in ("fsdp", "fsdp2"):
        for found in growths[strategy]:
            sizes = dict(found["sizes"])
            layer = sum(size for name, size in sizes.items() if ".layers.3." in name)
            unit = 2 * (layer if strategy == "fsdp" else max(sizes.values()))
            whole = sum(sizes.values())
            assert 0.9 * unit < found["dropped"] < 1.2 * unit < 0.3 * whole < 0.9 * whole < found["kept"]


@pytest.mark.parametrize("strategy", BUILDS)
def test_nothing_stays_whole_during_rollouts_because_the_policy_has_scored(growths, strategy):
    for found in growths[strategy]:
        root = sum(size for name, size in found["sizes"] if ".layers." not in name)
        assert found["scored"] < 0.5 * root


def test_a_sharded_run_may_write_its_checkpoints_in_one_file(folder, alone):
    assert in_the_middle(folder, "one-file").is_file()
    assert_same(load(folder, "one-file")["whole"], alone)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_each_rank_writes_half_of_a_sharded_checkpoint(folder, strategy):
    metadata = FileSystemReader(in_the_middle(folder, strategy)).read_metadata()
    elements: Counter[str] = Counter()
    for index, stored in metadata.storage_data.items():
        described = metadata.state_dict_metadata[index.fqn]
        if isinstance(described, TensorStorageMetadata):
            chunk = next(chunk for chunk in described.chunks if chunk.offsets == index.offset)
            elements[stored.relative_path] += chunk.sizes.numel()
    assert len(elements) == 2
    assert max(elements.values()) < 0.55 * elements.total()


@pytest.mark.parametrize(("writer", "reader"), [("fsdp", FSDP2Strategy()), ("fsdp2", CPUFSDPStrategy())])
def test_the_other_way_of_sharding_is_refused_with_what_reads_it(folder, writer, reader):
    with pytest.raises(ConfigError, match=f"go on with configs/strategy/{writer}.yaml"):
        check_checkpoint(folder / f"{writer}-checkpoints" / "last.ckpt", reader)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_what_can_be_read_is_not_refused(folder, strategy):
    last = folder / f"{strategy}-checkpoints" / "last.ckpt"
    for reader in (STRATEGIES[strategy](), DDPStrategy(), SingleDeviceStrategy()):
        check_checkpoint(last, reader)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_a_sharded_checkpoint_of_another_policy_is_refused(folder, strategy, tmp_path):
    last = folder / f"{strategy}-checkpoints" / "last.ckpt"
    require_same_policy(last, PolicyConfig(str(folder / "start")))
    write_policy(tmp_path, num_layers=3)
    with pytest.raises(ConfigError, match=r"model\.layers\.2\.\S+ with shape none in the checkpoint and \(\d"):
        require_same_policy(last, PolicyConfig(str(tmp_path)))


@pytest.mark.parametrize("strategy", [CPUFSDPStrategy(), FSDP2Strategy()])
def test_an_optimizer_that_cannot_be_sharded_is_refused(tmp_path, strategy):
    _, module, _ = make_run(tmp_path, optimizer=AdamW8bit)
    module.policy, module._trainer = torch.nn.Linear(1, 1), SimpleNamespace(strategy=strategy)
    with pytest.raises(ConfigError, match="AdamW8bit of bitsandbytes.*take torchao.optim.AdamW8bit with .* fsdp2"):
        module.configure_optimizers()


def test_fsdp_with_offload_is_refused_before_anything_is_loaded(tmp_path):
    _, module, _ = make_run(tmp_path)
    trainer = SimpleNamespace(precision="32-true", max_steps=-1, strategy=CPUFSDPStrategy(cpu_offload=True))
    with pytest.raises(ConfigError, match="gradient of the last micro-batch only; take configs/strategy/fsdp2.yaml"):
        check_trainer(SimpleNamespace(trainer=trainer, policy_config=module.policy_config))
    trainer.strategy = CPUFSDPStrategy()
    check_trainer(SimpleNamespace(trainer=trainer, policy_config=module.policy_config))
