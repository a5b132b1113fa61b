"""Every setting of the comparison with TRL, said once: either side's arguments and the printed table follow from it.

Standard library only, so that TRL's environment needs nothing of ours to read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

POLICY = "configs/quickstart/policy"
PROMPTS = "configs/quickstart/train.jsonl"
HELD_OUT = "configs/quickstart/val.jsonl"
COMPLETIONS = 128  # an iteration
STEPS = 4  # of the optimizer, an iteration
GROUP = 8  # completions of a prompt
WARM_UP = 2  # iterations that are not counted: workers start, and our side draws its first figure after the first


@dataclass(frozen=True)
class Setting:
    """One thing that holds on both sides.

    Attributes:
        what: in words.
        ours: keys of ``spo fit``.
        trl: arguments of ``GRPOConfig``; empty where TRL has the value in its code.
        groups: whether it makes sense for groups of completions alone, so not for SPO.
    """

    what: str
    ours: dict[str, Any]
    trl: dict[str, Any] = field(default_factory=dict)
    groups: bool = False


def shared(iterations: int, seed: int) -> list[Setting]:
    """What both sides do alike."""
    loss, adam, rare = "model.loss.init_args.", "model.optimizer.init_args.", iterations + 1
    return [
        Setting("iterations", {"data.num_iterations": iterations}, {"max_steps": STEPS * iterations}),
        Setting("completions an iteration", {"data.batch_size": COMPLETIONS}, {"generation_batch_size": COMPLETIONS}),
        Setting(
            "optimiser steps an iteration, on 32 completions each",
            {"model.num_minibatches": STEPS},
            {
                "per_device_train_batch_size": COMPLETIONS // STEPS,
                "gradient_accumulation_steps": 1,
                "num_iterations": 1,
            },
        ),
        Setting("completions of a prompt", {"data.completions_per_prompt": GROUP}, {"num_generations": GROUP}, True),
        Setting(
            "divisor of advantages: group's sample standard deviation + 1e-4 (TRL's constant)",
            {"model.advantage.init_args.eps": 1e-4},
            {"scale_rewards": "group"},
            True,
        ),
        Setting("most tokens of a completion", {"model.sampling.max_tokens": 48}, {"max_completion_length": 48}),
        Setting(
            "sampling from the whole distribution",
            {"model.sampling.temperature": 1.0, "model.sampling.top_p": 1.0, "model.sampling.top_k": 0},
            {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
        ),
        Setting(
            "PPO clip, and cap of the ratio where the advantage is negative",
            {"model.loss": "PPOClipLoss", loss + "clip_ratio_low": 0.2, loss + "clip_ratio_high": 0.28}
            | {loss + "dual_clip": 10.0},
            {"epsilon": 0.2, "epsilon_high": 0.28, "delta": 10.0},
        ),
        Setting(
            "loss: mean over the tokens of an optimiser step",
            {loss + "aggregation": "token-mean"},
            {"loss_type": "bnpo"},
        ),
        Setting(
            "AdamW, PyTorch's fused one, constant learning rate",
            {
                "model.optimizer": "torch.optim.AdamW",
                adam + "lr": 1.5e-5,
                adam + "weight_decay": 0.0,
                adam + "fused": True,
            },
            {"learning_rate": 1.5e-5, "weight_decay": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
            | {"optim": "adamw_torch_fused"},
        ),
        Setting("largest norm of the gradient", {"model.max_grad_norm": 1.0}, {"max_grad_norm": 1.0}),
        Setting(
            "parameters and computation in float32, attention by PyTorch",
            {"model.policy.dtype": "float32", "model.policy.attn_implementation": "sdpa"},
            {"model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"}, "bf16": False},
        ),
        Setting(
            "activations are kept, not computed again",
            {"model.policy.gradient_checkpointing": False},
            {"gradient_checkpointing": False},
        ),
        Setting("no validation", {"trainer.limit_val_batches": 0}, {"eval_strategy": "no"}),
        Setting("no checkpoint before the end", {"checkpoint.every_n_iterations": rare}, {"save_strategy": "no"}),
        Setting(
            "one record an iteration, kept in memory",
            {"trainer.logger": False},
            {"report_to": "none", "logging_steps": STEPS},
        ),
        Setting(
            "no tables of completions, no figures (ours: after the first iteration, in the warm-up)",
            {"completions_table.every_n_iterations": rare, "tracker_figures.every_n_iterations": rare},
            {"log_completions": False},
        ),
        Setting("seed", {"seed_everything": seed}, {"seed": seed}),
    ]


# What TRL alone has a setting for, and why it has this value here.
TRL_ONLY: tuple[tuple[str, Any, str], ...] = (
    ("beta", 0.0, "no KL penalty, so no reference model; ours has none"),
    ("use_cpu", True, "as ours"),
    ("use_vllm", False, "Transformers generates on both sides"),
    ("disable_tqdm", True, "no progress bar: faster; ours prints a line every 10 s"),
    ("dataloader_num_workers", 0, "prompts are in memory; processes would only cost time"),
    ("dataloader_pin_memory", False, "for GPUs"),
)


def spo_arguments(algorithm: str, iterations: int, seed: int) -> list[str]:
    """Arguments of ``spo fit`` after the quickstart's configuration.

    Args:
        algorithm: "grpo" or "no_warm_start", a file in configs/algorithm/.
        iterations: of the run.
        seed: of the run.
    """
    groups = algorithm == "grpo"
    values = {
        key: value for row in shared(iterations, seed) if groups or not row.groups for key, value in row.ours.items()
    }
    flags = [word for key, value in values.items() for word in (f"--{key}", _yaml(value))]
    return ["--config", "configs/quickstart.yaml", "--config", f"configs/algorithm/{algorithm}.yaml", *flags]


def grpo_config(iterations: int, seed: int) -> dict[str, Any]:
    """Arguments of TRL's ``GRPOConfig``."""
    ours = {key: value for row in shared(iterations, seed) for key, value in row.trl.items()}
    return ours | {key: value for key, value, _ in TRL_ONLY}


def settings_table(iterations: int) -> str:
    """All of it as Markdown."""
    lines = ["| | spo_lightning | TRL |", "|---|---|---|"]
    for row in shared(iterations, 0):
        if "seed_everything" in row.ours:
            continue
        lines.append(f"| {row.what} | {_keys(row.ours)} | {_keys(row.trl)} |")
    lines += [f"| {why} | | {_keys({key: value})} |" for key, value, why in TRL_ONLY]
    return "\n".join(lines)


def _keys(values: dict[str, Any]) -> str:
    return "<br>".join(f"`{key}: {_yaml(value)}`" for key, value in values.items())


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
