"""Which rollouts fill a batch, and what becomes of the others."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from spo_lightning.callbacks import IterationCheckpoint
from spo_lightning.errors import ConfigError
from spo_lightning.generation import Generation
from spo_lightning.protocols import EngineContext
from spo_lightning.rollouts import TransformersEngine
from spo_lightning.rollouts.collection import Collection, OpenRollout, full_batch, too_old, units
from spo_lightning.rollouts.open_state import pack, unpack
from spo_lightning.stages import StageTimer
from spo_lightning.types import Completion, Prompt, PromptBatch, RolloutTask, SamplingParams

from runs import Recorder, make_run

# A random policy meets one of these after some four tokens: lengths are spread.
SPREAD = SamplingParams(max_tokens=24, stop=tuple("abcdefghijk"))


def make_prompt(index: int) -> Prompt:
    return Prompt(index, f"p{index}", f"{index}", (1, 2), "0")


def rollout(key: tuple[int, int], prompt: int = 0, versions: list[int] | None = None, ended: int = 0) -> OpenRollout:
    """Open under a prompt of its own unless told otherwise; ``ended`` is when it finished, 0 for not yet."""
    completion = None
    if versions is not None or ended:
        versions = versions or [0]
        count = len(versions)
        completion = Completion(
            7,
            (1, 2),
            torch.arange(count),
            -torch.arange(count).float(),
            torch.ones(count, dtype=torch.bool),
            torch.tensor(versions),
            "x" * count,
            "stop" if ended else "aborted",
        )
    return OpenRollout(RolloutTask(make_prompt(prompt), 0.25, *key, group=prompt), completion, ended)


def keys(chosen: list[list[OpenRollout]] | None) -> list[tuple[int, int]] | None:
    return None if chosen is None else [r.task.key for unit in chosen for r in unit]


# The rules


def test_first_finished_takes_them_in_the_order_they_finished():
    rows = [rollout((0, 0)), rollout((0, 1), ended=3), rollout((0, 2), ended=1), rollout((1, 0), ended=2)]
    candidates = units(rows, whole_groups=False)
    assert keys(full_batch(candidates, 2, "first-finished")) == [(0, 2), (1, 0)]
    assert keys(full_batch(candidates, 3, "first-finished")) == [(0, 2), (1, 0), (0, 1)]
    assert full_batch(candidates, 4, "first-finished") is None


def test_oldest_waits_for_those_drawn_first():
    rows = [rollout((1, 0), ended=1), rollout((0, 1)), rollout((0, 0), ended=2)]
    candidates = units(rows, whole_groups=False)
    assert keys(full_batch(candidates, 1, "oldest")) == [(0, 0)]
    assert full_batch(candidates, 2, "oldest") is None
    rows[1].completion = rows[2].completion
    assert keys(full_batch(candidates, 2, "oldest")) == [(0, 0), (0, 1)]


def test_whole_groups_wait_for_their_last_member():
    rows = [rollout((0, row), prompt=row // 2, ended=ended) for row, ended in enumerate([1, 5, 2, 3, 4, 0])]
    candidates = units(rows, whole_groups=True)
    assert [[r.task.row for r in unit] for unit in candidates] == [[0, 1], [2, 3], [4, 5]]
    assert keys(full_batch(candidates, 1, "first-finished")) == [(0, 2), (0, 3)]
    assert keys(full_batch(candidates, 2, "first-finished")) == [(0, 2), (0, 3), (0, 0), (0, 1)]
    assert full_batch(candidates, 3, "first-finished") is None


def test_a_prompt_drawn_again_later_is_another_group():
    rows = [rollout((0, 0), prompt=3), rollout((1, 0), prompt=3), rollout((1, 1), prompt=3)]
    assert [len(unit) for unit in units(rows, whole_groups=True)] == [1, 2]
    prompts = (make_prompt(3),) * 4  # drawn twice in a row, as happens with few prompts
    tasks = PromptBatch(0, 4, 2, prompts, torch.zeros(4, dtype=torch.float64), {}).tasks
    assert [len(unit) for unit in units(map(OpenRollout, tasks), whole_groups=True)] == [2, 2]


def test_age_counts_from_the_first_token():
    young, old, fresh = rollout((2, 0), versions=[3, 4]), rollout((0, 0), versions=[1, 4, 4]), rollout((4, 0))
    assert [r.staleness(4) for r in (young, old, fresh)] == [1, 3, 0]
    assert not too_old([young, fresh], 4, 1) and too_old([young, old], 4, 2) and not too_old([old], 4, 3)


def test_open_rollouts_survive_packing():
    rows = [
        rollout((0, 3), 2, [1, 1, 2]),
        rollout((1, 0), 5),
        replace_finish(rollout((1, 1), 4, [2, 2], ended=3)),
    ]
    state = pack(rows)
    assert set(map(type, state.values())) == {torch.Tensor, list}
    back = unpack(state, make_prompt)
    for row, again in zip(rows, back, strict=True):
        assert again.task == row.task
        assert (again.completion is None) == (row.completion is None)
        if row.completion is not None:
            assert again.completion.text == row.completion.text
            assert again.completion.finish_reason == row.completion.finish_reason
            for name in ("token_ids", "sampling_logprobs", "completion_mask", "policy_versions"):
                assert torch.equal(getattr(again.completion, name), getattr(row.completion, name))


def replace_finish(row: OpenRollout) -> OpenRollout:
    """The same, ended for its length, with a token that a tool forced."""
    mask = torch.tensor([True, False])
    return replace(row, completion=replace(row.completion, finish_reason="length", completion_mask=mask))


def test_a_negative_staleness_is_refused():
    with pytest.raises(ValueError, match="max_staleness is -1; it must be 0 or more"):
        Collection(max_staleness=-1)


# Whole runs on the Transformers engine


class Rollouts(Callback):
    """Keeps what every iteration began, learned from and left open, as the module and the stream see it."""

    def __init__(self) -> None:
        self.taken: list[list[tuple]] = []
        self.open: list[list[tuple[int, int]]] = []

    def on_train_start(self, trainer, module):
        collect = module.generation.collect

        def kept(batch):
            collected = collect(batch)
            self.taken.append(
                [
                    (task.key, task.prompt.index, task.baseline, r.completion.policy_versions.tolist(), r.completion)
                    for task, r in zip(collected.tasks, collected.rollouts, strict=True)
                ]
            )
            return collected

        module.generation.collect = kept

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.open.append(sorted(module.generation._batches.open))


def run(
    folder: Path, oversampling: float = 2.0, iterations: int = 5, callbacks=(), ckpt_path=None, data=None, **module
):
    recorder, rollouts = Recorder(), Rollouts()
    parts = make_run(
        folder,
        callbacks=[recorder, rollouts, *callbacks],
        data={"num_iterations": iterations, "oversampling": oversampling, **(data or {})},
        trainer={"enable_checkpointing": any(isinstance(c, IterationCheckpoint) for c in callbacks)},
        **{"sampling": SPREAD, "micro_batch_tokens": 64, **module},
    )
    trainer, spo, datamodule = parts
    trainer.fit(spo, datamodule, ckpt_path=ckpt_path)
    return SimpleNamespace(recorder=recorder, rollouts=rollouts, module=spo, data=datamodule)


def test_the_rest_is_carried_over_and_goes_on_under_new_weights(tmp_path):
    done = run(tmp_path)
    taken, left = done.rollouts.taken, done.rollouts.open
    assert [len(batch) for batch in taken] == [4] * 5 and [len(rest) for rest in left] == [4] * 5
    assert [len(batch.prompts) for batch in done.recorder.batches] == [8, 4, 4, 4, 4]
    everyone = [key for batch in taken for key, *_ in batch] + left[-1]
    assert sorted(everyone) == sorted({*everyone}) and len(everyone) == 8 + 4 * 4  # each begun once, none lost
    versions = [(iteration, row[3]) for iteration, batch in enumerate(taken) for row in batch]
    assert all(sorted(of) == of and of[-1] <= iteration for iteration, of in versions)
    assert any(len(set(of)) > 1 for _, of in versions)  # some went on after a push in their middle
    for iteration, batch in enumerate(taken):
        metrics = done.recorder.metrics[iteration]
        ages = [iteration - row[3][0] for row in batch]
        assert metrics["collection/staleness_max"] == max(ages)
        assert metrics["collection/staleness_mean"] == pytest.approx(sum(ages) / 4)
        assert metrics["collection/open"] == 8 and metrics["collection/carried_in"] == (4 if iteration else 0)
        kept = sum(row[4].num_sampled for row in batch) / 4
        assert metrics["collection/kept_length_mean"] == kept == metrics["completions/mean_length"]


def test_a_prompt_has_one_request_at_a_time_and_keeps_its_baseline(tmp_path):
    done = run(tmp_path, iterations=6)
    drawn: dict[tuple[int, int], tuple[int, float]] = {}
    still_open: set[int] = set()
    for batch, taken in zip(done.recorder.batches, done.rollouts.taken, strict=True):
        indices = [prompt.index for prompt in batch.prompts]
        assert not still_open & set(indices) and len(set(indices)) == len(indices)
        drawn |= {task.key: (task.prompt.index, task.baseline) for task in batch.tasks}
        assert [(index, baseline) for _, index, baseline, *_ in taken] == [drawn[key] for key, *_ in taken]
        still_open = (still_open | set(indices)) - {index for _, index, *_ in taken}


def test_tokens_before_a_push_are_the_old_policys_and_those_after_it_the_new_ones(tmp_path):
    """Teacher-forced forwards of every version over a completion that several of them wrote."""
    versions = []

    class Copies(Callback):
        def on_train_start(self, trainer, module):
            update = module.engine.update_weights

            def copied(parameters, version):
                values = [(name, value.clone()) for name, value in parameters]
                versions.append(dict(values))
                update(values, version)

            module.engine.update_weights = copied

    done = run(tmp_path, callbacks=[Copies()])
    mixed = [row[4] for batch in done.rollouts.taken for row in batch if len(set(row[3])) > 1]
    assert mixed
    model = done.module.policy.model
    for completion in mixed:
        tokens = torch.cat([torch.tensor(completion.prompt_token_ids), completion.token_ids])
        for version in set(completion.policy_versions.tolist()):
            model.load_state_dict(versions[version], strict=False)
            with torch.no_grad():
                logits = model(tokens[None]).logits[0, len(completion.prompt_token_ids) - 1 : -1]
            scored = logits.log_softmax(-1).gather(-1, completion.token_ids[:, None])[:, 0]
            wrote = completion.policy_versions == version
            assert torch.allclose(completion.sampling_logprobs[wrote], scored[wrote], atol=1e-5)
            assert not torch.allclose(completion.sampling_logprobs, scored, atol=1e-4)


def test_what_is_not_carried_is_dropped_and_drawn_anew(tmp_path):
    done = run(tmp_path, collection=Collection(unfinished="drop"))
    assert done.rollouts.open == [[]] * 5
    assert [len(batch.prompts) for batch in done.recorder.batches] == [8] * 5
    for iteration, taken in enumerate(done.rollouts.taken):
        assert all(row[3] == [iteration] * len(row[3]) for row in taken)
        assert done.recorder.metrics[iteration]["collection/dropped"] == 4
        assert done.recorder.outcomes[iteration].ended.numel() == 8


def test_tokens_of_what_is_dropped_count_as_generated(tmp_path):
    done = run(tmp_path, collection=Collection(unfinished="drop"))
    metrics = done.recorder.metrics
    dropped = [each["collection/dropped_tokens"] for each in metrics]
    assert all(4 <= count <= 4 * 24 for count in dropped)  # four rollouts, each begun
    taken = sum(4 * each["completions/mean_length"] for each in metrics)
    assert done.module.tokens_seen == round(taken + sum(dropped))


@pytest.mark.parametrize("most", [0, 1, 2])
def test_what_would_become_too_old_is_dropped_and_counted(tmp_path, most):
    never = SamplingParams(max_tokens=24)  # none ends before its 24 tokens: with "oldest" the rest grows old
    done = run(tmp_path, sampling=never, collection=Collection(max_staleness=most), iterations=6)
    ages = [iteration - row[3][0] for iteration, batch in enumerate(done.rollouts.taken) for row in batch]
    assert max(ages) <= most
    spread = run(tmp_path, collection=Collection(max_staleness=most), iterations=6)
    ages = [iteration - row[3][0] for iteration, batch in enumerate(spread.rollouts.taken) for row in batch]
    assert max(ages) == most
    dropped = [metrics["collection/dropped"] for metrics in spread.recorder.metrics]
    ended = [outcome.ended.numel() for outcome in spread.recorder.outcomes]
    assert [4 + count for count in dropped] == ended
    assert sum(dropped) > 0 if most == 0 else True


def test_the_oldest_first_is_one_step_off_policy(tmp_path):
    """With twice the batch open, each batch is the one that the iteration before began."""
    done = run(tmp_path, collection=Collection(take="oldest"), iterations=4)
    rows = [[key for key, *_ in batch] for batch in done.rollouts.taken]
    assert rows == [
        [(0, 0), (0, 1), (0, 2), (0, 3)],
        [(0, 4), (0, 5), (0, 6), (0, 7)],
        [(1, 0), (1, 1), (1, 2), (1, 3)],
        [(2, 0), (2, 1), (2, 2), (2, 3)],
    ]


def test_groups_are_taken_whole(tmp_path):
    done = run(tmp_path, collection=Collection(whole_groups=True), data={"completions_per_prompt": 2}, oversampling=1.5)
    for batch in done.rollouts.taken:
        groups = sorted((key[0], index) for key, index, *_ in batch)
        assert len(batch) == 4 and groups[0::2] == groups[1::2]


def test_without_oversampling_nothing_is_ever_open(tmp_path):
    done = run(tmp_path, oversampling=1.0)
    assert done.rollouts.open == [[]] * 5
    assert all(metrics["collection/staleness_max"] == 0 for metrics in done.recorder.metrics)


@pytest.mark.parametrize("take", ["first-finished", "oldest"])
def test_a_run_with_carried_rollouts_resumes_exactly(tmp_path, take):
    options = {"collection": Collection(take=take), "iterations": 6}
    whole = run(tmp_path, **options)
    saves = IterationCheckpoint(1, 3)
    first = run(tmp_path, callbacks=[saves], **{**options, "iterations": 3})
    assert first.rollouts.open[-1]
    second = run(tmp_path, ckpt_path=saves.last_model_path, **options)

    def trace(done):
        return [
            [(*row[:4], row[4].token_ids.tolist(), row[4].sampling_logprobs.tolist(), row[4].text) for row in batch]
            for batch in done.rollouts.taken
        ]

    assert trace(first) + trace(second) == trace(whole)
    assert first.rollouts.open + second.rollouts.open == whole.rollouts.open
    for name, value in whole.module.policy.state_dict().items():
        assert torch.equal(value, second.module.policy.state_dict()[name]), name
    assert torch.equal(whole.data.tracker.value, second.data.tracker.value)
    if take == "first-finished":  # some went on from tokens that the checkpoint held
        assert any(row[3][0] < 3 <= row[3][-1] for batch in second.rollouts.taken for row in batch)


def test_the_drift_of_a_carried_prompt_is_measured_from_its_last_visit(tmp_path):
    """A prompt visited before has its stored completion at hand whenever its new one comes in."""
    done = run(tmp_path, iterations=6, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    seen: set[int] = set()
    for batch, outcome in zip(done.recorder.batches, done.recorder.outcomes, strict=True):
        assert set(batch.previous) <= seen
        for index, drift in zip(outcome.index.tolist(), outcome.drift.tolist(), strict=True):
            assert (drift > 0) == (index in seen)
        seen |= set(outcome.index.tolist())
    assert len(seen) == 8


def test_outcomes_are_dated_by_the_version_of_their_first_token(tmp_path):
    done = run(tmp_path)
    dates = [row[3][0] for batch in done.rollouts.taken for row in batch]
    assert [date for outcome in done.recorder.outcomes for date in outcome.version.tolist()] == dates
    assert len(set(dates)) > 1 and math.isfinite(sum(dates))


def test_more_open_requests_than_prompts_are_refused_before_the_start(tmp_path):
    with pytest.raises(ConfigError, match="keeps 12 requests open, 1 a prompt, and there are 8 prompts"):
        run(tmp_path, oversampling=3.0)


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_a_share_below_one_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="oversampling is .*; it must be at least 1"):
        run(tmp_path, oversampling=value)


# A run goes on with other settings


def save_and_resume(folder: Path, before: dict, after: dict):
    """Three iterations, then up to six with other settings."""
    saves = IterationCheckpoint(1, 3)
    run(folder, iterations=3, callbacks=[saves], **before)
    return run(folder, iterations=6, ckpt_path=saves.last_model_path, **after)


def test_with_less_oversampling_what_is_open_drains(tmp_path):
    done = save_and_resume(tmp_path, {"oversampling": 3.0, "data": {"batch_size": 2}}, {
        "oversampling": 1.0, "data": {"batch_size": 2}
    })  # fmt: skip
    assert [len(batch.prompts) for batch in done.recorder.batches] == [0, 0, 2]
    assert [len(batch) for batch in done.rollouts.taken] == [2] * 3 and done.rollouts.open[-1] == []


def test_a_smaller_bound_on_age_holds_at_once(tmp_path):
    done = save_and_resume(tmp_path, {"collection": Collection(max_staleness=9)}, {
        "collection": Collection(max_staleness=0)
    })  # fmt: skip
    assert [metrics["collection/staleness_max"] for metrics in done.recorder.metrics] == [0, 0, 0]
    ended = [outcome.ended.numel() for outcome in done.recorder.outcomes]
    assert [4 + metrics["collection/dropped"] for metrics in done.recorder.metrics] == ended


def test_fewer_tokens_than_an_open_completion_has_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_tokens is 1; resume with at least"):
        save_and_resume(tmp_path, {}, {"sampling": replace(SPREAD, max_tokens=1)})


def test_groups_that_are_not_whole_are_refused(tmp_path):
    copies = {"data": {"completions_per_prompt": 2}, "oversampling": 1.5}
    with pytest.raises(ConfigError, match="takes the 2 copies of a prompt together.*groups with .*1"):
        save_and_resume(tmp_path, copies, {**copies, "collection": Collection(whole_groups=True)})


# An engine that works in the background


class BackgroundEngine(TransformersEngine):
    """Two rows at a time; goes on for three steps whenever weights come in, as a server does during an update."""

    runs_in_background = True

    def __init__(self) -> None:
        super().__init__(max_batch_size=2)
        self._done: list[Completion] = []

    def step(self):
        done, self._done = self._done + super().step(), []
        return done

    def sleep(self):
        """Servers do not."""

    def update_weights(self, named_parameters, version):
        if self._open:
            for _ in range(3):
                self._done += super().step()
        super().update_weights(named_parameters, version)

    @property
    def num_open(self):
        return super().num_open + len(self._done)

    def abort(self, request_ids):
        ids = list(request_ids)
        ended = {c.request_id: c for c in self._done if c.request_id in ids}
        self._done = [c for c in self._done if c.request_id not in ended]
        rest = {c.request_id: c for c in super().abort([i for i in ids if i not in ended])}
        return [(ended | rest)[i] for i in ids]

    def partials(self):
        return self._done + super().partials()


def test_an_engine_in_the_background_keeps_its_requests(tmp_path):
    done = run(tmp_path, engine=BackgroundEngine(), iterations=6)
    keys_taken = [key for batch in done.rollouts.taken for key, *_ in batch]
    assert [len(batch) for batch in done.rollouts.taken] == [4] * 6
    assert sorted({*keys_taken, *done.rollouts.open[-1]}) == sorted(keys_taken + done.rollouts.open[-1])
    assert len(keys_taken) + len(done.rollouts.open[-1]) == 8 + 5 * 4
    assert max(metrics["collection/ready"] for metrics in done.recorder.metrics) > 0
    assert any(len(set(row[3])) > 1 for batch in done.rollouts.taken for row in batch)
    assert all(metrics["sampling/push_difference"] < 1e-5 for metrics in done.recorder.metrics)


def test_a_checkpoint_holds_what_the_background_has_done(tmp_path):
    """Nothing is lost or done twice over a restart, and tokens keep the version that sampled them."""
    saves = IterationCheckpoint(1, 9)
    first = run(tmp_path, engine=BackgroundEngine(), iterations=3, callbacks=[saves])
    second = run(tmp_path, engine=BackgroundEngine(), iterations=6, ckpt_path=saves.last_model_path)
    taken = [key for part in (first, second) for batch in part.rollouts.taken for key, *_ in batch]
    left = second.rollouts.open[-1]
    assert len(taken) == 24 and sorted({*taken, *left}) == sorted(taken + left) and len(taken + left) == 8 + 5 * 4
    assert any(row[3][0] < 3 <= row[3][-1] for batch in second.rollouts.taken for row in batch)


def test_no_age_at_all_is_refused_for_an_engine_in_the_background(tmp_path):
    with pytest.raises(ConfigError, match="max_staleness is 0 and the engine goes on while the policy trains"):
        run(tmp_path, engine=BackgroundEngine(), collection=Collection(max_staleness=0))


# Engines that several ranks drive together


def test_ranks_of_one_engine_ask_for_the_same_and_keep_their_own(tmp_path):
    """Rank 3 of 4, two ranks an engine: ranks 2 and 3 ask for the prompts of both."""
    asked = []

    class Shared(TransformersEngine):
        ranks_per_engine = 2

        def submit(self, requests):
            asked.append([(request.prompt_token_ids, request.seed) for request in requests])
            super().submit(requests)

    prompts = [Prompt(i, f"p{i}", "", (5 + i, 6), "0") for i in range(7)]
    shares = [([prompts[0]], [10]), ([prompts[1]], [11]), (prompts[2:4], [12, 13]), (prompts[4:7], [14, 15, 16])]
    trainer, module, data = make_run(tmp_path)
    trainer.fit(module, data)
    ranks = SimpleNamespace(rank=3, world_size=4, gather=lambda value: [*shares[:3], value])
    generation = Generation(
        Shared(), module.reward, None, ranks, StageTimer(), Collection(), SamplingParams(max_tokens=4), 0
    )
    tokenizer = data.tokenizer
    generation.start(EngineContext(str(tmp_path / "start"), tokenizer, "cpu", "float32", (1,)))
    asked.clear()
    rollouts = generation.sample(shares[3][0], SamplingParams(max_tokens=4), shares[3][1])
    assert asked == [[((5 + i, 6), 10 + i) for i in range(2, 7)]]
    assert [rollout.prompt.index for rollout in rollouts] == [4, 5, 6]
    assert [rollout.completion.prompt_token_ids for rollout in rollouts] == [(9, 6), (10, 6), (11, 6)]
