"""Runs the study of docs/results.md: every algorithm and ablation on the quickstart task, seed by seed.

Each run is a program of its own, as a user starts it. The study can be interrupted (Ctrl-C) and called again: finished
runs are kept, an unfinished one goes on from its checkpoint. At the end `spo compare` writes table, figures and page.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from jsonargparse import auto_cli
from tqdm import tqdm

ALGORITHMS = (
    "spo",
    "spo_plus_plus",
    "grpo",
    "rloo",
    "frozen_baseline",
    "no_baseline",
    "no_warm_start",
    "no_curriculum",
)
WARM_START = {"spo", "spo_plus_plus", "frozen_baseline", "no_baseline", "no_curriculum"}
BASE = ("--config", "configs/quickstart.yaml", "--config", "configs/experiments/study.yaml")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # runs side by side would only fight over more
QUIET = ("--trainer.logger", "false")
POLL_S = 1.0


@dataclass(frozen=True)
class Study:
    """Where the study is kept, and how long its runs are."""

    folder: Path
    experiment: str
    num_iterations: int
    extra: list[str]
    stopped: Event

    def values(self, seed: int) -> Path:
        """The file of start values that a seed's runs with a warm start share (SPO Algorithm 2)."""
        return self.folder / f"values_{seed}.parquet"

    def estimate(self, seed: int) -> None:
        """Draw the start values of a seed: 8 completions of every training prompt."""
        output = self.values(seed)
        if not output.exists():
            self._spo("estimate", f"estimate_{seed}", seed, "--num_samples", "8", "--output", str(output), *QUIET)

    def fit(self, algorithm: str, seed: int) -> None:
        """Train one run, or the rest of it; a run that has finished with the same settings is kept."""
        name = f"{algorithm}_{seed}"
        overlay = ["--config", f"configs/algorithm/{algorithm}.yaml"]
        start = ["--data.value_start", "ValueFile", "--data.value_start.path", str(self.values(seed))]
        logged = {"experiment_name": self.experiment, "group": algorithm, "run_name": f"{algorithm}, seed {seed}"}
        arguments = [
            *overlay,
            *(start if algorithm in WARM_START else []),
            *(word for key, value in logged.items() for word in (f"--trainer.logger.init_args.{key}", value)),
            *("--data.num_iterations", str(self.num_iterations), "--ckpt_path", "last", *self.extra),
        ]
        done = self.folder / name / "done.json"
        if not done.exists():
            self._spo("fit", name, seed, *arguments)
            done.write_text(json.dumps(arguments))
        elif json.loads(done.read_text()) != arguments:
            raise SystemExit(
                f"error: {done.parent} is a run with other settings; choose another --output, or delete it"
            )

    def run_id(self, algorithm: str, seed: int) -> str:
        """MLflow's id of a run."""
        return json.loads((self.folder / f"{algorithm}_{seed}" / "mlflow_run.json").read_text())["run_id"]

    def _spo(self, command: str, name: str, seed: int, *arguments: str) -> None:
        root = self.folder / name
        root.mkdir(parents=True, exist_ok=True)
        seeded = ("--seed_everything", str(seed), "--trainer.default_root_dir", str(root))
        line = [sys.executable, "-m", "spo_lightning", command, *BASE, *seeded, *arguments]
        with (root / "log.txt").open("a") as log:
            process = subprocess.Popen(
                line,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ONE_THREAD},
                process_group=0,  # Ctrl-C is for this program alone
            )
        while process.poll() is None and not self.stopped.wait(POLL_S):
            pass
        if process.poll() is None:
            process.terminate()  # which leaves a checkpoint
        if process.wait():
            raise RuntimeError(f"{name} ended with status {process.returncode}; see {root / 'log.txt'}")


def main(
    output: Path = Path("runs/study"),
    seeds: int = 5,
    jobs: int = 2,
    algorithms: list[str] = list(ALGORITHMS),  # noqa: B006 (only read)
    num_iterations: int = 40,
    experiment: str = "study",
    extra: list[str] = [],  # noqa: B006 (only read)
) -> None:
    """Run what is missing of the study, and compare.

    Args:
        output: folder of the study.
        seeds: runs of each algorithm, with seeds 0, 1, ...
        jobs: runs at a time, one thread each.
        algorithms: names of overlays in configs/algorithm/.
        num_iterations: iterations of each run.
        experiment: MLflow experiment of the runs.
        extra: further arguments of every spo fit, as [--data.batch_size=32, --model.num_minibatches=1].
    """
    unknown = [name for name in algorithms if not Path(f"configs/algorithm/{name}.yaml").is_file()]
    if unknown:
        raise SystemExit(f"error: no configs/algorithm/{unknown[0]}.yaml here; start in the project's folder")
    study = Study(output, experiment, num_iterations, extra, Event())
    estimates = [(study.estimate, seed) for seed in range(seeds)]
    # Seed by seed, each time beginning with another algorithm, so that a slow hour of the machine meets them all.
    runs = [(algorithms[(i + seed) % len(algorithms)], seed) for seed in range(seeds) for i in range(len(algorithms))]
    fits = [(study.fit, *run) for run in runs]
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(estimates) + len(fits), unit="run", smoothing=0) as bar:
        try:
            for calls in (estimates, fits):
                for future in as_completed([pool.submit(*call) for call in calls]):
                    future.result()
                    bar.update()
        finally:
            study.stopped.set()
            pool.shutdown(cancel_futures=True)
            signal.signal(signal.SIGTERM, earlier)
    ids = [study.run_id(*run) for run in sorted(runs)]
    compare = [sys.executable, "-m", "spo_lightning", "compare", "--output", str(output / "comparison"), "--runs", *ids]
    raise SystemExit(subprocess.run(compare).returncode)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
