"""The LightningModule: one training step is one SPO iteration (Algorithm 1)."""

from __future__ import annotations

import logging
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

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
from spo_lightning.data.value_start import ValueRow
from spo_lightning.defaults import lazy
from spo_lightning.distributed import Ranks
from spo_lightning.errors import ConfigError
from spo_lightning.evaluation import BenchmarkResult, Evaluation, interval_metrics
from spo_lightning.experience import TokenSequence, decided_rows
from spo_lightning.generation import Generation
from spo_lightning.generation_files import GenerationSettings, answered_folder
from spo_lightning.intervals import estimate
from spo_lightning.iteration_metrics import (
    completion_records,
    curriculum_metrics,
    memory_metrics,
    rollout_metrics,
    signal_metrics,
    timing_metrics,
    tool_metrics,
)
from spo_lightning.learning import learn
from spo_lightning.logger import SPOMLFlowLogger
from spo_lightning.micro_batches import MicroBatching
from spo_lightning.nonfinite import NonFiniteGuard
from spo_lightning.packing import has_packing_kernels, keeps_sequences_apart
from spo_lightning.passes import score
from spo_lightning.policy import Policy, PolicyConfig
from spo_lightning.policy_files import eos_token_ids, export_policy, load_policy, load_tokenizer
from spo_lightning.protocols import EngineContext, Reward, RolloutEngine
from spo_lightning.rollouts.collection import Collection
from spo_lightning.rollouts.collector import Rollout
from spo_lightning.rollouts.transformers_engine import TransformersEngine
from spo_lightning.run_checks import (
    check_benchmarks,
    check_calls,
    check_company,
    check_engine,
    check_lengths,
    check_optimizer,
    check_resume,
    check_run,
    check_tokens,
    check_trainer,
)
from spo_lightning.seeding import SeedStream, derive_seed, seed_iteration
from spo_lightning.sharding import full_parameters, full_state, is_sharding, shard_policy
from spo_lightning.stages import StageTimer
from spo_lightning.tools.settings import ToolUse
from spo_lightning.types import BenchmarkBatch, Prompt, PromptBatch, SamplingParams
from spo_lightning.weight_check import EXACT, TOLERANCE

log = logging.getLogger(__name__)


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
            log-probabilities that they were sampled with and saves that pass. "auto" takes the engine's for completions
            of the present weights where both compute alike in float32 (``TransformersEngine``), as the check after
            every push confirms, and nothing filters the samples (top-p, top-k); elsewhere it scores.
        drift: estimates D(x) for the tracker (SPO §4.1).
        drift_max_tokens: leading sampled tokens of a prompt's last completion that are kept to measure its drift.
        optimizer: any torch optimizer; by default AdamW with a learning rate of 1e-6, as in the paper.
        lr_scheduler: any torch schedule by steps; stepped once per optimiser step.
        num_minibatches: optimiser steps per rollout batch (the paper takes 8).
        micro_batch_tokens: most tokens, padding included, of one forward and backward pass on one rank.
        padding_free: lay the sequences of a micro-batch end to end instead of padding them; ``None`` does so where the
            policy's attention has kernels for it (flash attention, flex attention) and keeps sequences apart.
        max_grad_norm: gradients are clipped to this norm; ``None`` leaves them.
        max_skipped_steps: training stops after so many optimiser steps in a row with a loss or gradient not finite.
        push_tolerance: after every push of weights a few tokens are compared; the largest mean |difference| of their
            log-probabilities between engine and trainer. ``None`` goes by the dtypes, infinity compares nothing.
        seed: of rollouts and mini-batches.
        algorithm: a label that runs are compared by; it changes nothing else.

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
        advantage: AdvantageEstimator = lazy(TrajectoryNormalized),  # noqa: B008 (stateless, as the next two)
        loss: PolicyLoss = lazy(PPOClipLoss),  # noqa: B008
        correction: OffPolicyCorrection | None = lazy(ImportanceSampling),  # noqa: B008
        old_logprobs: Literal["auto", "trainer", "engine"] = "auto",
        drift: DriftEstimator = lazy(MeanAbsLogRatio),  # noqa: B008
        drift_max_tokens: int = 512,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        lr_scheduler: LRSchedulerCallable | None = None,
        num_minibatches: int = 8,
        micro_batch_tokens: int = 16384,
        padding_free: bool | None = None,
        max_grad_norm: float | None = 1.0,
        max_skipped_steps: int = 5,
        push_tolerance: float | None = None,
        seed: int = 0,
        algorithm: str | None = None,
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
        self.padding_free = padding_free
        self.max_grad_norm = max_grad_norm
        self.push_tolerance = push_tolerance
        self.seed = seed
        self.algorithm = algorithm
        self.guard = NonFiniteGuard(max_skipped_steps)
        self.stages = StageTimer()
        self.completions_seen = 0
        self.tokens_seen = 0
        self.policy_version = 0
        self.iterations_done = 0
        self.exported_path: Path | None = None
        self.benchmark_results: dict[str, BenchmarkResult] = {}
        self.generations_folder: Path | None = None
        self._told_undecided = False

    # Set-up and take-down

    def configure_model(self) -> None:
        """Load policy and tokenizer, once, and shard the policy if the strategy does.

        Where the policy is sharded only rank 0 reads the weights.
        """
        if hasattr(self, "policy"):
            return
        self.tokenizer = load_tokenizer(self.policy_config.path, self.policy_config.revision)
        strategy = None if self._trainer is None else self.trainer.strategy
        sharded = strategy is not None and is_sharding(strategy)
        reads = strategy is None or strategy.is_global_zero or not sharded
        # Lightning makes tensors on the device here: there Transformers loads with accelerate only, and generators of
        # the CPU, which give every device the same numbers, are refused.
        with torch.device("cpu"):
            policy = load_policy(self.policy_config, reads, self.seed, sharded)
            self.packed = strategy is not None and self._packs(policy.model, reads)  # an export packs nothing
        self.policy: torch.nn.Module = policy
        if strategy is not None:
            self.policy = shard_policy(cast(Policy, strategy.precision_plugin.convert_module(policy)), strategy)

    def _packs(self, model: Any, reads: bool) -> bool:
        """Whether sequences lie end to end; ranks without weights take the word of one that has them."""
        default = has_packing_kernels(self.policy_config.attn_implementation)
        if not (default if self.padding_free is None else self.padding_free):
            return False
        apart = all(self.ranks.gather(keeps_sequences_apart(model, weights=reads)))
        if self.padding_free and not apart:
            raise ConfigError(
                f"model.padding_free is true, and {type(model).__name__} with the attention "
                f"{self.policy_config.attn_implementation} does not keep sequences apart that lie end to end in a row, "
                "or cannot be seen to; set it to null or false"
            )
        return apart

    @property
    def device(self) -> torch.device:
        """Where the policy computes; Lightning's own goes by calls of ``to``, which sharding strategies do without."""
        return super().device if self._trainer is None else self.trainer.strategy.root_device

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the schedule of the configuration."""
        try:
            optimizer = self.optimizer_factory(p for p in self.policy.parameters() if p.requires_grad)
        except ValueError as error:
            raise ConfigError(f"model.optimizer refuses the policy's parameters: {error}") from error
        if type(optimizer).__module__.startswith("bitsandbytes") and is_sharding(self.trainer.strategy):
            raise ConfigError(
                f"model.optimizer is {type(optimizer).__name__} of bitsandbytes, which cannot step what FSDP2 shards, "
                "and whose state FSDP cannot save; take torchao.optim.AdamW8bit with the strategy fsdp2, or ddp"
            )
        self._configured_lr = optimizer.param_groups[0]["lr"]
        if self.lr_scheduler_factory is None:
            return optimizer
        scheduler = self.lr_scheduler_factory(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def setup(self, stage: str) -> None:
        """Refuse what the module cannot do, before any work."""
        # cuDNN plans for tens of milliseconds at every new shape, and here hardly a shape comes twice.
        torch.backends.cuda.enable_cudnn_sdp(False)
        check_company(self, TrainerFn(stage).value)
        self.ranks = Ranks()
        check_engine(self)
        self.generation = Generation(
            self.engine, self.reward, self.tool_use, self.ranks, self.stages, self.collection, self.sampling, self.seed
        )
        if stage == "fit":
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            check_calls(self, data)
            check_trainer(self)
            check_optimizer(self, data)

    def on_fit_start(self) -> None:
        """Refuse what does not go together, and start the engine; it sleeps while a checkpoint is restored."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        datasets = {"train": data.dataset, **data.benchmark_prompts}
        check_run(self, data, self.ranks.gather(data.sampler.iteration))
        check_tokens(self, datasets)
        self._start_engine()
        check_lengths(self, datasets)
        self.generation.sleep()

    def on_validation_start(self) -> None:
        """Check the benchmarks' answers, tokens and lengths; during ``fit`` that has been done."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            benchmarks = self.trainer.datamodule.benchmark_prompts  # type: ignore[attr-defined]
            check_benchmarks(self.reward, benchmarks)
            check_tokens(self, benchmarks)
            self._start_engine()
            check_lengths(self, benchmarks)

    on_test_start = on_validation_start

    def on_predict_start(self) -> None:
        """Check the training prompts, whose start is to be drawn."""
        check_tokens(self, {"train": self.trainer.datamodule.dataset})  # type: ignore[attr-defined]

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

    def release_after_error(self) -> None:
        """Do what ``teardown`` does, which Lightning calls after a run that ended well only.

        So no weight files of servers stay in memory, and the module can be fitted again. With several ranks an engine
        in this process is left alone, with its tools: the others may be waiting elsewhere, and some engines are closed
        by all ranks together. A failure is logged, as the run's own error is the one to report.
        """
        if not hasattr(self, "generation"):
            return
        try:
            if self.ranks.world_size == 1 or self.engine.runs_in_background:
                self.generation.close()
            else:
                self.reward.close()
        except Exception:  # engines and graders may be the user's own
            log.exception("after the run's error, which follows, its engine or graders could not be closed")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the counters and the open rollouts."""
        checkpoint["spo"] = {
            "rollouts": self.generation.state_dict(),
            "guard": self.guard.state_dict(),
            "completions_seen": self.completions_seen,
            "tokens_seen": self.tokens_seen,
            "optimizer": self.optimizer_name,
            "mlflow_run": next((x.run_id for x in self.trainer.loggers if isinstance(x, SPOMLFlowLogger)), None),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters and the open rollouts back."""
        self.guard.load_state_dict(checkpoint["spo"]["guard"])
        self.completions_seen = checkpoint["spo"]["completions_seen"]
        self.tokens_seen = checkpoint["spo"]["tokens_seen"]
        self.iterations_done = checkpoint["SPODataModule"]["sampler"]["iteration"]
        if self.trainer.state.fn == TrainerFn.FITTING:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            check_resume(self, data, checkpoint)
            # Where num_iterations was raised, Lightning has noted that the last batch had been seen.
            checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
            self.generation.load_state_dict(
                checkpoint["spo"]["rollouts"], data.dataset.__getitem__, data.completions_per_prompt
            )

    @property
    def optimizer_name(self) -> str:
        """Class of the configured optimizer."""
        return type(self.try_optimizer()).__name__

    def try_optimizer(self) -> Optimizer:
        """The configured optimizer, of parameters of its own: a matrix and a vector, or only the first.

        Raises:
            ValueError: it refuses its arguments.
        """
        matrix, vector = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((1, 1), (1,)))
        try:
            return self.optimizer_factory([matrix, vector])
        except ValueError as error:
            with suppress(ValueError):
                return self.optimizer_factory([matrix])
            raise error

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
        # By this the trainer counts the steps of loggers; a resume with another validation interval would shift them.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = batch.iteration
        for hook in ("training_step", "on_train_batch_end"):  # or what this iteration does not have is logged again
            self.trainer.fit_loop._results.reset(fx=hook)
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
        exact = self._computes_alike and metrics.get("sampling/push_difference", float("inf")) <= EXACT
        learned = learn(self, batch, collected, exact)
        metrics |= learned.metrics
        if collected.learned:
            self.policy_version = batch.iteration + 1
        if decided:
            metrics |= signal_metrics(learned.outcome.reward, collected.baseline[decided], collected.group[decided])
        elif not self._told_undecided:
            self._told_undecided = True
            self._warn_undecided(rollouts, batch.iteration)
        tokens = sum(rollout.completion.num_sampled for rollout in rollouts)
        self.completions_seen += len(rollouts)
        self.tokens_seen += tokens + int(collected.metrics.get("collection/dropped_tokens", 0))
        metrics |= {"progress/completions": float(self.completions_seen), "progress/tokens": float(self.tokens_seen)}
        metrics |= curriculum_metrics(collected.baseline)
        idle = self.generation.engine.take_idle_seconds()
        metrics |= timing_metrics(self.stages.seconds, time.perf_counter() - start, tokens, idle)
        metrics |= memory_metrics(self.device)
        self.log_dict(metrics, on_step=True, on_epoch=False)
        self.iterations_done = batch.iteration + 1
        by_row = dict.fromkeys(decided, 0.0) | dict(zip(collected.learned, learned.advantages.tolist(), strict=True))
        records = completion_records(batch.iteration, rollouts, collected.baseline, by_row)
        return {"outcome": learned.outcome, "records": records}

    def _warn_undecided(self, rollouts: Sequence[Rollout], iteration: int) -> None:
        """Say that a whole iteration taught nothing; the run goes on, as a grader may recover."""
        causes = Counter(rollout.grade.cause or "no cause given" for rollout in rollouts)
        named = ", ".join(f"{cause} {count}" for cause, count in causes.items())
        rank_zero_warn(
            f"{type(self.reward).__name__} decided none of the {len(rollouts)} completions of iteration "
            f"{iteration + 1:,} ({named}), so that it taught nothing; a grade needs a number: see that the reward "
            "returns one, or why its grader gives up. Later iterations like it are told by verifier/undecided alone"
        )

    def score(self, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        """Log-probability of every sampled token under the present policy; see ``passes.score``."""
        return score(self.policy, sequences, self.micro_batching, self.ranks)

    def add_gradient(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient; under DDP all ranks, under FSDP2 replicas, meet at the last one only."""
        model = self.trainer.model
        if isinstance(self.policy, FSDPModule):
            self.policy.set_requires_all_reduce(last)
        with nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            self.manual_backward(loss)

    # Benchmarks and the tracker's start

    @property
    def answered_by(self) -> str | None:
        """The checkpoint whose weights answer, or what it would be called; ``None`` for the initial policy."""
        if self.trainer.ckpt_path is not None:
            return str(self.trainer.ckpt_path)
        return f"iteration-{self.iterations_done:06d}" if self.iterations_done else None

    def on_validation_epoch_start(self) -> None:
        """Make ready to answer benchmarks with the present policy; completions are kept outside of ``fit``."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._push_weights(max((d.longest for d in data.benchmark_prompts.values()), key=lambda p: len(p.token_ids)))
        stage = cast(TrainerFn, self.trainer.state.fn)
        place = (self.trainer.default_root_dir, stage.value, self.answered_by)
        self.generations_folder = None if stage == TrainerFn.FITTING else answered_folder(*place)
        self.benchmark_results = {}
        self._evaluation = Evaluation(
            [self._generation_settings(name) for name in data.benchmarks],
            self.device,
            self.generations_folder,
            self.ranks,
        )

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: BenchmarkBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer some problems of a benchmark."""
        name = zlib.crc32(batch.benchmark.encode())
        rollouts = self._sample(batch, self.eval_sampling, SeedStream.EVALUATION, name)
        self._evaluation.add(batch.benchmark, rollouts, self.reward)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of every benchmark as ``val/<name>/…``; within ``fit`` a checkpoint may follow."""
        self._log_benchmarks("val")
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.generation.sleep()

    def on_test_epoch_end(self) -> None:
        """Log the metrics of every benchmark as ``test/<name>/…``, with intervals, and their average."""
        self._log_benchmarks("test")
        scores = {name: result.scores for name, result in self.benchmark_results.items()}
        self.log_dict(interval_metrics(estimate(scores), "test"))

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

    def _generation_settings(self, name: str) -> GenerationSettings:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return GenerationSettings(
            benchmark=name,
            num_samples=data.benchmarks[name].num_samples,
            num_problems=len(data.benchmark_prompts[name]),
            with_tools=self.tool_use is not None,
            policy=self.policy_config.path,
            revision=self.policy_config.revision,
            checkpoint=self.answered_by,
            sampling=asdict(self.eval_sampling),
            seed=self.seed,
            reward=type(self.reward).__name__,
            source=asdict(data.benchmarks[name].source),
        )

    def _log_benchmarks(self, prefix: str) -> None:
        self.ranks.wait()
        self.benchmark_results = self._evaluation.finish()
        for name, result in self.benchmark_results.items():
            self.log_dict(result.metrics(f"{prefix}/{name}"))
            if result.answered_ratio == 0:
                rank_zero_warn(
                    f"no completion of the benchmark {name} has an answer to vote by, so its maj@k is 0; answers are "
                    "looked for in \\boxed{...}, or by the pattern of ExactMatchReward and FunctionReward"
                )
        if self.trainer.state.fn != TrainerFn.FITTING and self.iterations_done:
            self.log("step", float(self.iterations_done - 1))  # loggers take it as the step; the trainer's own is 0

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
                dtype=self.generation_dtype,
                eos_token_ids=eos_token_ids(self.policy.model, self.tokenizer),
                max_model_len=min(
                    self.trainer.datamodule.max_prompt_tokens  # type: ignore[attr-defined]
                    + max(self.sampling.max_tokens, self.eval_sampling.max_tokens)
                    + self.tool_tokens,
                    cast(Policy, self.policy).model.config.get_text_config().max_position_embeddings,
                ),
                revision=self.policy_config.revision,
                rank=self.global_rank,
                world_size=self.ranks.world_size,
            )
        )

    @property
    def tool_tokens(self) -> int:
        """Most tokens that tools add to a completion."""
        return 0 if self.tool_use is None else self.tool_use.max_tool_tokens

    @property
    def _computes_alike(self) -> bool:
        """Whether engine and trainer differ by float32 rounding alone."""
        return self.engine.computes_as_policy and self.generation_dtype == "float32"

    @property
    def generation_dtype(self) -> str:
        """What the policy computes in: bfloat16 under autocast, whatever its weights are kept in."""
        return "bfloat16" if self.trainer.precision.startswith("bf16") else self.policy_config.dtype

    def _push_weights(self, probe: Prompt) -> dict[str, float]:
        """Give the engine the present policy, and see that both agree on it.

        Args:
            probe: what they are compared on.

        Returns:
            ``sampling/push_difference``, unless nothing is compared.
        """
        self._start_engine()
        self.generation.push(full_parameters(self.policy), self.policy_version)
        tolerance = TOLERANCE[self.generation_dtype] if self.push_tolerance is None else self.push_tolerance
        if tolerance == float("inf"):
            return {}
        with torch.inference_mode(False), self.trainer.precision_plugin.forward_context():
            return {"sampling/push_difference": self.generation.check(self.score, probe, tolerance)}
