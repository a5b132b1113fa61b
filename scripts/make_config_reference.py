"""Writes docs/configuration.md: every key of ``spo fit``, read from the parser itself.

usage: python scripts/make_config_reference.py [--check]     --check: write nothing, fail if the page is out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from spo_lightning.plan_command import PlanCLI

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configuration.md"
LIGHTNING = "https://lightning.ai/docs/pytorch/stable/common/trainer.html"

INTRODUCTION = """\
# Configuration reference

Every key of `spo fit`, with its type and default. `python scripts/make_config_reference.py` writes this page from the
parser; edit the docstrings in the code, not the page.

```bash
spo fit --config configs/quickstart.yaml --print_config      # the keys of one run, resolved
spo fit --help                                               # every key
spo fit --model.loss.help PPOClipLoss                        # every argument of a class
```

Configurations compose from left to right: a later `--config` or `--key value` overrides what stands before it. A key
whose type is a class takes `class_path` and `init_args`; the classes of this project have short names. What a run
resolved to is its artifact `config.yaml` in MLflow.

`--config FILE` and `--ckpt_path FILE` (or `last`) belong to the command and not to the configuration. `seed_everything`
also sets `model.seed` and `data.seed`; `model.policy.path` and `.revision` name the tokenizer too.
"""

# Title, prefix of the keys, what the section is about.
SECTIONS = (
    ("Seed", "seed_everything", ""),
    ("Policy", "model.policy", "What is trained; see [options](options.md)."),
    ("Sampling", "model.sampling", "How training completions are sampled."),
    (
        "Benchmark sampling",
        "model.eval_sampling",
        "The same for benchmarks; the defaults are the paper's.",
    ),
    (
        "Collection",
        "model.collection",
        "With `data.oversampling` above 1; see [rollouts](rollouts.md#first-finished).",
    ),
    ("Model", "model", "The algorithm and its optimiser steps."),
    ("Data", "data", "Prompts, draws and the value tracker."),
    ("Checkpoints", "checkpoint", "A checkpoint is taken at the end of an iteration only."),
    ("Export", "export_policy", "The trained policy as a Hugging Face folder."),
    ("Completions table", "completions_table", "Prompts, completions and grades to read."),
    ("Tracker figures", "tracker_figures", "Histograms of the tracker's values."),
)

# Key, module and name of what it takes; the project's subclasses of it are listed.
SEAMS = (
    ("model.reward", "spo_lightning.protocols", "Reward"),
    ("model.engine", "spo_lightning.protocols", "RolloutEngine"),
    ("model.advantage", "spo_lightning.algorithms", "AdvantageEstimator"),
    ("model.loss", "spo_lightning.algorithms", "PolicyLoss"),
    ("model.correction", "spo_lightning.algorithms", "OffPolicyCorrection"),
    ("model.drift", "spo_lightning.algorithms", "DriftEstimator"),
    ("data.forgetting", "spo_lightning.algorithms", "ForgettingRule"),
    ("data.prompt_weights", "spo_lightning.algorithms", "PromptWeights"),
    ("data.value_start", "spo_lightning.data", "ValueStart"),
    ("model.tool_use.tools", "spo_lightning.tools", "Tool"),
    ("model.tool_use.format", "spo_lightning.tools", "ToolFormat"),
    ("a runner of PythonInterpreter", "spo_lightning.tools", "CodeRunner"),
)

# Key, module and name of what it takes; these have no subclasses.
SETTINGS = (
    ("model.policy.lora", "spo_lightning.lora", "LoraSettings"),
    ("model.tool_use", "spo_lightning.tools", "ToolUse"),
    ("data.train", "spo_lightning.data", "PromptSource"),
    ("data.benchmarks.<name>", "spo_lightning.data", "Benchmark"),
    ("trainer.logger", "spo_lightning.logger", "SPOMLFlowLogger"),
    ("trainer.strategy", "spo_lightning.strategies", "FSDP2Strategy"),
)

# Modules whose classes become known to the seams only when they are imported.
IMPLEMENTATIONS = (
    "spo_lightning.rewards.exact_match",
    "spo_lightning.rewards.function",
    "spo_lightning.rewards.math_reward",
    "spo_lightning.rollouts.transformers_engine",
    "spo_lightning.rollouts.vllm_engine",
    "spo_lightning.rollouts.vllm_server",
    "spo_lightning.tools.formats",
    "spo_lightning.tools.python_interpreter",
    "spo_lightning.tools.sandbox",
    "spo_lightning.tools.sandbox_fusion",
)
INTERNAL = ("ToolEngine",)


def render() -> str:
    """The page."""
    for module in IMPLEMENTATIONS:
        import_module(module)
    parser = PlanCLI(["--config", str(ROOT / "configs" / "quickstart.yaml")]).parser
    actions = {action.dest: action for action in parser._actions if _is_key(action)}
    parts = [INTRODUCTION]
    for title, prefix, about in SECTIONS:
        own = [actions.pop(key) for key in list(actions) if key == prefix or key.startswith(f"{prefix}.")]
        parts += [f"## {title}\n", f"{about}\n" if about else "", _table(own)]
    parts += ["## Trainer\n", _trainer(actions), "## Classes\n", *_classes(), "## Settings\n", *_settings()]
    return "\n".join(part for part in parts if part)


def _is_key(action: Any) -> bool:
    """Whether this is a key of a configuration that a user sets."""
    return type(action).__name__ == "ActionTypeHint" and action.dest != "gpu_gb"  # which is of spo plan


def _table(actions: Iterable[Any]) -> str:
    rows = [
        f"| `{action.dest}` | {_type(action)} | {_default(action)} | {_text(action.help or '')} |" for action in actions
    ]
    return "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows, ""])


def _trainer(actions: dict[str, Any]) -> str:
    keys = [action for key, action in actions.items() if key.startswith("trainer.")]
    rows = [f"| `{action.dest}` | {_default(action)} | {_first_sentence(action.help or '')} |" for action in keys]
    about = (
        f"The keys of [Lightning's Trainer]({LIGHTNING}), with this project's defaults. An epoch is the whole run, a "
        "batch of the trainer an iteration: `trainer.val_check_interval: 10` validates every ten iterations. Clipping "
        "is `model.max_grad_norm`, accumulation `model.micro_batch_tokens`, a run's length `data.num_iterations`.\n"
    )
    return "\n".join([about, "| key | default | |", "|---|---|---|", *rows, ""])


def _classes() -> Iterator[str]:
    for key, module, name in SEAMS:
        base = getattr(import_module(module), name)
        yield f"### {name}\n\n`{key}`: {_summary(base)}\n"
        for cls in _shipped(base):
            yield _one_class(cls)


def _settings() -> Iterator[str]:
    for key, module, name in SETTINGS:
        cls = getattr(import_module(module), name)
        yield f"### {name}\n\n`{key}`: {_summary(cls)}\n"
        yield _arguments(cls)


def _shipped(base: type) -> list[type]:
    """This project's subclasses by name; jsonargparse makes some of its own for defaults."""
    found = {cls for child in base.__subclasses__() for cls in (child, *_shipped(child))}
    shipped = [cls for cls in found if cls.__module__.startswith("spo_lightning.") and cls.__name__ not in INTERNAL]
    return sorted(
        (cls for cls in shipped if not cls.__name__.startswith("LazyInstance_")), key=lambda cls: cls.__name__
    )


def _one_class(cls: type) -> str:
    return f"**`{cls.__name__}`** (`{cls.__module__}`): {_summary(cls)}\n\n{_arguments(cls)}"


def _arguments(cls: type) -> str:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False)
    keys = [action for action in parser._actions if _is_key(action)]
    return _table(keys) if keys else "No arguments.\n"


def _type(action: Any) -> str:
    hint = getattr(action, "_typehint", None) or action.type
    text = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
    text = re.sub(r"Union\[(.*), NoneType\]$", r"\1, null", text.replace("typing.", ""))
    text = re.sub(r"(?:Optional|Union)\[(.*)\]$", r"\1", text)
    text = re.sub(r"Literal\[([^\]]*)\]", lambda match: match.group(1).replace("'", "").replace(", ", " / "), text)
    text = re.sub(r"\b[\w.]+\.(\w+)", r"\1", text).replace("None", "null")
    return f"`{text}`".replace("|", "\\|")


def _default(action: Any) -> str:
    if getattr(action, "required", False) or type(action.default).__name__ == "_UnknownDefault":
        return "required" if getattr(action, "required", False) else "see the class"
    value = action.default
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    class_path = value.get("class_path") if hasattr(value, "get") else None
    text = class_path.rsplit(".", 1)[-1] if class_path else repr(value) if isinstance(value, str) else str(value)
    return f"`{text}`".replace("|", "\\|")


def _text(help_text: str) -> str:
    """One line of Markdown from a docstring."""
    line = " ".join(help_text.replace("%%", "%").split())
    line = re.sub(r":\w+:`~?([^`<]*?)(?:\s*<[^>]*>)?`", lambda match: f"`{match.group(1).rsplit('.', 1)[-1]}`", line)
    return line.replace("``", "`").replace("|", "\\|")


def _first_sentence(help_text: str) -> str:
    return re.split(r"(?<=[^.A-Z])\.(?:\s|$)", _text(help_text), maxsplit=1)[0].rstrip(".") + "."


def _summary(cls: type) -> str:
    return _text((cls.__doc__ or "").strip().split("\n\n")[0])


def main() -> None:
    """Write the page, or compare it."""
    page = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}, {len(page.splitlines())} lines")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        raise SystemExit(f"{PAGE.relative_to(ROOT)} is out of date; run python scripts/make_config_reference.py")


if __name__ == "__main__":
    main()
