"""The shipped overlays of the in-process engines; vLLM itself is not needed to read them."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from spo_lightning.cli import SPOCLI
from spo_lightning.rollouts import TransformersEngine
from spo_lightning.rollouts.vllm_engine import VLLMEngine

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "engine"), [("transformers", TransformersEngine), ("vllm", VLLMEngine)])
def test_engine_overlays_compose_with_the_quickstart(name: str, engine: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    cli = SPOCLI(["--config=configs/quickstart.yaml", f"--config=configs/engine/{name}.yaml"], run=False)
    assert type(cli.model.engine) is engine
    assert cli.model.sampling.max_tokens == 48


def test_the_vllm_overlay_shows_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    cli = SPOCLI(["--config=configs/quickstart.yaml", "--config=configs/engine/vllm.yaml"], run=False)
    shown = vars(cli.config.model.engine.init_args)
    defaults = {name: p.default for name, p in inspect.signature(VLLMEngine).parameters.items()}
    assert {**shown, "engine_args": shown["engine_args"] or None} == defaults
