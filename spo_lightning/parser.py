"""The command line's parser: short names of classes, what a changed class keeps, errors that name what was meant."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from pydoc import locate
from typing import Any, NoReturn, cast

import torch
from jsonargparse import Namespace, _typehints, get_loader, set_loader
from jsonargparse._actions import _ActionConfigLoad
from lightning.pytorch.cli import LightningArgumentParser
from yaml import YAMLError

from spo_lightning.algorithms import AdvantageEstimator, DriftEstimator, ForgettingRule, PolicyLoss, PromptWeights
from spo_lightning.data.value_start import ValueStart
from spo_lightning.protocols import Reward, RolloutEngine

# For their short names.
from spo_lightning.rewards import ExactMatchReward, FunctionReward, MathVerifyReward  # noqa: F401
from spo_lightning.rollouts.transformers_engine import TransformersEngine  # noqa: F401
from spo_lightning.rollouts.vllm_engine import VLLMEngine  # noqa: F401
from spo_lightning.rollouts.vllm_server import VLLMServerEngine  # noqa: F401

# Classes whose subclasses have short names in a configuration.
SEAMS = (
    AdvantageEstimator,
    DriftEstimator,
    ForgettingRule,
    PolicyLoss,
    PromptWeights,
    Reward,
    RolloutEngine,
    ValueStart,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
)

_RATES = {"lr", "learning_rate"}  # names of model.optimizer.init_args.lr in other trainers

_discard = _typehints.discard_init_args_on_class_path_change


def _forget_defaults(parser_or_action: Any, before: Any, value: Any) -> None:
    """Drop the former class's defaults when a class is changed, so that the new class's own count.

    jsonargparse carries over every argument that the new class has too, GSPO would have PPO's clip range, for one.
    What differs from the former class's defaults was asked for, and is carried over as there.
    """
    former = before["class_path"] if before and "init_args" in before else None
    if former is not None and former != value["class_path"]:
        defaults = _typehints.ActionTypeHint.get_class_parser(former).get_defaults()
        for name in [name for name, kept in before["init_args"].items(branches=True, nested=False)]:
            if name in defaults and before["init_args"][name] == defaults[name]:
                before["init_args"].pop(name)
    _discard(parser_or_action, before, value)


_typehints.discard_init_args_on_class_path_change = _forget_defaults


_read_yaml = get_loader("yaml")


def _read(text: str) -> Any:
    """YAML; but a text of comments alone is itself: jsonargparse reads strings, quoted or not, as YAML once more."""
    value = _read_yaml(text)
    return text if value is None and text.lstrip().startswith("#") else value


set_loader("yaml", _read, (YAMLError,))


class SPOArgumentParser(LightningArgumentParser):
    """Refuses abbreviated flags, and names the key that was probably meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Check also what jsonargparse leaves out: keys that are null, which it takes for keys that are not given.

        Raises:
            TypeError: a value is not of its key's type; a null, or the text ``null``, where the type knows none.
        """
        super().validate(namespace, *args, **kwargs)
        for action in self._actions:
            value = namespace.get(action.dest, ...)
            if isinstance(action, _typehints.ActionTypeHint):
                absent = value is None and not action.required  # all that are required are told of together
                if absent or (value == "null" != action.default and action._typehint is str):
                    self._check_value_key(action, None, action.dest, None)
            elif value is None and isinstance(action, _ActionConfigLoad):
                raise TypeError(f'Parser key "{action.dest}": Expected its keys. Got value: None')

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, with a suggestion and without pages of usage, and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        print(f"error: {plain_message(message)}{_suggestion(message, parser)}", file=sys.stderr)
        print(f"every key: {parser.prog.replace(' [options]', '')} --help", file=sys.stderr)
        self.exit(2)


_UNION = (
    r"Does not validate against any of the Union subtypes\s+Subtypes: \[<class '[\w.]+'>, <class 'NoneType'>\]"
    r"\s+Errors:\s+- "
)
_NO_NULL = r"\s+- Expected a <class 'NoneType'>"


def plain_message(message: str) -> str:
    """Jsonargparse's message without its own objects, and with keys as they are typed."""
    optional = re.search(f"{_UNION}(.*?){_NO_NULL}.*", message, re.DOTALL)
    if optional:
        message = message[: optional.start()] + optional[1]
    message = re.sub(r"(is not accepted)\. Got value: Namespace\(.*", r"\1", message, flags=re.DOTALL)
    required = re.fullmatch(r"(the following arguments are required: )(.*)", message)
    if required:
        keys = re.sub(r"(?<![\w.-])(?:(?:fit|validate|test|estimate|export)\.)?(\w[\w.]*)", r"--\1", required[2])
        message = required[1] + keys
    message = message.replace("Expected a <class 'int'>.", "Expected a whole number.")
    key = _null_key(message)
    return message if key is None else f"{key} is missing or null"


def _null_key(message: str) -> str | None:
    """The key that a message of jsonargparse finds null; ``None`` where something else is wrong."""
    absent = re.match(r'Key "([\w.]+)" not found in namespace', message)
    if absent:
        return absent[1]
    found = re.search(r'(Parser key "[\w.]+".*?)(?:Got|Given) value: None\b', message, re.DOTALL)
    return " of ".join(reversed(re.findall(r'Parser key "([\w.]+)"', found[1]))) if found else None


def _suggestion(message: str, parser: Any) -> str:
    """The keys, or the classes, that were probably meant; empty when nothing is close."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
    config = re.search(r"unrecognized arguments: (\S+\.ya?ml)", message)
    wrong_class = re.search(r'Parser key "([\w.]+)".*Expected a dot import path string: (\w+)', message, re.DOTALL)
    option = re.search(r"Option '(\w+)' is not accepted", message)
    chosen = re.search(r"class_path[ =]'([\w.]+)'", message)
    rows = re.search(
        r'"(data\.train)".*Invalid content in sub-config file (\S+\.(?:jsonl?|csv|parquet))', message, re.DOTALL
    )
    if config:
        return f"\nDid you mean: --config {config[1]}?"
    if rows:
        return f"\nDid you mean: --{rows[1]}.path {rows[2]}?"
    if _null_key(message):
        if "".join(sys.argv[1:2]).startswith("--config"):
            return f": --config goes behind the job, as in spo fit {sys.argv[1]} ..."
        return "; give it a value, or a configuration that does, such as --config configs/quickstart.yaml"
    if unknown:
        meant, known = unknown.group(1) or unknown.group(2), [action.dest for action in parser._actions]
        if meant.rpartition(".")[2] in _RATES:
            return "\nDid you mean: model.optimizer.init_args.lr?"
    elif wrong_class:
        return _classes(wrong_class[2], wrong_class[1], parser)
    elif option and chosen:
        meant, known = "lr" if option[1] in _RATES else option[1], _arguments(chosen[1])
    else:
        return ""
    matches = difflib.get_close_matches(meant, known, n=3)
    return f"\nDid you mean: {', '.join(matches)}?" if matches else ""


def _classes(name: str, key: str, parser: Any) -> str:
    """Names that a key takes, near the one given, or all of them where that is a class of another kind."""
    action = next((action for action in parser._actions if action.dest == key), None)
    wanted = str(action._typehint) if isinstance(action, _typehints.ActionTypeHint) else ""
    bases = [base for base in SEAMS if base.__name__ in wanted] or list(SEAMS)
    known = sorted({name for base in bases for name in _class_names(base)})
    everything = [name for base in SEAMS for name in _class_names(base)]
    if len(bases) == 1 and name in everything:
        return f"\n{name} is no {bases[0].__name__}; there are {', '.join(known)}, or your.module.Class"
    matches = difflib.get_close_matches(name, known, n=3) or difflib.get_close_matches(name, everything, n=3)
    return f"\nDid you mean: {', '.join(matches)}?" if matches else ""


def _arguments(class_path: str) -> list[str]:
    try:
        return list(inspect.signature(cast(type, locate(class_path))).parameters)
    except (TypeError, ValueError):  # no such class, or one that does not tell
        return []


def _class_names(base: type) -> list[str]:
    children: list[type] = base.__subclasses__()
    names = [child.__name__ for child in children if not child.__name__.startswith(("LazyInstance", "_"))]
    return names + [name for child in children for name in _class_names(child)]
