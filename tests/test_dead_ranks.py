"""When a rank dies the run ends, with the cause on the terminal, and nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from lightning.pytorch.utilities import rank_zero_only

from spo_lightning import cli

from launched_runs import PATIENCE, LaunchedRun

FOREVER = "--data.num_iterations=100000"
CONNECTION_LOST = "Connection (closed|reset) by peer"  # reset where the dead process had not read everything


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_rank_one_is_killed(tmp_path, strategy):
    with LaunchedRun(tmp_path, FOREVER, strategy=strategy) as run:
        run.wait_for_iterations(1)
        victim = run.rank_one
        os.kill(victim, signal.SIGKILL)
        assert run.wait_for_end() != 0
        assert re.search(rf"PID {victim} terminated with code -9|{CONNECTION_LOST}", run.output)


def test_rank_zero_is_killed(tmp_path):
    with LaunchedRun(tmp_path, FOREVER) as run:
        run.wait_for_iterations(1)
        os.kill(run.process.pid, signal.SIGKILL)
        assert run.wait_for_end() == -signal.SIGKILL
        assert re.search(rf"has died|{CONNECTION_LOST}", run.output)


def test_one_rank_raises(tmp_path):
    with LaunchedRun(tmp_path, FOREVER, reward="broken_on_rank_one") as run:
        assert run.wait_for_end() != 0
        assert "[rank1]: ArithmeticError: this reward is broken" in run.output


CHILD = """
import sys, time
from spo_lightning import launched
launched.POLL_S, launched.GRACE_S = 0.05, float(sys.argv[1])
with launched.ending_with_launcher():
    print("started", flush=True)
    time.sleep(float(sys.argv[2]))
print("finished", flush=True)
"""
PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]); time.sleep(1000)"


@pytest.mark.parametrize(
    ("local_rank", "grace", "seconds", "ends"),
    [("3", 0.2, 1000.0, True), ("3", 1000.0, 1.0, False), (None, 0.2, 1.5, False)],
    ids=["a rank", "a rank about to end", "no rank"],
)
def test_a_rank_ends_after_the_process_that_started_it(local_rank, grace, seconds, ends):
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, str(grace), str(seconds)],
        env=environment | ({} if local_rank is None else {"LOCAL_RANK": local_rank}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout.readline() == "started\n"
    parent.kill()
    output, errors = parent.communicate(timeout=PATIENCE)  # the pipes are the child's too: this waits for its end
    assert output == ("" if ends else "finished\n")
    assert (f"local rank 3 ends: its launcher, process {parent.pid}, has died" in errors) == ends


def test_messages_of_other_ranks_are_marked(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        cli._fail("no such file")
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    with pytest.raises(SystemExit):
        cli._fail("no such file")
    assert capsys.readouterr().err == "error: no such file\n[rank 3] error: no such file\n"
