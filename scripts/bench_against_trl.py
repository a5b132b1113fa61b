"""Trains the quickstart's policy with TRL's GRPOTrainer and with `spo fit`, in turns, and compares cost and rewards.

  bash scripts/setup_trl.sh                            # once: TRL's environment, .venv-trl
  .venv/bin/python scripts/bench_against_trl.py        # on a machine that does nothing else

Every run is a process of its own. docs/against_trl.md says what is alike and what cannot be.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from against_trl.held_out import held_out, read_prompts
from against_trl.report import (
    OURS,
    SPO,
    TRL,
    Run,
    cost_table,
    draw,
    held_out_table,
    ratio_table,
    reward_table,
)
from against_trl.settings import POLICY, PROMPTS, STEPS, WARM_UP, grpo_config, settings_table, spo_arguments
from jsonargparse import auto_cli

SCRIPTS = Path(__file__).resolve().parent
TRL_PYTHON = Path(".venv-trl/bin/python")
SIDES = (OURS, TRL, SPO)


@dataclass(frozen=True)
class Bench:
    """Where the runs are kept, how long they are, and what `spo fit` is told beyond the common settings."""

    folder: Path
    iterations: int
    threads: int
    further: str

    def train(self, side: str, repeat: int) -> Run:
        """One run of one side, in a process of its own; its seed is the repeat's number."""
        root = self.folder / f"{side.replace(', ', '-')}-{repeat}"
        root.mkdir(parents=True, exist_ok=True)
        record = root / "iterations.json"
        line = self._trl(root, record, repeat) if side == TRL else self._ours(side, root, record, repeat)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "GOMP_SPINCOUNT": "5000",  # what spo sets for itself
            "PYTHONPATH": str(SCRIPTS),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with (root / "log.txt").open("w") as log:
            status = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        if status:
            raise SystemExit(f"error: {side} ended with status {status}; see {root / 'log.txt'}")
        return Run.load(side, repeat, record)

    def policy(self, run: Run) -> str:
        """Where a run left its policy."""
        return str(self.folder / f"{run.side.replace(', ', '-')}-{run.repeat}" / "policy")

    def _ours(self, side: str, root: Path, record: Path, seed: int) -> list[str]:
        clock = {"class_path": "against_trl.our_clock.IterationClock", "init_args": {"output": str(record)}}
        own = ["--trainer.default_root_dir", str(root), "--trainer.callbacks", json.dumps([clock])]
        algorithm = "grpo" if side == OURS else "no_warm_start"
        arguments = [*spo_arguments(algorithm, self.iterations, seed), *own, *shlex.split(self.further)]
        return [sys.executable, "-m", "spo_lightning", "fit", *arguments]

    def _trl(self, root: Path, record: Path, seed: int) -> list[str]:
        prompts = [
            {"prompt": prompt.text, "answer": prompt.reference, "token_ids": list(prompt.token_ids)}
            for prompt in read_prompts(POLICY, PROMPTS)
        ]
        job = {
            "policy": POLICY,
            "prompts": prompts,
            "steps": STEPS,
            "folder": str(root),
            "output": str(record),
            "config": grpo_config(self.iterations, seed),
        }
        path = root / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        return [str(TRL_PYTHON), str(SCRIPTS / "against_trl" / "trl_side.py"), str(path)]


def main(
    output: Path = Path("runs/against_trl"), repeats: int = 3, iterations: int = 20, threads: int = 0, ours: str = ""
) -> None:
    """Train both sides in turns, and print tables.

    Args:
        output: folder of the runs and the figure.
        repeats: runs of each side.
        iterations: of each run, of 128 completions; the first two are warm-up and not counted in the times.
        threads: of each run, one for every processor where it is 0.
        ours: further arguments of both our sides, as "--model.old_logprobs trainer".
    """
    if not Path(POLICY).is_dir():
        raise SystemExit(f"error: no {POLICY} here; start in the project's folder")
    if not TRL_PYTHON.exists():
        raise SystemExit(f"error: no {TRL_PYTHON}; make it by: bash scripts/setup_trl.sh")
    if repeats < 1 or iterations <= WARM_UP:
        raise SystemExit(f"error: repeats is {repeats} and iterations {iterations}; give at least 1 and {WARM_UP + 1}")
    bench = Bench(output, iterations, threads or os.cpu_count() or 1, ours)
    torch.set_num_threads(bench.threads)
    print(
        f"{_machine(bench.threads)}\n\n{settings_table(iterations)}\n\nfurther for ours: {ours or 'nothing'}\n",
        flush=True,
    )
    runs = []
    for repeat in range(repeats):
        turn = repeat % len(SIDES)  # each side goes first, second and last in turn
        for side in (*SIDES[turn:], *SIDES[:turn]):
            start = time.perf_counter()
            run = bench.train(side, repeat)
            whole = time.perf_counter() - start
            print(
                f"repeat {repeat}, {side}: {run.wall:.1f} s per 1,000 completions ({whole:.0f} s with start)",
                flush=True,
            )
            runs.append(run)
    for table in (cost_table(runs, SIDES), ratio_table(runs, (OURS, SPO)), reward_table(runs, SIDES)):
        print(f"\n{table}", flush=True)
    scores: dict[str, list[float]] = {side: [] for side in SIDES}
    for run in runs:
        scores[run.side].append(held_out(bench.policy(run)))
    print(f"\n{held_out_table(scores, held_out(POLICY))}")
    draw(runs, SIDES, output / "against_trl.png")
    print(f"\nfigure: {output / 'against_trl.png'}")


def _machine(threads: int) -> str:
    """What ran, and on what."""
    asked = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('trl', 'transformers', 'torch')))"
    theirs = subprocess.run([TRL_PYTHON, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    ours = " ".join(f"{name} {version(name)}" for name in ("spo-lightning", "transformers", "torch"))
    load = os.getloadavg()[0]
    return (
        f"{ours} / {theirs}\n{platform.machine()}, {os.cpu_count()} processors, {threads} threads a run; "
        f"load {load:.1f} at the start"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
