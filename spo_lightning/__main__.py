"""The program ``spo``: answers ``spo --help`` at once and leaves the rest to LightningCLI."""

from __future__ import annotations

import difflib
import os
import select
import signal
import sys
from importlib import import_module

COMMANDS = ("fit", "validate", "test", "estimate", "export", "plan", "score", "compare")
OUTPUT_CLOSED = 128 + signal.SIGPIPE
WITHOUT_TRAINER = ("plan", "score", "compare")

USAGE = """\
usage: spo COMMAND --config FILE [--config FILE ...] [--KEY VALUE ...]

Single-stream Policy Optimization (SPO) for language models, on PyTorch Lightning.

commands:
  fit        train a policy
  validate   answer the benchmarks of data.benchmarks, metrics under val/
  test       answer the benchmarks of data.benchmarks, metrics under test/
  estimate   draw completions of every training prompt and write a value file for fit
  export     write the policy of a checkpoint as a Hugging Face folder
  plan       print what a configuration needs of each device's memory, without the devices
  score      compute the benchmark metrics again from the generations that test kept, without the policy
  compare    tables and figures of MLflow runs, seed by seed

Configurations compose: a later --config or --key overrides what stands before it.
  spo fit --config configs/quickstart.yaml --model.num_minibatches 2
  spo fit --config configs/quickstart.yaml --ckpt_path last     continue after a crash
  spo fit --config configs/quickstart.yaml --print_config       the resolved configuration
  spo COMMAND --help                                            every key of a command
"""


def main() -> None:
    """Entry point of ``spo`` and ``python -m spo_lightning``; ends quietly where nobody reads its output any more."""
    try:
        try:
            _run()
        finally:
            if sys.stdout is not None:  # closed before the start
                sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():  # a connection of the run's own
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        print("error: standard output was closed, the program has ended", file=sys.stderr)
        raise SystemExit(OUTPUT_CLOSED) from None


def _output_is_closed() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    if sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors alone
    return bool(poll.poll(0))


def _run() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("spo-lightning"))
        return
    if arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
        print(f"error: there is no command {arguments[0]!r}; {hint}", file=sys.stderr)
        raise SystemExit(2)
    if os.getcwd() not in sys.path:  # rewards and losses of one's own are found here, as under python -m
        sys.path.insert(0, os.getcwd())
    # Idle OpenMP threads spin, by default so long that a small policy on two cores is ten times slower beside one busy
    # process; without any spinning it is twice as slow on an idle machine. Has to be set before torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    module = f"{arguments[0]}_command" if arguments[0] in WITHOUT_TRAINER else "cli"
    import_module(f"spo_lightning.{module}").run()


if __name__ == "__main__":
    main()
