"""``spo fit`` on two ranks, in real processes that a test may signal or kill."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from runs import write_inputs

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0  # seconds until a run counts as hanging; on an idle machine all of them end within ten


def even_length(completion: str, reference: str, prompt: str) -> float:
    """A reward that a random policy earns half of the time."""
    return float(len(completion) % 2 == 0)


def broken_on_rank_one(completion: str, reference: str, prompt: str) -> float:
    """A reward that one rank alone cannot compute, in a process that does not come to its end by itself."""
    if os.environ["LOCAL_RANK"] == "1":
        atexit.register(time.sleep, 10 * PATIENCE)  # as when leaving the process group waits for the others
        raise ArithmeticError("this reward is broken")
    return 0.0


def settings(folder: Path, reward: str, strategy: str) -> list[str]:
    """Arguments of a small run on two ranks."""
    values = {
        "config": ROOT / "configs" / "strategy" / f"{strategy}.yaml",
        "trainer.devices": 2,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.default_root_dir": folder,
        "trainer.callbacks+": f"{{class_path: trace.Trace, init_args: {{path: {folder / 'trace.jsonl'}}}}}",
        "model.policy.path": folder / "start",
        "model.reward": f"{{class_path: FunctionReward, init_args: {{function: launched_runs.{reward}}}}}",
        "model.sampling.max_tokens": 8,
        "model.optimizer": "{class_path: torch.optim.AdamW, init_args: {lr: 0.01}}",
        "model.num_minibatches": 2,
        "model.micro_batch_tokens": 64,
        "data.train.path": folder / "train.jsonl",
        "data.train.id_column": "id",
        "data.batch_size": 5,
        "data.max_prompt_tokens": 16,
        "data.chat_template": "never",
        "data.instruction": "''",
    }
    return [f"--{key}={value}" for key, value in values.items()]


class LaunchedRun:
    """A run and everything it starts, as a process group; what is left of it is killed in the end.

    Args:
        folder: of the run; what it prints goes to ``output`` there, its trajectory to ``trace.jsonl``.
        arguments: of ``spo fit``, beside the small settings.
        reward: name of a function of this module.
        launcher: command that starts the program, where Lightning is not to start rank 1.
        strategy: name of its overlay.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        reward: str = "even_length",
        launcher: tuple[str, ...] = (),
        strategy: str = "ddp",
    ) -> None:
        self.folder = folder
        if not (folder / "start").exists():
            folder.mkdir(exist_ok=True)
            write_inputs(folder)
        start = launcher or (sys.executable,)
        with (folder / "output").open("w") as output:
            self.process = subprocess.Popen(
                [*start, "-m", "spo_lightning", "fit", *settings(folder, reward, strategy), *arguments],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> LaunchedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pid in self.alive:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def alive(self) -> dict[int, int]:
        """Processes of the group that have not ended, and their parents."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent, group = path.read_text().rsplit(")", 1)[1].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state != "Z" and int(group) == self.process.pid:
                found[int(path.parent.name)] = int(parent)
        return found

    @property
    def rank_one(self) -> int:
        """Process that rank 0 has started."""
        (child,) = [pid for pid, parent in self.alive.items() if parent == self.process.pid]
        return child

    @property
    def output(self) -> str:
        """What the ranks have printed."""
        return (self.folder / "output").read_text()

    @property
    def trace(self) -> list[dict]:
        """Iterations that the ranks have ended; each rank writes its own line."""
        path = self.folder / "trace.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_iterations(self, count: int) -> None:
        """Until both ranks have ended so many iterations in all, earlier runs in the folder included."""
        deadline = time.monotonic() + PATIENCE
        while len(self.trace) < 2 * count:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def wait_for_end(self) -> int:
        """Until none of its processes is left; returns the status of the one that was started."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None or self.alive:
            assert time.monotonic() < deadline, f"{self.alive} of {self.process.pid} hang: {self.output}"
            time.sleep(0.02)
        return self.process.returncode
