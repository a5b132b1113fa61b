"""What a run refuses, and what it warns of, before any long work."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from spo_lightning.algorithms import (
    AdvantageEstimator,
    DriftEstimator,
    ForgettingRule,
    OffPolicyCorrection,
    PolicyLoss,
    PromptWeights,
)
from spo_lightning.data.prompt_dataset import PromptDataset
from spo_lightning.errors import ConfigError
from spo_lightning.intervals import AVERAGE
from spo_lightning.protocols import Reward
from spo_lightning.rollouts.dynamic_sampling import check_dynamic_sampling

if TYPE_CHECKING:
    from spo_lightning.data.datamodule import SPODataModule
    from spo_lightning.module import SPOModule
    from spo_lightning.policy import Policy

MOST_STEPS_TRIED = 100_000  # of a schedule: half a second


def check_company(module: SPOModule, stage: str) -> None:
    """Refuse to work without a data module, or to train without the tracker's callback, which ``SPOTrainer`` brings."""
    from spo_lightning.callbacks.value_tracker import ValueTrackerCallback  # which imports the module

    trainer = module.trainer
    if trainer.datamodule is None:  # type: ignore[attr-defined]
        raise ConfigError(
            "the trainer has no data module, which brings prompts and the value tracker; give it an SPODataModule, as "
            f"in trainer.{stage}(module, datamodule=data)"
        )
    if stage == "fit" and not any(isinstance(callback, ValueTrackerCallback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError(
            f"the trainer is a {type(trainer).__name__} without ValueTrackerCallback, so that no iteration would be "
            "finished; take spo_lightning.SPOTrainer, which has the same arguments"
        )


def check_engine(module: SPOModule) -> None:
    """Refuse tools in an engine that several ranks share."""
    if module.tool_use is not None and module.engine.ranks_per_engine > 1:
        raise ConfigError(
            f"model.engine is shared by {module.engine.ranks_per_engine} ranks, which would not see results of tools "
            "at the same moment; take an engine for each rank (tensor_parallel_size 1) or vLLM servers, or set "
            "model.tool_use to null"
        )


def check_calls(module: SPOModule, data: SPODataModule) -> None:
    """Refuse parts of the algorithm, of the user's own, that cannot be called as they will be."""
    for name, part, base in (
        ("model.advantage", module.advantage, AdvantageEstimator),
        ("model.correction", module.correction, OffPolicyCorrection),
        ("model.drift", module.drift, DriftEstimator),
        ("model.loss", module.loss, PolicyLoss),
        ("data.forgetting", data.tracker.forgetting, ForgettingRule),
        ("data.prompt_weights", data.prompt_weights, PromptWeights),
    ):
        if part is None:
            continue
        _, *given = inspect.signature(base.__call__).parameters
        signature = inspect.signature(part.__call__)
        try:
            signature.bind(*given)
        except TypeError as error:
            raise ConfigError(
                f"{name} is {type(part).__name__}, which cannot be called: {error}; it takes {signature} and is "
                f"given ({', '.join(given)})"
            ) from error


def check_trainer(module: SPOModule) -> None:
    """Refuse what the trainer or the device cannot do for a training run."""
    trainer: Any = module.trainer
    policy = module.policy_config
    if trainer.precision in ("16-mixed", "16-true"):
        raise ConfigError(
            f"trainer.precision is {trainer.precision}; scaled fp16 gradients hide what is not finite, "
            "use bf16-mixed or 32"
        )
    if trainer.precision == "64-true":
        raise ConfigError(
            "trainer.precision is 64-true; engines and the norm of the gradient compute in float32 at most, use 32 "
            "or bf16-mixed"
        )
    if policy.head == "liger" and (module.device.type != "cuda" or find_spec("liger_kernel") is None):
        raise ConfigError(
            f"model.policy.head is liger, which needs a CUDA device (this is {module.device}) and pip install -e "
            ".[liger]; set it to torch"
        )
    if policy.head == "liger" and module.generation_dtype == "float32":
        raise ConfigError(
            "model.policy.head is liger, whose kernel takes bfloat16 only, and the policy computes in float32; set "
            "trainer.precision to bf16-mixed, or the head to torch"
        )
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy) and strategy.cpu_offload is not None and strategy.cpu_offload.offload_params:
        raise ConfigError(
            "trainer.strategy is FSDPStrategy with cpu_offload, which keeps the gradient of the last micro-batch only; "
            "take configs/strategy/fsdp2.yaml with cpu_offload: true"
        )
    if trainer.max_steps != -1 and trainer.fast_dev_run:
        raise ConfigError(
            f"trainer.fast_dev_run is {trainer.fast_dev_run}; it counts optimiser steps and would end a run "
            "inside an iteration, set it to false and data.num_iterations to 1 for a short run"
        )
    if trainer.max_steps != -1:
        raise ConfigError(
            f"trainer.max_steps is {trainer.max_steps}; it counts optimiser steps and would end a run inside "
            "an iteration, set data.num_iterations instead"
        )


def check_optimizer(module: SPOModule, data: SPODataModule) -> None:
    """Refuse arguments that optimizer or schedule refuse, and a schedule that ends before the run does.

    Both are tried on parameters of their own, before the policy is loaded.
    """
    try:
        optimizer = module.try_optimizer()
    except ValueError as error:
        raise ConfigError(f"model.optimizer refuses its arguments: {error}") from error
    if module.lr_scheduler_factory is None:
        return
    try:
        scheduler = module.lr_scheduler_factory(optimizer)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.lr_scheduler refuses its arguments: {error}") from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "lr_scheduler is ReduceLROnPlateau, which needs a monitored metric; take one that goes by steps"
        )
    iterations = _iterations(module, data)
    steps = iterations * min(module.num_minibatches, data.batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps that the optimizer has not taken
        for done in range(min(steps, MOST_STEPS_TRIED)):
            try:
                scheduler.step()
            except ValueError as error:
                raise ConfigError(
                    f"model.lr_scheduler is {type(scheduler).__name__}, which goes no further than {done} optimiser "
                    f"steps, and {iterations} iterations with model.num_minibatches {module.num_minibatches} take "
                    f"{steps}; give it so many ({error})"
                ) from error


def check_run(module: SPOModule, data: SPODataModule, begins: Sequence[int]) -> None:
    """Refuse settings of a training run that do not go together, and warn of those that seldom do.

    Args:
        module: with its trainer attached.
        data: with its prompts loaded.
        begins: the iteration that each rank begins at.
    """
    longest = data.max_prompt_tokens + module.sampling.max_tokens + module.tool_tokens
    if longest > module.micro_batch_tokens:
        with_tools = " + tool_use.max_tool_tokens" if module.tool_use else ""
        raise ConfigError(
            f"data.max_prompt_tokens + sampling.max_tokens{with_tools} is {longest}, more than "
            f"micro_batch_tokens={module.micro_batch_tokens}; raise model.micro_batch_tokens or lower one of them"
        )
    if len(set(begins)) > 1:
        raise ConfigError(
            f"the ranks begin at iterations {begins}: not all of them found the same checkpoint; put "
            "trainer.default_root_dir on a file system that all nodes share"
        )
    interval, iterations = module.trainer.val_check_interval, _iterations(module, data)
    if module.trainer.check_val_every_n_epoch is not None and isinstance(interval, int) and interval > iterations:
        raise ConfigError(
            f"trainer.check_val_every_n_epoch is set, and trainer.val_check_interval={interval} is more than the "
            f"{iterations} iterations of the run; leave check_val_every_n_epoch null, as a run is one epoch"
        )
    if data.benchmarks and module.trainer.limit_val_batches and isinstance(interval, int) and iterations % interval:
        last = iterations - iterations % interval
        rank_zero_warn(
            f"trainer.val_check_interval is {interval} and the run has {iterations} iterations: the final policy is "
            f"not validated, and {f'the last that is comes after iteration {last}' if last else 'no other is'}"
        )
    check_references(module.reward, {"train": data.dataset, **data.benchmark_prompts})
    _check_collection(module, data)
    _check_sampling(module)
    if data.sampler.num_distinct > len(data.dataset):
        rank_zero_warn(
            f"an iteration draws {data.sampler.num_distinct} of {len(data.dataset)} prompts: they repeat in a batch"
        )
    if module.num_minibatches > data.batch_size:
        rank_zero_warn(
            f"model.num_minibatches is {module.num_minibatches} and data.batch_size {data.batch_size}: an iteration "
            "takes one optimiser step a completion, no more"
        )
    if module.policy_config.dtype == "bfloat16" and module.policy_config.lora is None:
        rank_zero_warn(
            "model.policy.dtype is bfloat16: steps smaller than about 1/256 of a weight are rounded away, which is "
            "most of them at the learning rates of RL; use float32 with trainer.precision bf16-mixed"
        )


def _iterations(module: SPOModule, data: SPODataModule) -> int:
    """Iterations of the run, which ``trainer.limit_train_batches`` may shorten."""
    limit = module.trainer.limit_train_batches
    return min(data.num_iterations, limit if isinstance(limit, int) else int(limit * data.num_iterations))


def check_resume(module: SPOModule, data: SPODataModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to go on from the checkpoint of another run, or of one that has done more than it was to do.

    One that has done just that is brought to its end, which it may not have come to: policy, MLflow run.

    Args:
        module: its optimizer is compared.
        data: with its prompts loaded.
        checkpoint: what it holds beside weights and optimizer state.
    """
    saved, wanted = checkpoint["spo"]["optimizer"], module.optimizer_name
    if saved != wanted:
        raise ConfigError(
            f"the checkpoint's optimizer is {saved}, the configured one is {wanted}; its state does not carry "
            "over: keep the optimizer, or export the policy and start a new run from it"
        )
    data.stream.require_same_prompts(checkpoint["SPODataModule"])
    done = checkpoint["SPODataModule"]["sampler"]["iteration"]
    if done > data.num_iterations:
        raise ConfigError(
            f"the checkpoint has done {done} iterations; raise data.num_iterations={data.num_iterations} to go on"
        )


def _check_collection(module: SPOModule, data: SPODataModule) -> None:
    if module.advantage.needs_groups and data.completions_per_prompt < 2:
        raise ConfigError(
            f"model.advantage is {type(module.advantage).__name__}, which compares completions of one prompt, and "
            f"data.completions_per_prompt is {data.completions_per_prompt}; set it to at least 2"
        )
    if module.advantage.needs_groups and data.oversampling > 1 and not module.collection.whole_groups:
        raise ConfigError(
            f"model.advantage is {type(module.advantage).__name__}, which needs the completions of a prompt "
            f"together, and data.oversampling is {data.oversampling}; set model.collection.whole_groups to true"
        )
    check_dynamic_sampling(module.collection, data.completions_per_prompt, data.oversampling)
    carries = (
        data.oversampling > 1 and module.collection.unfinished == "carry" and not module.collection.dynamic_sampling
    )
    if module.engine.runs_in_background and carries and module.collection.max_staleness == 0:
        raise ConfigError(
            "model.collection.max_staleness is 0 and the engine goes on while the policy trains: what it begins "
            "then is one version old; allow at least 1, or set model.collection.unfinished to drop"
        )


def _check_sampling(module: SPOModule) -> None:
    if module.sampling.top_p == 1 and module.sampling.top_k == 0:
        return
    found = f"model.sampling has top_p {module.sampling.top_p} and top_k {module.sampling.top_k}"
    if module.old_logprobs == "engine":
        raise ConfigError(
            f"{found}, and model.old_logprobs is engine: the engine's log-probabilities are of a truncated "
            "distribution, the trainer's of the full one, so ratios and drift would be off where nothing has changed; "
            "set model.old_logprobs to auto or trainer, or top_p to 1 and top_k to 0"
        )
    rank_zero_warn(
        f"{found}: completions come from a truncated distribution, ratios are taken on the full one; the paper trains "
        "with both off"
    )


def check_benchmarks(reward: Reward, datasets: Mapping[str, PromptDataset]) -> None:
    """Refuse benchmarks whose answers cannot be read, or whose name is taken."""
    if AVERAGE in datasets and len(datasets) > 1:
        raise ConfigError(
            f"a benchmark is called {AVERAGE}, which names the average over benchmarks; rename it in data.benchmarks"
        )
    check_references(reward, datasets)


def check_references(reward: Reward, datasets: Mapping[str, PromptDataset]) -> None:
    """Refuse gold answers that no completion could match."""
    for name, dataset in datasets.items():
        bad = reward.check_references(dataset.references)
        if bad:
            shown = ", ".join(f"{dataset.ids[i]} ({dataset.references[i]!r})" for i in bad[:5])
            raise ConfigError(
                f"{len(bad)} of {len(dataset)} prompts of {name} have a reference answer that "
                f"{type(reward).__name__} cannot read: {shown}{', ...' if len(bad) > 5 else ''}; correct them, or "
                "take another reward"
            )


def check_tokens(module: SPOModule, datasets: Mapping[str, PromptDataset]) -> None:
    """Refuse prompts with tokens that the policy has no embedding for.

    A tokenizer may know more tokens than the model, such as those of images, as long as no prompt holds them.

    Args:
        module: with its policy loaded.
        datasets: "train", and benchmarks by their names.
    """
    known = int(cast("Policy", module.policy).model.get_input_embeddings().num_embeddings)
    for name, dataset in datasets.items():
        if dataset.largest_token >= known:
            raise ConfigError(
                f"prompts of {name} hold the token {dataset.largest_token} "
                f"({module.tokenizer.convert_ids_to_tokens(dataset.largest_token)!r}), and the policy has embeddings "
                f"for 0 to {known - 1} alone; put the model's own tokenizer beside it, or call the model's "
                f"resize_token_embeddings({len(module.tokenizer)}) and save it anew"
            )


def check_lengths(module: SPOModule, datasets: Mapping[str, PromptDataset]) -> None:
    """Refuse prompts that the engine, once started, has no room for; warn of completions that will be cut.

    Args:
        module: with its engine started.
        datasets: "train", and benchmarks by their names.
    """
    room = module.engine.max_model_len
    for name, dataset in datasets.items():
        tokens = len(dataset.longest.token_ids)
        setting = "sampling" if name == "train" else "eval_sampling"
        asked = getattr(module, setting).max_tokens
        if tokens < room < tokens + asked + module.tool_tokens:
            rank_zero_warn(
                f"model.{setting}.max_tokens is {asked}, and the engine takes {room} tokens of prompt and completion "
                f"together: completions of {name} are clipped before, behind its longest prompt after {room - tokens}"
            )
        if tokens >= room:
            raise ConfigError(
                f"prompt {dataset.longest.id} of {name} has {tokens} tokens and the engine takes {room} of prompt "
                "and completion together; lower data.max_prompt_tokens, which leaves longer prompts out, or raise the "
                "engine's max_model_len"
            )
