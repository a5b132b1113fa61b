"""Groups without signal are thrown away and counted, and others begun in their place."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from test_collection import SPREAD, BackgroundEngine

from spo_lightning.algorithms import GroupNormalized, TrajectoryNormalized
from spo_lightning.callbacks import IterationCheckpoint
from spo_lightning.distributed import Ranks
from spo_lightning.errors import ConfigError
from spo_lightning.generation import Generation
from spo_lightning.protocols import EngineContext
from spo_lightning.rewards import FunctionReward
from spo_lightning.rollouts import TransformersEngine
from spo_lightning.rollouts.batch_collector import CollectedBatch
from spo_lightning.rollouts.collection import Collection
from spo_lightning.rollouts.collector import Rollout
from spo_lightning.rollouts.dynamic_sampling import collect_informative, informative
from spo_lightning.stages import StageTimer
from spo_lightning.types import Completion, Grade, Prompt, PromptBatch, RolloutTask, SamplingParams

from runs import Recorder, make_run

Rewards = list[list[float | None]]
DYNAMIC = Collection(whole_groups=True, dynamic_sampling=True)


def graded(prompt: Prompt, reward: float | None, length: int = 1) -> Rollout:
    ones = torch.ones(length, dtype=torch.int64)
    completion = Completion(0, (1, 2), ones, -ones.float(), ones.bool(), ones, "", "stop")
    return Rollout(prompt, completion, Grade(reward))


# The decision, on rewards written down here


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 1, 0], True),
        ([0.25, 0.5], True),
        ([1, 1, 1], False),
        ([0, 0], False),
        ([1, None, 0], True),
        ([1, None], False),  # an undecided reward is not a 0
        ([None, None], False),
    ],
)
def test_a_group_informs_when_its_decided_rewards_differ(rewards: list[float | None], expected: bool) -> None:
    prompt = Prompt(0, "p0", "", (1, 2), "0")
    assert informative([graded(prompt, reward) for reward in rewards]) is expected


def collect_scripted(rewards: Rewards, size: int) -> tuple[CollectedBatch, list[list[int]]]:
    """Prompt i has these rewards, and i + 1 tokens a completion; also gives the rows that each round began."""
    copies = len(rewards[0])
    prompts = tuple(Prompt(i, f"p{i}", "", (1, 2), "0") for i in range(len(rewards)) for _ in range(copies))
    batch = PromptBatch(3, size, copies, prompts, torch.zeros(len(prompts), dtype=torch.float64), {})
    begun = []

    def collect(tasks: list[RolloutTask]) -> CollectedBatch:
        begun.append([task.row for task in tasks])
        rollouts = [graded(t.prompt, rewards[t.prompt.index][t.row % copies], t.prompt.index + 1) for t in tasks]
        return CollectedBatch(tasks, rollouts, [], {})

    return collect_informative(batch, collect), begun


def test_rounds_begin_what_is_missing_and_no_more() -> None:
    """Two groups of two are wanted: of 0 and 1 the second informs; 2 does not; 3 does; 4 and 5 never begin."""
    found, begun = collect_scripted([[1, 1], [0, 1], [0, 0], [1, 0], [1, 0], [1, 0]], 4)
    assert begun == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert [task.row for task in found.tasks] == list(range(8))
    assert [rollout.grade.value for rollout in found.rollouts] == [1, 1, 0, 1, 0, 0, 1, 0]
    assert found.discarded == {0, 1, 4, 5} and found.learned == [2, 3, 6, 7]
    assert [task.row for task in found.dropped] == [8, 9, 10, 11]
    assert sorted(found.ended.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert found.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found.metrics == {
        "collection/rounds": 3,
        "collection/missing_groups": 0,
        "collection/discarded_completions": 4,
        "collection/discarded_tokens": 2 * 1 + 2 * 3,
        "collection/kept_reward_mean": 0.5,
    }


def test_a_full_first_round_is_the_only_one() -> None:
    found, begun = collect_scripted([[1, 0, 0], [0, 0, 1], [1, 0, 1]], 6)
    assert begun == [[0, 1, 2, 3, 4, 5]] and not found.discarded and len(found.dropped) == 3
    assert found.metrics["collection/kept_reward_mean"] == pytest.approx(1 / 3)


def test_a_used_up_draw_leaves_groups_missing() -> None:
    found, begun = collect_scripted([[1, 1], [0, None], [None, 1], [1, 0], [0, 0]], 6)
    assert begun == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
    assert found.learned == [6, 7] and found.dropped == []
    assert found.metrics["collection/missing_groups"] == 2
    assert found.metrics["collection/discarded_completions"] == 8


def test_an_undecided_completion_of_a_kept_group_is_not_learned_from() -> None:
    found, _ = collect_scripted([[1, None, 0], [1, 1, 0]], 3)
    assert found.learned == [0, 2] and not found.discarded


def test_nothing_informative_leaves_nothing_to_learn() -> None:
    found, begun = collect_scripted([[1, 1], [0, 0], [1, 1]], 2)
    assert len(begun) == 3 and found.learned == [] and found.discarded == set(range(6))
    assert "collection/kept_reward_mean" not in found.metrics


# Whole runs of the tiny policy: 8 prompts, batches of two groups of two, up to 6 groups a draw


class Kept(Recorder):
    """Also keeps what every iteration collected and how many completions each update took, and the open prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.collected: list[CollectedBatch] = []
        self.updated: Counter[int] = Counter()  # by iteration
        self.left: list[int] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        collect, admit = module.generation.collect, module.guard.admit

        def kept(batch: PromptBatch) -> CollectedBatch:
            self.collected.append(collect(batch))
            return self.collected[-1]

        def counted(loss: float, norm: float, policy: Any, minibatch: Any, *rest: Any) -> bool:
            self.updated[len(self.collected)] += len(minibatch)
            return admit(loss, norm, policy, minibatch, *rest)

        module.generation.collect, module.guard.admit = kept, counted

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, module, *rest)
        self.left.append(len(module.generation._batches.open))


def even_length(completion: str, reference: str, prompt: str) -> float:
    return float(len(completion) % 2 == 0)


def run(
    folder: Path,
    reward: Callable[..., float | None] = even_length,
    iterations: int = 3,
    callbacks: tuple[Callback, ...] = (),
    ckpt_path: str | None = None,
    data: dict[str, Any] | None = None,
    **module: Any,
) -> SimpleNamespace:
    recorder = Kept()
    settings = {"num_iterations": iterations, "completions_per_prompt": 2, "oversampling": 3.0, **(data or {})}
    trainer, spo, datamodule = make_run(
        folder,
        reward,
        [recorder, *callbacks],
        settings,
        {"enable_checkpointing": any(isinstance(c, IterationCheckpoint) for c in callbacks)},
        **{"sampling": SPREAD, "advantage": GroupNormalized(), "collection": DYNAMIC, **module},
    )
    trainer.fit(spo, datamodule, ckpt_path=ckpt_path)
    return SimpleNamespace(recorder=recorder, module=spo, data=datamodule)


def trace(found: SimpleNamespace) -> list[Any]:
    return [
        [
            (task.key, task.prompt.index, task.baseline, r.completion.token_ids.tolist(), r.grade.value)
            for task, r in zip(batch.tasks, batch.rollouts, strict=True)
        ]
        for batch in found.recorder.collected
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dynamic")


@pytest.fixture(scope="module")
def saved(folder: Path) -> tuple[SimpleNamespace, IterationCheckpoint]:
    """Two iterations, and their checkpoint."""
    saves = IterationCheckpoint(1, 9, dirpath=str(folder / "saved"))
    return run(folder, iterations=2, callbacks=(saves,)), saves


@pytest.fixture(scope="module")
def whole(folder: Path) -> SimpleNamespace:
    """Four iterations."""
    return run(folder, iterations=4)


def test_what_is_thrown_away_is_counted_and_no_group_is_lost(whole: SimpleNamespace) -> None:
    """Everything is counted anew from the completions and rewards of the run."""
    seen, tokens, thrown = 0, 0, 0
    for iteration, (batch, metrics) in enumerate(zip(whole.recorder.collected, whole.recorder.metrics, strict=True)):
        rewards = [rollout.grade.value for rollout in batch.rollouts]
        pairs = list(zip(rewards[::2], rewards[1::2], strict=True))
        equal = [a == b for a, b in pairs]
        lengths = [rollout.completion.num_sampled for rollout in batch.rollouts]
        seen, tokens, thrown = seen + len(rewards), tokens + sum(lengths), thrown + sum(equal)
        assert metrics["progress/completions"] == seen and metrics["progress/tokens"] == tokens
        assert metrics["collection/discarded_completions"] == 2 * sum(equal)
        assert metrics["collection/missing_groups"] == 2 - equal.count(False)
        assert metrics["collection/discarded_tokens"] == sum(
            sum(lengths[2 * row : 2 * row + 2]) for row, same in enumerate(equal) if same
        )
        assert metrics["signal/degenerate_groups"] == pytest.approx(sum(equal) / len(equal))
        assert metrics["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
        versions = {v for rollout in batch.rollouts for v in rollout.completion.policy_versions.tolist()}
        assert versions == {iteration}
        assert equal.count(False) == 2 or len(equal) == 6
    assert thrown > 0 and whole.module.completions_seen == seen
    updates = [2 * (2 - int(m["collection/missing_groups"])) for m in whole.recorder.metrics]
    assert dict(whole.recorder.updated) == {iteration: count for iteration, count in enumerate(updates, 1) if count}


def test_only_kept_groups_have_advantages_and_all_enter_the_tracker(whole: SimpleNamespace) -> None:
    for batch, records, outcome in zip(
        whole.recorder.collected, whole.recorder.records, whole.recorder.outcomes, strict=True
    ):
        assert [record.advantage == 0 for record in records] == [row in batch.discarded for row in range(len(records))]
        assert outcome.index.tolist() == [task.prompt.index for task in batch.tasks]
        assert outcome.reward.tolist() == [rollout.grade.value for rollout in batch.rollouts]
        assert len(outcome.ended) == 12
    assert whole.recorder.left == [0] * 4 and whole.data.stream._open.total() == 0


def test_the_first_round_is_the_batch_of_plain_grpo(folder: Path, whole: SimpleNamespace) -> None:
    plain = run(folder, iterations=1, data={"oversampling": 1.0}, collection=Collection(whole_groups=True))
    assert trace(plain)[0] == trace(whole)[0][:4]


def test_a_resumed_run_equals_the_uninterrupted_one(
    folder: Path, whole: SimpleNamespace, saved: tuple[SimpleNamespace, IterationCheckpoint]
) -> None:
    first, saves = saved
    second = run(folder, iterations=4, ckpt_path=saves.last_model_path)
    assert trace(first) + trace(second) == trace(whole)
    for name, value in whole.module.policy.state_dict().items():
        assert torch.equal(value, second.module.policy.state_dict()[name]), name
    assert torch.equal(whole.data.tracker.value, second.data.tracker.value)
    progress = second.recorder.metrics[-1]["progress/tokens"]
    assert progress == whole.recorder.metrics[-1]["progress/tokens"]


def test_without_any_signal_nothing_is_updated_but_the_tracker_learns(folder: Path) -> None:
    """Rewards are mixed in the first iteration, and all 1 in the second."""

    class Switch(Callback):
        on = False

        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            Switch.on = True
            weights.append({name: value.clone() for name, value in module.policy.state_dict().items()})

    weights: list[dict[str, torch.Tensor]] = []
    done = run(folder, lambda *row: 1.0 if Switch.on else even_length(*row), 2, (Switch(),))
    before, after = weights
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(done.recorder.updated) == 1
    second, metrics = done.recorder.outcomes[1], done.recorder.metrics[1]
    assert metrics["collection/rounds"] == 3 and metrics["collection/missing_groups"] == 2
    assert metrics["collection/discarded_completions"] == 12 and metrics["signal/degenerate_groups"] == 1
    assert metrics["progress/completions"] == len(done.recorder.collected[0].tasks) + 12
    visited = set(done.recorder.outcomes[0].index.tolist())
    drifted = [drift > 0 for drift in second.drift.tolist()]
    assert drifted == [index in visited for index in second.index.tolist()] and any(drifted)
    assert all(done.data.tracker.value[index] > 0.5 for index in set(second.index.tolist()) - visited)


def test_an_engine_in_the_background_is_waited_for(folder: Path, whole: SimpleNamespace) -> None:
    found = run(folder, engine=BackgroundEngine(), collection=Collection("oldest", "carry", 0, True, True))
    assert trace(found)[0] == trace(whole)[0]
    assert found.recorder.left == [0] * 3


# Two ranks


class ThreadRanks(Ranks):
    """Two ranks in threads of this process, which exchange in place of ``torch.distributed``."""

    barrier = threading.Barrier(2, timeout=60)
    values: list[Any] = [None, None]

    def __init__(self, rank: int) -> None:
        self.rank, self.world_size = rank, 2

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found

    def sum(self, values: Any) -> dict[str, float]:
        parts = self.gather(values)
        return {name: sum(part[name] for part in parts) for name in values}


def test_two_ranks_share_every_round_and_decide_alike(folder: Path, whole: SimpleNamespace) -> None:
    asked: list[list[int]] = [[], []]
    found: list[Any] = [None, None]
    batch = whole.recorder.batches[0]

    def generation_of(rank: int) -> Generation:
        class Counting(TransformersEngine):
            def submit(self, requests: Any) -> None:
                asked[rank].append(len(requests))
                super().submit(requests)

        reward = FunctionReward(even_length)
        generation = Generation(Counting(), reward, None, ThreadRanks(rank), StageTimer(), DYNAMIC, SPREAD, 0)
        generation.start(EngineContext(str(folder / "start"), whole.data.tokenizer, "cpu", "float32", (1,), 48))
        return generation

    generations = [generation_of(rank) for rank in range(2)]

    def work(rank: int) -> None:
        found[rank] = generations[rank].collect(batch)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = whole.recorder.collected[0]
    for collected in found:
        assert trace(SimpleNamespace(recorder=SimpleNamespace(collected=[collected]))) == trace(whole)[:1]
        assert collected.discarded == alone.discarded and collected.metrics == alone.metrics
        assert torch.equal(collected.ended, alone.ended)
    rounds = [a + b for a, b in zip(*asked, strict=True)]
    assert len(rounds) == alone.metrics["collection/rounds"] and sum(rounds) == len(alone.tasks)
    assert asked[0][0] == asked[1][0] == 2


# What does not go together


def test_without_whole_groups_it_is_refused() -> None:
    with pytest.raises(ValueError, match="dynamic_sampling is true and whole_groups is false.*set whole_groups"):
        Collection(dynamic_sampling=True)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"oversampling": 1.0}, "data.oversampling is 1, which draws no further ones; raise it"),
        ({"completions_per_prompt": 1, "oversampling": 2.0}, "data.completions_per_prompt is 1; set it to at least 2"),
    ],
)
def test_settings_without_groups_or_further_rounds_are_refused(folder: Path, data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(folder, data=data, advantage=TrajectoryNormalized())


def test_a_checkpoint_with_carried_rollouts_is_refused(folder: Path, tmp_path: Path) -> None:
    saves = IterationCheckpoint(1, 9, dirpath=str(tmp_path))
    never = SamplingParams(max_tokens=24)
    carrying = {"collection": Collection("oldest", whole_groups=True), "data": {"oversampling": 2.0}}
    run(folder, iterations=1, callbacks=(saves,), sampling=never, **carrying)
    with pytest.raises(ConfigError, match="holds 4 completions that were carried over.*resume without it"):
        run(folder, iterations=2, ckpt_path=saves.last_model_path, sampling=never)
