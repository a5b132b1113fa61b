"""The LightningModule: one training step is one SPO iteration (Algorithm 1)."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jsonargparse import lazy_instance
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from spo_lightning.algorithms import (
    AdvantageEstimator,
    DriftEstimator,
    ImportanceSampling,
    MeanAbsLogRatio,
    OffPolicyCorrection,
    PolicyLoss,
    PPOClipLoss,
    TrajectoryNormalized,
)
from spo_lightning.data.prompt_dataset import PromptDataset
from spo_lightning.data.value_start import ValueRow
from spo_lightning.distributed import Ranks
from spo_lightning.errors import ConfigError
from spo_lightning.evaluation import BenchmarkEvaluator
from spo_lightning.experience import Experience, TokenSequence
from spo_lightning.generation import Generation
from spo_lightning.iteration_metrics import (
    completion_records,
    learning_metrics,
    mismatch_metrics,
    rollout_metrics,
    signal_metrics,
    timing_metrics,
    tool_metrics,
)
from spo_lightning.learner import score
from spo_lightning.micro_batches import MicroBatching
from spo_lightning.nonfinite import NonFiniteGuard
from spo_lightning.policy import (
    Policy,
    PolicyConfig,
    eos_token_ids,
    export_policy,
    load_policy,
    load_tokenizer,
    tells_packed_sequences_apart,
)
from spo_lightning.policy_update import PolicyUpdate
from spo_lightning.preparation import PreviousCompletions, build_experience, build_outcome, decided_rows
from spo_lightning.protocols import EngineContext, Reward, RolloutEngine
from spo_lightning.rollouts.batch_collector import CollectedBatch
from spo_lightning.rollouts.collection import Collection
from spo_lightning.rollouts.collector import Rollout
from spo_lightning.rollouts.transformers_engine import TransformersEngine
from spo_lightning.seeding import SeedStream, derive_seed, seed_iteration
from spo_lightning.sharding import full_parameters, full_state, is_sharding, shard_policy
from spo_lightning.stages import StageTimer
from spo_lightning.strategies import FSDP2Strategy
from spo_lightning.tools.settings import ToolUse
from spo_lightning.types import BenchmarkBatch, Outcome, Prompt, PromptBatch, SamplingParams
from spo_lightning.weight_check import TOLERANCE


class SPOModule(LightningModule):
    """Trains a policy by Single-stream Policy Optimization.

    Args:
        policy: the language model.
        reward: grades completions.
        engine: generates completions; ``None`` takes a ``TransformersEngine``.
        tool_use: tools that completions may call, of training and of benchmarks; ``None`` has none.
        collection: what becomes of rollouts that the batch does not wait for, where ``data.oversampling`` is above 1.
        sampling: how training completions are sampled.
        eval_sampling: how benchmark completions are sampled; the defaults are the paper's.
        advantage: turns rewards and baselines into advantages (SPO eq. 9).
        loss: the surrogate (SPO eq. 10).
        correction: weighs tokens by how likely the trainer's policy finds what the engine sampled; ``None`` does not.
        old_logprobs: the ratio's denominator: "trainer" scores the completions before the update, "engine" takes the
            log-probabilities that they were sampled with and saves that pass.
        drift: estimates D(x) for the tracker (SPO §4.1).
        drift_max_tokens: leading sampled tokens of a prompt's last completion that are kept to measure its drift.
        optimizer: any torch optimizer.
        lr_scheduler: any torch schedule by steps; stepped once per optimiser step.
        num_minibatches: optimiser steps per rollout batch (the paper takes 8).
        micro_batch_tokens: most tokens, padding included, of one forward and backward pass on one rank.
        padding_free: lay the sequences of a micro-batch end to end instead of padding them; ``None`` does so where the
            policy's attention has kernels for it (flash attention, flex attention).
        max_grad_norm: gradients are clipped to this norm; ``None`` leaves them.
        max_skipped_steps: training stops after so many optimiser steps in a row with a loss or gradient not finite.
        push_tolerance: after every push of weights a few tokens are compared; the largest mean |difference| of their
            log-probabilities between engine and trainer. ``None`` goes by the dtypes, infinity compares nothing.
        seed: of rollouts and mini-batches.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        reward: Reward,
        engine: RolloutEngine | None = None,
        tool_use: ToolUse | None = None,
        collection: Collection = Collection(),  # noqa: B008 (frozen)
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        eval_sampling: SamplingParams = SamplingParams(32768, 0.6, 0.95, 20),  # noqa: B008 (frozen)
        advantage: AdvantageEstimator = lazy_instance(TrajectoryNormalized),  # noqa: B008 (stateless, as the next two)
        loss: PolicyLoss = lazy_instance(PPOClipLoss),  # noqa: B008
        correction: OffPolicyCorrection | None = lazy_instance(ImportanceSampling),  # noqa: B008
        old_logprobs: Literal["trainer", "engine"] = "trainer",
        drift: DriftEstimator = lazy_instance(MeanAbsLogRatio),  # noqa: B008
        drift_max_tokens: int = 512,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        num_minibatches: int = 8,
        micro_batch_tokens: int = 16384,
        padding_free: bool | None = None,
        max_grad_norm: float | None = 1.0,
        max_skipped_steps: int = 5,
        push_tolerance: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        counts = {
            "drift_max_tokens": drift_max_tokens,
            "num_minibatches": num_minibatches,
            "micro_batch_tokens": micro_batch_tokens,
            "max_skipped_steps": max_skipped_steps,
        }
        problems = [f"{name} is {value}; it must be at least 1" for name, value in counts.items() if value < 1]
        if max_grad_norm is not None and not max_grad_norm > 0:
            problems.append(f"max_grad_norm is {max_grad_norm}; it must be positive, or null for no clipping")
        if push_tolerance is not None and not push_tolerance > 0:
            problems.append(f"push_tolerance is {push_tolerance}; it must be positive, .inf compares nothing")
        if sampling.temperature == 0:
            problems.append("sampling.temperature is 0; training needs sampled completions, set it above 0")
        if problems:
            raise ValueError("bad SPOModule arguments: " + "; ".join(problems))
        self.policy_config = policy
        self.reward = reward
        self.tool_use = tool_use
        self.engine: RolloutEngine = TransformersEngine() if engine is None else engine
        self.collection = collection
        self.sampling = sampling
        self.eval_sampling = eval_sampling
        self.advantage = advantage
        self.loss = loss
        self.correction = correction
        self.old_logprobs = old_logprobs
        self.drift = drift
        self.drift_max_tokens = drift_max_tokens
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.num_minibatches = num_minibatches
        self.micro_batch_tokens = micro_batch_tokens
        self.packed = tells_packed_sequences_apart(policy.attn_implementation) if padding_free is None else padding_free
        self.max_grad_norm = max_grad_norm
        self.push_tolerance = push_tolerance
        self.seed = seed
        self.guard = NonFiniteGuard(max_skipped_steps)
        self.stages = StageTimer()
        self.completions_seen = 0
        self.policy_version = 0
        self.exported_path: Path | None = None
        self._evaluators: dict[str, BenchmarkEvaluator] = {}

    # Set-up and take-down

    def configure_model(self) -> None:
        """Load policy and tokenizer, once, and shard the policy if the strategy does.

        Where the policy is sharded only rank 0 reads the weights.
        """
        if hasattr(self, "policy"):
            return
        self.tokenizer = load_tokenizer(self.policy_config.path, self.policy_config.revision)
        if self._trainer is None:
            self.policy: torch.nn.Module = load_policy(self.policy_config, seed=self.seed)
            return
        strategy = self.trainer.strategy
        reads = strategy.is_global_zero or not is_sharding(strategy)
        policy = load_policy(self.policy_config, reads, self.seed)
        self.policy = shard_policy(cast(Policy, strategy.precision_plugin.convert_module(policy)), strategy)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the schedule of the configuration."""
        optimizer = self.optimizer_factory(p for p in self.policy.parameters() if p.requires_grad)
        if type(optimizer).__module__.startswith("bitsandbytes") and isinstance(self.trainer.strategy, FSDP2Strategy):
            raise ConfigError(
                f"model.optimizer is {type(optimizer).__name__} of bitsandbytes, which cannot step what FSDP2 shards; "
                "take torchao.optim.AdamW8bit, or the strategy fsdp"
            )
        self._configured_lr = optimizer.param_groups[0]["lr"]
        if self.lr_scheduler_factory is None:
            return optimizer
        scheduler = self.lr_scheduler_factory(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigError(
                "lr_scheduler is ReduceLROnPlateau, which needs a monitored metric; take one that goes by steps"
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def setup(self, stage: str) -> None:
        """Refuse what the module cannot do, before any work."""
        self.ranks = Ranks()
        if self.tool_use is not None and self.engine.ranks_per_engine > 1:
            raise ConfigError(
                f"model.engine is shared by {self.engine.ranks_per_engine} ranks, which would not see results of tools "
                "at the same moment; take an engine for each rank (tensor_parallel_size 1) or vLLM servers, or set "
                "model.tool_use to null"
            )
        self.generation = Generation(
            self.engine, self.reward, self.tool_use, self.ranks, self.stages, self.collection, self.sampling, self.seed
        )
        if stage != "fit":
            return
        if self.trainer.precision in ("16-mixed", "16-true"):
            raise ConfigError(
                f"trainer.precision is {self.trainer.precision}; scaled fp16 gradients hide what is not finite, "
                "use bf16-mixed or 32"
            )
        if self.policy_config.head == "liger" and (self.device.type != "cuda" or find_spec("liger_kernel") is None):
            raise ConfigError(
                f"model.policy.head is liger, which needs a CUDA device (this is {self.device}) and pip install -e "
                ".[liger]; set it to torch"
            )
        if self.trainer.max_steps != -1:
            raise ConfigError(
                f"trainer.max_steps is {self.trainer.max_steps}; it counts optimiser steps and would end a run inside "
                "an iteration, set data.num_iterations instead"
            )

    def on_fit_start(self) -> None:
        """Check the longest possible sequence against the micro-batch, and start the engine."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        longest = data.max_prompt_tokens + self.sampling.max_tokens + self._tool_tokens
        if longest > self.micro_batch_tokens:
            with_tools = " + tool_use.max_tool_tokens" if self.tool_use else ""
            raise ConfigError(
                f"data.max_prompt_tokens + sampling.max_tokens{with_tools} is {longest}, more than "
                f"micro_batch_tokens={self.micro_batch_tokens}; raise model.micro_batch_tokens or lower one of them"
            )
        begins = self.ranks.gather(data.sampler.iteration)
        if len(set(begins)) > 1:
            raise ConfigError(
                f"the ranks begin at iterations {begins}: not all of them found the same checkpoint; put "
                "trainer.default_root_dir on a file system that all nodes share"
            )
        self._check_references({"train": data.dataset, **data.benchmark_prompts})
        if self.policy_config.dtype == "bfloat16" and self.policy_config.lora is None:
            rank_zero_warn(
                "model.policy.dtype is bfloat16: steps smaller than about 1/256 of a weight are rounded away, which is "
                "most of them at the learning rates of RL; use float32 with trainer.precision bf16-mixed"
            )
        if self.advantage.needs_groups and data.completions_per_prompt < 2:
            raise ConfigError(
                f"model.advantage is {type(self.advantage).__name__}, which compares completions of one prompt, and "
                f"data.completions_per_prompt is {data.completions_per_prompt}; set it to at least 2"
            )
        if self.advantage.needs_groups and data.oversampling > 1 and not self.collection.whole_groups:
            raise ConfigError(
                f"model.advantage is {type(self.advantage).__name__}, which needs the completions of a prompt "
                f"together, and data.oversampling is {data.oversampling}; set model.collection.whole_groups to true"
            )
        carries = data.oversampling > 1 and self.collection.unfinished == "carry"
        if self.engine.runs_in_background and carries and self.collection.max_staleness == 0:
            raise ConfigError(
                "model.collection.max_staleness is 0 and the engine goes on while the policy trains: what it begins "
                "then is one version old; allow at least 1, or set model.collection.unfinished to drop"
            )
        if self.sampling.top_p < 1 or self.sampling.top_k > 0:
            rank_zero_warn(
                f"model.sampling has top_p {self.sampling.top_p} and top_k {self.sampling.top_k}: completions come "
                "from a truncated distribution, ratios are taken on the full one; the paper trains with both off"
            )
        self._start_engine()
        self._check_lengths({"train": data.dataset, **data.benchmark_prompts})

    def on_validation_start(self) -> None:
        """Check the benchmarks' answers and lengths; during ``fit`` that has been done."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            benchmarks = self.trainer.datamodule.benchmark_prompts  # type: ignore[attr-defined]
            self._check_references(benchmarks)
            self._start_engine()
            self._check_lengths(benchmarks)

    on_test_start = on_validation_start

    def on_train_start(self) -> None:
        """Say so when a resumed optimizer keeps a learning rate that the configuration has changed."""
        restored = cast(LightningOptimizer, self.optimizers()).param_groups[0]["lr"]
        if self.lr_scheduler_factory is None and restored != self._configured_lr:
            rank_zero_warn(
                f"the checkpoint's learning rate {restored} goes on; the configured {self._configured_lr} is not used. "
                "For a new one, export the policy and start a new run from it"
            )

    def teardown(self, stage: str) -> None:
        """Release engine and graders."""
        self.generation.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the counters and the open rollouts."""
        checkpoint["spo"] = {
            "rollouts": self.generation.state_dict(),
            "guard": self.guard.state_dict(),
            "completions_seen": self.completions_seen,
            "optimizer": self._optimizer_name(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters and the open rollouts back."""
        self.guard.load_state_dict(checkpoint["spo"]["guard"])
        self.completions_seen = checkpoint["spo"]["completions_seen"]
        if self.trainer.state.fn == TrainerFn.FITTING:
            saved, wanted = checkpoint["spo"]["optimizer"], self._optimizer_name()
            if saved != wanted:
                raise ConfigError(
                    f"the checkpoint's optimizer is {saved}, the configured one is {wanted}; its state does not carry "
                    "over: keep the optimizer, or export the policy and start a new run from it"
                )
            self._reopen_finished_run(checkpoint)
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self.generation.load_state_dict(
                checkpoint["spo"]["rollouts"], data.dataset.__getitem__, data.completions_per_prompt
            )

    def _optimizer_name(self) -> str:
        return type(self.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])).__name__

    def _reopen_finished_run(self, checkpoint: dict[str, Any]) -> None:
        """Let a run go on whose ``num_iterations`` was raised: Lightning noted that its last batch had been seen."""
        done = checkpoint["SPODataModule"]["sampler"]["iteration"]
        wanted = self.trainer.datamodule.num_iterations  # type: ignore[attr-defined]
        if done >= wanted:
            raise ConfigError(f"the checkpoint has done {done} iterations; raise data.num_iterations={wanted} to go on")
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False

    def export(self, directory: str | Path) -> Path:
        """Write the policy as a Hugging Face folder; returns its path. Called by all ranks, rank 0 writes."""
        state = full_state(self.policy, keep=self.global_rank == 0)
        if self.global_rank == 0:
            export_policy(cast(Policy, self.policy).model, self.tokenizer, directory, state)
        self.exported_path = Path(directory)
        return self.exported_path

    # One iteration

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """One iteration: completions, rewards, advantages, drift, and the mini-batch updates.

        Returns:
            ``outcome`` (types.Outcome) for the tracker and ``records`` (list of types.CompletionRecord) for the table.
        """
        start = time.perf_counter()
        self.stages.reset()
        seed_iteration(self.seed, batch.iteration, self.global_rank)
        self.policy_version = batch.iteration
        metrics = self._push_weights(self.trainer.datamodule.dataset.longest)  # type: ignore[attr-defined]
        collected = self.generation.collect(batch)
        rollouts = collected.rollouts
        metrics |= rollout_metrics(rollouts) | collected.metrics
        if self.tool_use is not None:
            metrics |= tool_metrics(rollouts)
            metrics |= self.generation.take_tool_statistics().metrics(tool.name for tool in self.tool_use.tools)
        decided = decided_rows(rollouts)
        if decided:
            outcome, advantages, learned = self._learn(batch, collected, decided)
            metrics |= learned
            self.policy_version = batch.iteration + 1
        else:
            outcome = build_outcome(rollouts, (), {}, self.drift_max_tokens, collected.ended)
            advantages = torch.empty(0, dtype=torch.float64)
        self.completions_seen += len(rollouts)
        tokens = sum(rollout.completion.num_sampled for rollout in rollouts)
        metrics |= timing_metrics(self.stages.seconds, time.perf_counter() - start, tokens)
        self.log_dict(metrics, on_step=True, on_epoch=False)
        by_row = dict(zip(decided, advantages.tolist(), strict=True))
        records = completion_records(batch.iteration, rollouts, collected.baseline, by_row)
        return {"outcome": outcome, "records": records}

    def _learn(
        self, batch: PromptBatch, collected: CollectedBatch, decided: list[int]
    ) -> tuple[Outcome, Tensor, dict[str, float]]:
        """Score what must be, update the policy, and tell what came of it, with the normalised advantages.

        The first mini-batch needs no old log-probabilities: its ratio is 1, and those of its own pass are the old ones.
        """
        rollouts = collected.rollouts
        experience = build_experience(rollouts, collected.baseline, collected.group, self.advantage)
        previous = PreviousCompletions.of([rollouts[row] for row in decided], batch.previous)
        minibatches = self._minibatches(len(experience), batch.iteration)
        old_logprobs = dict(enumerate(experience.sampling_logprobs)) if self.old_logprobs == "engine" else {}
        later = [row for rows in minibatches[1:] for row in rows if row not in old_logprobs]
        with self.stages("score"):
            scored = self.score([*(experience.sequences[row] for row in later), *previous.sequences])
        drifts = previous.drifts(self.drift, scored[len(later) :])
        old_logprobs |= dict(zip(later, scored, strict=False))
        with self.stages("update"):
            metrics = self._update(experience, minibatches, old_logprobs, batch.iteration)
        ordered = [old_logprobs[row] for row in range(len(experience))]
        outcome = build_outcome(rollouts, ordered, drifts, self.drift_max_tokens, collected.ended)
        baseline, group = collected.baseline[decided], collected.group[decided]
        metrics |= learning_metrics(outcome.reward, baseline, experience.advantages)
        metrics |= signal_metrics(outcome.reward, baseline, group)
        if self.old_logprobs == "trainer":  # otherwise the two are the same by construction
            metrics |= mismatch_metrics(ordered, experience.sampling_logprobs, self.correction)
        return outcome, experience.advantages, metrics

    def _minibatches(self, count: int, iteration: int) -> list[list[int]]:
        """Rows of each optimiser step, drawn alike on every rank."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, SeedStream.MINIBATCH, iteration))
        order = torch.randperm(count, generator=generator)
        return [rows.tolist() for rows in order.tensor_split(min(self.num_minibatches, count))]

    def score(self, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        """Log-probability of every sampled token under the present policy; see ``learner.score``."""
        return score(self.policy, sequences, self.micro_batching, self.ranks)

    def _update(
        self,
        experience: Experience,
        minibatches: list[list[int]],
        old_logprobs: dict[int, Tensor],
        iteration: int,
    ) -> dict[str, float]:
        update = PolicyUpdate(
            self.policy,
            self.loss,
            self.correction,
            self.micro_batching,
            self.ranks,
            self.guard,
            self.max_grad_norm,
            self._backward,
            Path(self.trainer.default_root_dir) / "nonfinite",
        )
        optimizer = cast(LightningOptimizer, self.optimizers())
        scheduler = cast(LRScheduler | None, self.lr_schedulers())
        return update(experience, minibatches, old_logprobs, optimizer, scheduler, iteration)

    def _backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient; under DDP the ranks meet at the last one only."""
        model = self.trainer.model
        with nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            self.manual_backward(loss)

    # Benchmarks and the tracker's start

    def on_validation_epoch_start(self) -> None:
        """Make ready to answer benchmarks with the present policy."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._push_weights(max((d.longest for d in data.benchmark_prompts.values()), key=lambda p: len(p.token_ids)))
        benchmarks = self.trainer.datamodule.benchmarks  # type: ignore[attr-defined]
        with_tools = self.tool_use is not None
        self._evaluators = {
            name: BenchmarkEvaluator(benchmark.num_samples, self.device, with_tools)
            for name, benchmark in benchmarks.items()
        }

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: BenchmarkBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer some problems of a benchmark."""
        name = zlib.crc32(batch.benchmark.encode())
        rollouts = self._sample(batch, self.eval_sampling, SeedStream.EVALUATION, name)
        self._evaluators[batch.benchmark].update(rollouts, self.reward)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of every benchmark as ``val/<name>/…``."""
        self._log_benchmarks("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of every benchmark as ``test/<name>/…``."""
        self._log_benchmarks("test")

    def predict_step(self, batch: BenchmarkBatch, batch_idx: int, dataloader_idx: int = 0) -> list[ValueRow]:
        """Draw the tracker's start for some training prompts (Algorithm 2)."""
        return self.estimate_values(batch)

    def estimate_values(self, batch: BenchmarkBatch) -> list[ValueRow]:
        """Number and sum of the rewards of ``num_samples`` completions of each prompt; undecided ones do not count.

        Args:
            batch: this rank's prompts.

        Returns:
            The rows of all ranks' prompts.
        """
        if not self.generation.has_weights:
            self._push_weights(self.trainer.datamodule.dataset.longest)  # type: ignore[attr-defined]
        rollouts = self._sample(batch, self.sampling, SeedStream.VALUE_START, 0)
        rewards: dict[Prompt, list[float]] = {prompt: [] for prompt in batch.prompts}
        for rollout in rollouts:
            if rollout.grade.value is not None:
                rewards[rollout.prompt].append(rollout.grade.value)
        rows = [ValueRow(prompt.id, prompt.text, len(values), sum(values)) for prompt, values in rewards.items()]
        return [row for part in self.ranks.gather(rows) for row in part]

    def _sample(
        self, batch: BenchmarkBatch, sampling: SamplingParams, stream: SeedStream, offset: int
    ) -> list[Rollout]:
        prompts = [prompt for prompt in batch.prompts for _ in range(batch.num_samples)]
        seeds = [
            derive_seed(self.seed, stream, offset, prompt.index, sample)
            for prompt in batch.prompts
            for sample in range(batch.num_samples)
        ]
        return self.generation.sample(prompts, sampling, seeds)

    def _log_benchmarks(self, prefix: str) -> None:
        self.ranks.wait()
        for name, evaluator in self._evaluators.items():
            self.log_dict(evaluator.compute(f"{prefix}/{name}"))

    # The engine

    @property
    def micro_batching(self) -> MicroBatching:
        """How sequences become micro-batches."""
        pad = self.tokenizer.pad_token_id
        return MicroBatching(
            self.micro_batch_tokens, 0 if pad is None else pad, self.sampling.temperature, self.packed, self.device
        )

    def _start_engine(self) -> None:
        self.generation.start(
            EngineContext(
                model_path=self.policy_config.path,
                tokenizer=self.tokenizer,
                device=str(self.device),
                dtype=self._generation_dtype,
                eos_token_ids=eos_token_ids(self.policy.model, self.tokenizer),
                max_model_len=min(
                    self.trainer.datamodule.max_prompt_tokens  # type: ignore[attr-defined]
                    + max(self.sampling.max_tokens, self.eval_sampling.max_tokens)
                    + self._tool_tokens,
                    cast(Policy, self.policy).model.config.max_position_embeddings,
                ),
                revision=self.policy_config.revision,
                rank=self.global_rank,
                world_size=self.ranks.world_size,
            )
        )

    @property
    def _tool_tokens(self) -> int:
        """Most tokens that tools add to a completion."""
        return 0 if self.tool_use is None else self.tool_use.max_tool_tokens

    @property
    def _generation_dtype(self) -> str:
        """What the policy computes in: bfloat16 under autocast, whatever its weights are kept in."""
        return "bfloat16" if self.trainer.precision.startswith("bf16") else self.policy_config.dtype

    def _check_references(self, datasets: Mapping[str, PromptDataset]) -> None:
        """Refuse gold answers that no completion could match."""
        for name, dataset in datasets.items():
            bad = self.reward.check_references(dataset.references)
            if bad:
                shown = ", ".join(f"{dataset.ids[i]} ({dataset.references[i]!r})" for i in bad[:5])
                raise ConfigError(
                    f"{len(bad)} of {len(dataset)} prompts of {name} have a reference answer that "
                    f"{type(self.reward).__name__} cannot read: {shown}{', ...' if len(bad) > 5 else ''}; correct "
                    "them, or take another reward"
                )

    def _check_lengths(self, datasets: Mapping[str, PromptDataset]) -> None:
        """Refuse prompts that the engine has no room for."""
        room = self.engine.max_model_len
        for name, dataset in datasets.items():
            tokens = len(dataset.longest.token_ids)
            if tokens >= room:
                raise ConfigError(
                    f"prompt {dataset.longest.id} of {name} has {tokens} tokens and the engine takes {room} of prompt "
                    "and completion together; lower data.max_prompt_tokens, which leaves longer prompts out, or raise "
                    "the engine's max_model_len"
                )

    def _push_weights(self, probe: Prompt) -> dict[str, float]:
        """Give the engine the present policy, and see that both agree on it.

        Args:
            probe: what they are compared on.

        Returns:
            ``sampling/push_difference``, unless nothing is compared.
        """
        self._start_engine()
        self.generation.push(full_parameters(self.policy), self.policy_version)
        tolerance = TOLERANCE[self._generation_dtype] if self.push_tolerance is None else self.push_tolerance
        if tolerance == float("inf"):
            return {}
        with torch.inference_mode(False), self.trainer.precision_plugin.forward_context():
            return {"sampling/push_difference": self.generation.check(self.score, probe, tolerance)}
