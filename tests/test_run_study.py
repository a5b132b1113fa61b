"""The driver of the study, with a stand-in for the program that it starts: who is run, with what, and what is kept."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
STAND_IN = """#!{python}
import json, os, pathlib, signal, sys, time
here = pathlib.Path({folder!r})
arguments = sys.argv[3:]
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps(arguments) + "\\n")
if "fit" in arguments:
    root = pathlib.Path(arguments[arguments.index("--trainer.default_root_dir") + 1])
    (root / "mlflow_run.json").write_text(json.dumps(dict(run_id=root.name)))
    if (here / "wait").exists():
        signal.signal(signal.SIGTERM, lambda *_: ((here / "told").touch(), sys.exit(143)))
        (here / "pid").write_text(str(os.getpid()))
        time.sleep(60)
if "estimate" in arguments:
    pathlib.Path(arguments[arguments.index("--output") + 1]).touch()
sys.exit(7 if (here / "fail").exists() and "fit" in arguments else 0)
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_study", ROOT / "scripts" / "run_study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_study", module)
    spec.loader.exec_module(module)
    program = tmp_path / "python"
    program.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module.sys, "executable", str(program))
    monkeypatch.setattr(module, "POLL_S", 0.01)
    return module


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def test_every_run_once_and_then_the_comparison(study: ModuleType, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seeds": 2, "algorithms": ["spo", "grpo"], "extra": ["--data.batch_size=8"]}
    main(study, tmp_path / "study", num_iterations=3, **settings)
    found = calls(tmp_path)
    assert [line[0] for line in found] == ["estimate"] * 2 + ["fit"] * 4 + ["compare"]
    runs = {(Path(overlay(line)).stem, line[line.index("--seed_everything") + 1]): line for line in found[2:6]}
    assert set(runs) == {("spo", "0"), ("spo", "1"), ("grpo", "0"), ("grpo", "1")}
    for (name, seed), line in runs.items():
        assert (f"{tmp_path}/study/values_{seed}.parquet" in line) == (name == "spo")
        assert line[line.index("--trainer.logger.init_args.group") + 1] == name
        assert line[line.index("--data.num_iterations") + 1] == "3"
        assert line[-1] == "--data.batch_size=8"

    main(study, tmp_path / "study", num_iterations=3, **settings)
    assert [line[0] for line in calls(tmp_path)[7:]] == ["compare"]
    assert found[6][3:] == ["--runs", "grpo_0", "grpo_1", "spo_0", "spo_1"]
    with pytest.raises(SystemExit, match="is a run with other settings; choose another --output"):
        study.main(tmp_path / "study", num_iterations=4, **settings)


def test_a_study_that_is_told_to_end_ends_its_runs(study: ModuleType, tmp_path: Path) -> None:
    """As a program of its own, because signals go to the main thread."""
    (tmp_path / "wait").touch()
    lines = [
        "import pathlib, sys",
        "sys.path.insert(0, 'scripts')",
        "import run_study",
        f"sys.executable = {study.sys.executable!r}",
        f"run_study.main(pathlib.Path({str(tmp_path / 'study')!r}), seeds=1, algorithms=['grpo'])",
    ]
    driver = subprocess.Popen([sys.orig_argv[0], "-c", "\n".join(lines)], stderr=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists():
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(30) == 143
    assert (tmp_path / "told").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    (tmp_path / "wait").unlink()
    main(study, tmp_path / "study", seeds=1, algorithms=["grpo"])
    assert [line[0] for line in calls(tmp_path)] == ["estimate", "fit", "fit", "compare"]


def main(study: ModuleType, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(SystemExit) as end:
        study.main(*args, **kwargs)
    assert end.value.code == 0


def overlay(line: list[str]) -> str:
    return next(word for word in line if word.startswith("configs/algorithm/"))


def test_a_run_that_fails_ends_the_study_and_goes_on_later(study: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    with pytest.raises(RuntimeError, match=r"grpo_0 ended with status 7; see .*grpo_0/log.txt"):
        study.main(tmp_path / "study", seeds=1, jobs=1, algorithms=["grpo", "rloo"])
    assert [line[0] for line in calls(tmp_path)] == ["estimate", "fit"]
    (tmp_path / "fail").unlink()
    main(study, tmp_path / "study", seeds=1, jobs=1, algorithms=["grpo", "rloo"])
    later = calls(tmp_path)[2:]
    assert [line[0] for line in later] == ["fit", "fit", "compare"]
    assert all(line[line.index("--ckpt_path") + 1] == "last" for line in later[:2])


def test_unknown_algorithms_are_named_before_anything_runs(study: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no configs/algorithm/gpro.yaml"):
        study.main(tmp_path / "study", algorithms=["spo", "gpro"])
    assert not (tmp_path / "calls.jsonl").exists()
