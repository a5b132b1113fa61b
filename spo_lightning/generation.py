"""The generating side of a run: weights go in, graded completions come out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from spo_lightning.distributed import Ranks
from spo_lightning.experience import TokenSequence
from spo_lightning.protocols import EngineContext, Reward, RolloutEngine
from spo_lightning.rollouts.batch_collector import BatchCollector, CollectedBatch
from spo_lightning.rollouts.collection import Collection
from spo_lightning.rollouts.collector import Rollout, RolloutCollector
from spo_lightning.rollouts.dynamic_sampling import collect_informative
from spo_lightning.rollouts.tool_engine import ToolEngine
from spo_lightning.stages import StageTimer
from spo_lightning.tools.settings import ToolUse
from spo_lightning.tools.statistics import ToolStatistics
from spo_lightning.types import Prompt, PromptBatch, SamplingParams
from spo_lightning.weight_check import PROBE_TOKENS, check_weights

Score = Callable[[Sequence[TokenSequence]], list[Tensor]]


class Generation:
    """Engine and reward of a run, and the rollouts that are open.

    Args:
        engine: not started.
        reward: grader.
        tool_use: tools of completions; ``None`` has none.
        ranks: the processes of the run.
        stages: times what is done.
        collection: how batches are collected.
        sampling: how training completions are sampled.
        seed: of the run.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        reward: Reward,
        tool_use: ToolUse | None,
        ranks: Ranks,
        stages: StageTimer,
        collection: Collection,
        sampling: SamplingParams,
        seed: int,
    ) -> None:
        self.engine: RolloutEngine = engine if tool_use is None else ToolEngine(engine, tool_use)
        self.reward = reward
        self.ranks = ranks
        self.stages = stages
        self.sampling = sampling
        self._dynamic = collection.dynamic_sampling
        self._batches = BatchCollector(ranks, collection, sampling, seed, stages)
        self._collector: RolloutCollector | None = None
        self.has_weights = False
        """Whether the engine is awake and was pushed to since it was started."""

    @property
    def collector(self) -> RolloutCollector:
        """Of the running engine.

        Raises:
            RuntimeError: before ``start``.
        """
        if self._collector is None:
            raise RuntimeError("the engine is not started; call start() first")
        return self._collector

    def start(self, context: EngineContext) -> None:
        """Start the engine, if it does not run yet."""
        if self._collector is None:
            self.engine.start(context)
            self._collector = RolloutCollector(self.engine, self.reward)

    def close(self) -> None:
        """Release engine and graders."""
        running, self._collector, self.has_weights = self._collector is not None, None, False
        try:
            if running:
                self.engine.close()
        finally:
            self.reward.close()

    def push(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give every engine the policy's full parameters; returns when all have them."""
        with self.stages("push"):
            self.engine.wake_up()
            self.engine.update_weights(named_parameters, version)
            self.ranks.wait()
            self.has_weights = True

    def check(self, score: Score, prompt: Prompt, tolerance: float) -> float:
        """Compare engine and trainer on a few tokens; see ``check_weights``.

        Args:
            score: log-probabilities under the trainer's policy.
            prompt: the same each time; only as much of it is taken as the engine has room for.
            tolerance: largest mean |difference|.
        """
        room = self.engine.max_model_len - PROBE_TOKENS
        probe = Prompt(prompt.index, prompt.id, prompt.text, prompt.token_ids[: max(1, room)], prompt.reference)
        with self.stages("check"):
            return check_weights(self.collector, score, probe, self.sampling.temperature, tolerance, self.ranks)

    def collect(self, batch: PromptBatch) -> CollectedBatch:
        """Collect a training batch; the engine then sleeps until the next push."""
        if self._dynamic:
            collected = collect_informative(
                batch,
                lambda tasks: self._batches.collect(tasks, len(tasks), batch.iteration, self.collector),
            )
        else:
            collected = self._batches.collect(batch.tasks, batch.size, batch.iteration, self.collector)
        self.sleep()
        return collected

    def sleep(self) -> None:
        """Let the engine give its memory back; until the next push nothing can be sampled."""
        self.engine.sleep()
        self.has_weights = False

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingParams, seeds: Sequence[int]) -> list[Rollout]:
        """Complete prompts of this rank, wait for all, and grade them; their calls of tools are not counted.

        Ranks that share an engine ask it for the prompts of all of them, and keep their own.
        """
        group = self.engine.ranks_per_engine
        if group == 1:
            apart = self.engine.counting_nothing() if isinstance(self.engine, ToolEngine) else nullcontext()
            with apart:
                completions = self.collector.generate(prompts, sampling, seeds)
            return self.collector.grade(prompts, completions)
        first = self.ranks.rank // group * group
        asked = self.ranks.gather((list(prompts), list(seeds)))[first : first + group]
        everyone = [prompt for part, _ in asked for prompt in part]
        completions = self.collector.generate(everyone, sampling, [seed for _, part in asked for seed in part])
        begin = sum(len(part) for part, _ in asked[: self.ranks.rank - first])
        return self.collector.grade(prompts, completions[begin : begin + len(prompts)])

    def take_tool_statistics(self) -> ToolStatistics:
        """What became of the calls of all ranks since the last time; of no calls without tools."""
        return ToolStatistics.merged(
            self.ranks.gather(
                self.engine.take_statistics() if isinstance(self.engine, ToolEngine) else ToolStatistics()
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """What is open."""
        return self._batches.state_dict(self._collector)

    def load_state_dict(self, state: Mapping[str, Any], prompt_at: Callable[[int], Prompt], copies: int) -> None:
        """Go on with what was open when ``state_dict`` was taken; see ``BatchCollector.load_state_dict``."""
        self._batches.load_state_dict(state, prompt_at, copies)
