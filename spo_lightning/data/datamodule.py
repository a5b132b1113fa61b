"""The data side of SPO as a LightningDataModule: prompts, tracker, history and sampler, and their checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from spo_lightning.algorithms import (
    ForgettingRule,
    KLHalfLife,
    PrioritizedWeights,
    PromptWeights,
    Smoothing,
    ValueTracker,
)
from spo_lightning.data.completion_history import CompletionHistory
from spo_lightning.data.loaders import Benchmark, PromptLoader, Sealed, SealedLoader, ShardedPromptLoader
from spo_lightning.data.prompt_dataset import PromptDataset, load_prompts
from spo_lightning.data.prompt_format import ChatTemplate, PromptFormatter
from spo_lightning.data.prompt_sampler import PrioritizedBatchSampler
from spo_lightning.data.sources import PromptSource
from spo_lightning.data.training_stream import TrainingStream
from spo_lightning.data.value_start import DrawValues, PriorStart, StartValues, ValueStart
from spo_lightning.defaults import lazy
from spo_lightning.errors import ConfigError, below, raise_problems
from spo_lightning.policy_files import load_tokenizer
from spo_lightning.tools.formats import ChatTemplateCalls
from spo_lightning.tools.settings import ToolUse
from spo_lightning.types import Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


class SPODataModule(LightningDataModule):
    """Gives batches whose baselines are frozen, and takes what was learned from them.

    A checkpoint keeps tracker, history and sampler; without it a restart would reset every baseline. Every process
    draws the same training batches; benchmarks are split between processes.

    Args:
        tokenizer_path: folder or hub name of the policy's tokenizer.
        num_iterations: iterations of the whole run, one batch each.
        train: training prompts; needed to fit and to estimate.
        benchmarks: what to evaluate on; the names become parts of metric keys.
        batch_size: completions of one iteration.
        completions_per_prompt: copies of each drawn prompt, independent samples under one baseline; divides batch_size.
        oversampling: requests that are open at the beginning of an iteration, over batch_size; at least 1. What happens
            to those that it does not wait for is said in ``model.collection`` (SPO appendix B takes 1.5 to 2).
        max_prompt_tokens: longer prompts are left out and counted.
        instruction: appended to every problem exactly as given; it brings its own separator.
        system_prompt: system message, for conversations without their own.
        chat_template: "auto" applies the tokenizer's chat template if there is one, "always" demands one, "never"
            gives plain text.
        chat_template_kwargs: variables of the chat template, e.g. ``{enable_thinking: false}``.
        tool_use: tools that prompts tell of; ``None`` has none. The command line takes it from ``model.tool_use``.
        forgetting: how much a prompt's value keeps of its past (SPO §4.1).
        prompt_weights: which prompts come more often (SPO eq. 11).
        value_start: where the tracker's first values come from (SPO Algorithm 2).
        smoothing: of start values: "jeffreys" keeps them off 0 and 1 (the public recipe), "none" takes the mean (SPO
            Algorithm 2).
        initial_effective_count: rewards that a start value is worth, N0.
        seed: of the draws.
        tokenizer_revision: commit, tag or branch of a hub tokenizer.

    Attributes:
        dataset: training prompts, from ``setup`` on.
        tokenizer: the policy's tokenizer, from ``setup`` on.
        start_completions: completions that the start values were drawn from; 0 until they are known.

    Raises:
        ValueError: arguments out of range.
    """

    dataset: PromptDataset
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        tokenizer_path: str,
        num_iterations: int,
        train: PromptSource | None = None,
        benchmarks: dict[str, Benchmark] | None = None,
        batch_size: int = 2048,
        completions_per_prompt: int = 1,
        oversampling: float = 1.0,
        max_prompt_tokens: int = 2048,
        instruction: str = _INSTRUCTION,
        system_prompt: str | None = None,
        chat_template: ChatTemplate = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        tool_use: ToolUse | None = None,
        forgetting: ForgettingRule = lazy(KLHalfLife),  # noqa: B008 (stateless; --help shows its arguments)
        prompt_weights: PromptWeights = lazy(PrioritizedWeights),  # noqa: B008
        value_start: ValueStart = lazy(PriorStart),  # noqa: B008
        smoothing: Smoothing = "jeffreys",
        initial_effective_count: float = 8.0,
        seed: int = 0,
        tokenizer_revision: str | None = None,
    ) -> None:
        super().__init__()
        self.train = train
        self.benchmarks = dict(benchmarks or {})
        self.num_iterations = num_iterations
        self.batch_size = batch_size
        self.completions_per_prompt = completions_per_prompt
        self.oversampling = oversampling
        self.max_prompt_tokens = max_prompt_tokens
        self.tool_use = tool_use
        self.value_start = value_start
        self.smoothing: Smoothing = smoothing
        self._tokenizer_name = (tokenizer_path, tokenizer_revision)
        self._format_options: dict[str, Any] = {
            "instruction": instruction,
            "system_prompt": system_prompt,
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs,
        }
        if tool_use is not None:
            self._format_options["tools"] = tool_use.format.template_tools(tool_use.tools)
            self._format_options["tool_instruction"] = tool_use.format.instruction(tool_use.tools)
        self._new_tracker = partial(
            ValueTracker, forgetting=forgetting, initial_effective_count=initial_effective_count
        )
        self.prompt_weights = prompt_weights
        self._range_is_wrong = False
        self._new_sampler = partial(PrioritizedBatchSampler, prompt_weights, batch_size, completions_per_prompt, seed)
        self.benchmark_prompts: dict[str, PromptDataset] = {}
        self._stream: TrainingStream | None = None
        self._pending_state: Mapping[str, Any] | None = None
        self._has_start = False
        self.start_completions = 0
        self._estimate: tuple[int, Collection[str]] | None = None
        self._check()

    def _check(self) -> None:
        problems = below(1, num_iterations=self.num_iterations, max_prompt_tokens=self.max_prompt_tokens)
        for build in (self._new_sampler, partial(self._new_tracker, num_prompts=1)):
            try:
                build()
            except ValueError as error:
                problems.append(str(error))
        if not 1 <= self.oversampling < float("inf"):
            problems.append(f"oversampling is {self.oversampling}; it must be at least 1, which begins no more than B")
        if self.smoothing not in ("jeffreys", "none"):
            problems.append(f'smoothing is {self.smoothing!r}; it must be "jeffreys" or "none"')
        if self.tool_use is not None and isinstance(self.tool_use.format, ChatTemplateCalls):
            ours, its = self._format_options["chat_template_kwargs"] or {}, self.tool_use.format.chat_template_kwargs
            if ours != its:
                problems.append(
                    f"chat_template_kwargs is {ours} and that of tool_use.format {its}; prompts and what follows a "
                    "call must be rendered alike, give both the same"
                )
        problems += [
            f"benchmark name {name!r} becomes part of metric keys; use letters, digits, '_', '.' and '-' only"
            for name in self.benchmarks
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name)
        ]
        raise_problems("bad SPODataModule arguments", problems)

    # Loading

    def setup(self, stage: str) -> None:
        """Load what the stage needs and has not been loaded before.

        "fit" also begins a run: a new tracker with its start values, an empty history, a sampler at iteration 0; or the
        state that was given to ``load_state_dict`` before.

        Args:
            stage: "fit", "validate", "test", or "predict" for estimates.

        Raises:
            FileNotFoundError: a file of the configuration does not exist.
            ConfigError: the tokenizer cannot write the calls of ``tool_use``.
            ConnectionError: the hub cannot be reached or does not have a data set.
            ValueError: the stage has nothing to work on, or data are malformed.
        """
        if stage in ("fit", "predict"):
            if self.train is None:
                raise ValueError("train is not set; fit and estimate need training prompts: set data.train.path")
            if not hasattr(self, "dataset"):
                self.dataset = self._load("train", self.train)
        if stage in ("validate", "test") and not self.benchmarks:
            raise ValueError(f"data.benchmarks is empty; {TrainerFn(stage).value} needs at least one: set it")
        if stage != "predict":
            for name, benchmark in self.benchmarks.items():
                if name not in self.benchmark_prompts:
                    self.benchmark_prompts[name] = self._load(name, benchmark.source)
        if stage == "fit":
            self._begin_run()

    def _load(self, name: str, source: PromptSource) -> PromptDataset:
        if not hasattr(self, "tokenizer"):
            self.tokenizer = load_tokenizer(*self._tokenizer_name)
            if self.tool_use is not None:
                self.tool_use.format.check(self.tokenizer, self.tool_use.tools)
            self._formatter = PromptFormatter(self.tokenizer, **self._format_options)
            if not (self._formatter.uses_template or self._format_options["chat_template"] == "never"):
                rank_zero_info("the tokenizer has no chat template: prompts are given to the policy as plain text")
        dataset = load_prompts(source, self._formatter, self.max_prompt_tokens)
        if dataset.num_merged:
            rank_zero_warn(
                f"{name} ({source.path}): {dataset.num_merged} rows repeat an earlier problem and answer; merged"
            )
        if dataset.num_filtered:
            rank_zero_warn(
                f"{name} ({source.path}): {dataset.num_filtered} of {dataset.num_filtered + len(dataset)} prompts have "
                f"more than max_prompt_tokens={self.max_prompt_tokens} tokens; left out"
            )
        return dataset

    def _begin_run(self) -> None:
        num_prompts = math.ceil(round(self.batch_size * self.oversampling / self.completions_per_prompt, 6))
        self._stream = TrainingStream(
            self.dataset,
            self._new_tracker(num_prompts=len(self.dataset)),
            self._new_sampler(),
            num_prompts * self.completions_per_prompt,
        )
        self._has_start = False
        if self._pending_state is not None:
            self._restore(self._pending_state)
            self._pending_state = None
        elif not isinstance(self.value_start, DrawValues):
            self.initialize_values(self.value_start.load(self.dataset))

    # The run

    @property
    def stream(self) -> TrainingStream:
        """The run's batches and what they taught.

        Raises:
            RuntimeError: before ``setup("fit")``.
        """
        if self._stream is None:
            raise RuntimeError('there is no run yet; call setup("fit") first')
        return self._stream

    @property
    def tracker(self) -> ValueTracker:
        """The value tracker of the run."""
        return self.stream.tracker

    @property
    def history(self) -> CompletionHistory:
        """The completion history of the run."""
        return self.stream.history

    @property
    def sampler(self) -> PrioritizedBatchSampler:
        """The sampler of the run."""
        return self.stream.sampler

    @property
    def needs_drawn_start(self) -> bool:
        """Whether the run has still to draw its start values and give them to ``initialize_values``.

        True when ``value_start`` is ``DrawValues`` and no values are there, neither drawn nor from a checkpoint.
        """
        return isinstance(self.value_start, DrawValues) and not self._has_start

    def initialize_values(self, start: StartValues) -> None:
        """Start the tracker (SPO Algorithm 2); warn of prompts that are left at the prior."""
        self.tracker.initialize(start.index, start.reward_sum, start.num_samples, self.smoothing)
        self._has_start = True
        self.start_completions = int(start.num_samples.sum())
        if start.unmatched:
            rank_zero_warn(f"{start.unmatched} entries of the start values belong to no training prompt; not used")
        if start.missing and not isinstance(self.value_start, PriorStart):
            rank_zero_warn(
                f"{start.missing} of {len(self.dataset)} training prompts have no start value; they begin at the prior"
            )

    def observe(self, outcome: Outcome) -> dict[str, float]:
        """Let an iteration's outcome, the same on every process, enter tracker and history.

        Returns:
            The metrics of ``TrainingStream.observe``.
        """
        self._warn_of_range(outcome)
        return self.stream.observe(outcome)

    def _warn_of_range(self, outcome: Outcome) -> None:
        weights = self.prompt_weights
        if self._range_is_wrong or not isinstance(weights, PrioritizedWeights) or not len(outcome.reward):
            return
        least, most = outcome.reward.aminmax()
        slack = 1e-6 * (weights.reward_max - weights.reward_min)
        self._range_is_wrong = bool(least < weights.reward_min - slack or most > weights.reward_max + slack)
        if self._range_is_wrong:
            rank_zero_warn(
                f"rewards reach from {least:g} to {most:g}, and data.prompt_weights expects them within "
                f"[{weights.reward_min:g}, {weights.reward_max:g}]: prompts of values outside are drawn least, as if "
                "nothing could be learned of them; set reward_min and reward_max of PrioritizedWeights"
            )

    # Loaders

    def train_batches(self) -> PromptLoader:
        """The run's remaining training batches; ask for the next only after ``observe`` of the one before."""
        return PromptLoader(self.stream, self.num_iterations)

    def benchmark_batches(self) -> list[ShardedPromptLoader]:
        """This process's share of each benchmark, in the order of ``benchmarks``."""
        return [
            self._share(name, self.benchmark_prompts[name], benchmark.num_samples, benchmark.problems_per_batch)
            for name, benchmark in self.benchmarks.items()
        ]

    def estimate_batches(self, num_samples: int, skip: Collection[str] = ()) -> ShardedPromptLoader:
        """This process's share of the training prompts, to be answered by the initial policy (SPO Algorithm 2).

        Args:
            num_samples: completions per prompt; a batch holds about as many completions as a training batch.
            skip: ids of prompts to leave out.
        """
        positions = [position for position, prompt_id in enumerate(self.dataset.ids) if prompt_id not in skip]
        return self._share("train", self.dataset, num_samples, max(1, self.batch_size // num_samples), positions)

    def _share(
        self,
        name: str,
        prompts: PromptDataset,
        num_samples: int,
        size: int | None,
        positions: Sequence[int] | None = None,
    ) -> ShardedPromptLoader:
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return ShardedPromptLoader(name, prompts, num_samples, size, rank, world_size, positions)

    def train_dataloader(self) -> SealedLoader:
        """``train_batches`` for the trainer.

        Raises:
            ValueError: the trainer would run several epochs.
        """
        if self.trainer is not None and self.trainer.max_epochs != 1:
            raise ConfigError(
                f"trainer.max_epochs is {self.trainer.max_epochs}; one epoch holds all iterations of a run, "
                f"num_iterations={self.num_iterations} of them: set max_epochs to 1"
            )
        return SealedLoader(self.train_batches())

    def val_dataloader(self) -> list[SealedLoader]:
        """``benchmark_batches`` for the trainer."""
        return [SealedLoader(loader) for loader in self.benchmark_batches()]

    def test_dataloader(self) -> list[SealedLoader]:
        """``benchmark_batches`` for the trainer."""
        return self.val_dataloader()

    def estimate_with(self, num_samples: int, skip: Collection[str] = ()) -> None:
        """Say what ``predict_dataloader`` gives: ``estimate_batches`` with these arguments."""
        self._estimate = (num_samples, frozenset(skip))

    def predict_dataloader(self) -> SealedLoader:
        """The training prompts that ``estimate_with`` asked for.

        Raises:
            ValueError: nothing was asked for.
        """
        if self._estimate is None:
            raise ValueError("there is nothing to predict; call estimate_with first, or run `spo estimate`")
        return SealedLoader(self.estimate_batches(*self._estimate))

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Open a sealed batch; its few tensors stay on the CPU."""
        return batch.batch if isinstance(batch, Sealed) else batch

    # Checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The state of the run, tensors and primitives only; empty when there is none."""
        return {} if self._stream is None else {**self._stream.state_dict(), "has_start": self._has_start}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the run of a checkpoint, now or in ``setup("fit")``.

        Lightning calls this after ``setup``, for every stage.

        Raises:
            ValueError: the checkpoint belongs to another data set.
        """
        if self.trainer is None:
            self._pending_state = state_dict
        elif self.trainer.state.fn == TrainerFn.FITTING:
            self._restore(state_dict)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state)
        self._has_start = state["has_start"]
