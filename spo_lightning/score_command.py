"""``spo score``: the metrics of ``spo test`` again, from the completions that it kept, without the policy."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from spo_lightning.benchmark_table import render_table
from spo_lightning.evaluation import BenchmarkEvaluator, BenchmarkResult
from spo_lightning.generation_files import BenchmarkRow, GenerationSettings, read_generations
from spo_lightning.metrics import cluster_answers
from spo_lightning.protocols import Reward
from spo_lightning.rewards import ExactMatchReward, FunctionReward, MathVerifyReward  # noqa: F401 (short names)
from spo_lightning.rollouts.grades import grades_of

Generations = Mapping[str, tuple[GenerationSettings, list[BenchmarkRow]]]


def parser() -> ArgumentParser:
    """The arguments of ``spo score``."""
    parser = ArgumentParser(
        prog="spo score",
        description="Compute the metrics of spo test again from the completions that it kept, without the policy.",
    )
    parser.add_argument(
        "files", nargs="+", type=str, help="files of one <default_root_dir>/generations/test/<answered>"
    )
    parser.add_argument("--regrade", action="store_true", help="grade the completions again")
    help_text = "what grades them, a class name or a YAML file; MathVerifyReward unless it is given"
    parser.add_argument("--reward", type=Reward | None, enable_path=True, help=help_text)
    return parser


def score(generations: Generations) -> dict[str, BenchmarkResult]:
    """Results by benchmark, the same as ``spo test`` computed."""
    results = {}
    for name, (settings, rows) in generations.items():
        evaluator = BenchmarkEvaluator(settings.num_samples, torch.device("cpu"), settings.with_tools)
        evaluator.update(rows)
        results[name] = evaluator.compute()
    return results


def regraded(rows: Sequence[BenchmarkRow], num_samples: int, reward: Reward) -> list[BenchmarkRow]:
    """The completions with other grades, and answers classed by other rules.

    Args:
        rows: by problem and sample.
        num_samples: completions of each problem.
        reward: grades what the policy wrote, as in a run.

    Raises:
        TypeError, ValueError: it gives something else than a grade a completion.
    """
    grades = grades_of(
        reward,
        [row.completion if row.sampled_text is None else row.sampled_text for row in rows],
        [row.reference for row in rows],
        [row.prompt for row in rows],
    )
    starts = range(0, len(rows), num_samples)
    answers = [[grade.answer for grade in grades[start : start + num_samples]] for start in starts]
    classes = [number for group in cluster_answers(answers, reward.equivalent) for number in group]
    return [
        replace(row, reward=grade.value, answer=grade.answer, cause=grade.cause, answer_class=number)
        for row, grade, number in zip(rows, grades, classes, strict=True)
    ]


def report(arguments: Namespace) -> str:
    """What ``spo score`` prints.

    Args:
        arguments: of ``parser``, instantiated.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, or files that do not belong together.
    """
    if arguments.reward is not None and not arguments.regrade:
        raise ValueError("--reward is given and only used to grade again; add --regrade")
    generations: Generations = read_generations(Path(file).expanduser() for file in arguments.files)
    lines = [_origin(settings, rows) for settings, rows in generations.values()]
    if arguments.regrade:
        with closing(MathVerifyReward() if arguments.reward is None else arguments.reward) as reward:
            again = {name: regraded(rows, s.num_samples, reward) for name, (s, rows) in generations.items()}
        lines += ["", f"graded again by {type(reward).__name__}:"]
        lines += [f"{name}: {_changed(generations[name][1], rows)}" for name, rows in again.items()]
        generations = {name: (settings, again[name]) for name, (settings, _) in generations.items()}
    return "\n".join([*lines, "", render_table(score(generations))])


def _origin(settings: GenerationSettings, rows: Sequence[BenchmarkRow]) -> str:
    answered = f"checkpoint {settings.checkpoint}" if settings.checkpoint else settings.policy
    done = len(rows) // settings.num_samples
    part = "" if done == settings.num_problems else f", which is not all of it: {done} of {settings.num_problems}"
    return f"{settings.benchmark}: {done} problems, {settings.num_samples} samples each, by {answered}{part}"


def _changed(before: Sequence[BenchmarkRow], after: Sequence[BenchmarkRow]) -> str:
    count = sum(old.reward != new.reward for old, new in zip(before, after, strict=True))
    return f"{count} of {len(after)} rewards changed"


def run() -> None:
    """Run ``spo score``."""
    arguments = parser()
    try:
        print(report(arguments.instantiate(arguments.parse_args(sys.argv[2:]))))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
