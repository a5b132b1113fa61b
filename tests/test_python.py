"""The package as a library: names at its top, and the programs that docs/python.md shows."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_docs import blocks
from transformers import AutoModelForCausalLM

import spo_lightning
from spo_lightning import rewards, tools

from runs import make_run

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", [spo_lightning, rewards, tools])
def test_every_name_that_is_offered_is_there(package):
    assert sorted(package.__all__) == sorted(package._MODULES)
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'Nothing'; it offers "):
        package.Nothing  # noqa: B018


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, spo_lightning; assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_programs_of_the_documentation_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr("sys.argv", ["notebook"])
    configured, assembled, _ = blocks(ROOT / "docs" / "python.md", "python")
    first: dict[str, object] = {}
    exec(configured, first)
    assert first["cli"].trainer.datamodule.sampler.iteration == 3
    exec(assembled, {})
    start = AutoModelForCausalLM.from_pretrained("configs/quickstart/policy").state_dict()
    for folder in ("runs/python", "runs/parts"):
        assert Path(folder, "checkpoints", "last.ckpt").exists() and Path(folder, "mlflow_run.json").exists()
        trained = AutoModelForCausalLM.from_pretrained(Path(folder, "policy")).state_dict()
        assert any(not torch.equal(start[name], value) for name, value in trained.items())


def test_the_callback_of_the_documentation_logs_and_ends_a_run(tmp_path):
    *_, callback = blocks(ROOT / "docs" / "python.md", "python")
    names: dict[str, object] = {}
    exec(callback, names)
    for tokens, iterations in ((9.0, 1), (0.0, 3)):  # of 8 that a completion has at most
        trainer, module, data = make_run(tmp_path, lambda *_: 1.0, [names["StopWhenShort"](tokens)])
        trainer.fit(module, data)
        assert module.iterations_done == iterations
        assert 0 < float(trainer.callback_metrics["my/right_length"]) <= 8


def test_a_trainer_drops_what_lightning_says_of_itself_and_nothing_else(tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        spo_lightning.SPOTrainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
        seen.clear()
        for text in ("`isinstance(x, LeafSpec)` is deprecated", "Total length of `list` across ranks is zero", "mine"):
            warnings.warn(text, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["mine"]
