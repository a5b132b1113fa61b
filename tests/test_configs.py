"""Every shipped YAML parses and builds what it names."""

import inspect
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from spo_lightning.algorithms import AdvantageEstimator, DriftEstimator, ForgettingRule, PolicyLoss, PromptWeights
from spo_lightning.cli import SPOCLI
from spo_lightning.data.datamodule import SPODataModule
from spo_lightning.module import SPOModule
from spo_lightning.policy import PolicyConfig
from spo_lightning.strategies import FSDP2Strategy

from cpu_fsdp import CPUFSDPStrategy

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.yaml"))
STRATEGIES = {
    "single": SingleDeviceStrategy,
    "ddp": DDPStrategy,
    "fsdp": CPUFSDPStrategy,
    "fsdp2": FSDP2Strategy,
}


def test_there_are_configs():
    assert Path("configs/quickstart.yaml") in CONFIGS


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_config_builds_trainer_module_and_data(config, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    cli = SPOCLI([f"--config={config}", f"--trainer.default_root_dir={tmp_path}"], run=False)
    assert isinstance(cli.model, SPOModule)
    assert isinstance(cli.datamodule, SPODataModule)
    assert cli.model.seed == cli.config["seed_everything"]


def test_every_strategy_overlay_is_tested():
    assert {path.stem for path in (ROOT / "configs" / "strategy").glob("*.yaml")} == set(STRATEGIES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_overlays_compose_with_the_quickstart(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    overlay = tmp_path / "overlay.yaml"
    shipped = (ROOT / "configs" / "strategy" / f"{name}.yaml").read_text()
    # Lightning refuses its own FSDPStrategy, by name, on a machine without GPUs
    overlay.write_text(shipped.replace("lightning.pytorch.strategies.FSDPStrategy", "cpu_fsdp.CPUFSDPStrategy"))
    devices = [] if name == "single" else ["--trainer.devices=2"]
    cli = SPOCLI([f"--config={ROOT / 'configs/quickstart.yaml'}", f"--config={overlay}", *devices], run=False)
    assert type(cli.trainer.strategy) is STRATEGIES[name]
    assert cli.trainer.num_devices == (1 if name == "single" else 2)


TOOLS = sorted(path.stem for path in (ROOT / "configs" / "tools").glob("*.yaml"))


@pytest.mark.parametrize("name", TOOLS)
def test_tool_overlays_reach_module_and_prompts(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    cli = SPOCLI(["--config=configs/quickstart.yaml", f"--config=configs/tools/{name}.yaml"], run=False)
    assert [tool.name for tool in cli.model.tool_use.tools] == ["python"]
    assert cli.model.tool_use.max_turns == 8
    assert cli.datamodule.tool_use is cli.model.tool_use


def test_tools_are_switched_off_from_the_command_line(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    cli = SPOCLI(["--config=configs/quickstart_tools.yaml", "--model.tool_use=null"], run=False)
    assert cli.model.tool_use is cli.datamodule.tool_use is None


@pytest.mark.parametrize(
    ("arguments", "look", "expected"),
    [
        (["--model.loss=CISPOLoss"], lambda cli: type(cli.model.loss).__name__, "CISPOLoss"),
        (["--model.loss=GSPOLoss", "--model.loss.clip_ratio_low=0.1"], lambda cli: cli.model.loss.clip_ratio_low, 0.1),
        (["--model.advantage=TokenNormalized"], lambda cli: type(cli.model.advantage).__name__, "TokenNormalized"),
        (["--model.drift=KLEstimate"], lambda cli: type(cli.model.drift).__name__, "KLEstimate"),
        (["--model.engine=TransformersEngine"], lambda cli: type(cli.model.engine).__name__, "TransformersEngine"),
        (
            ["--model.engine=TransformersEngine", "--model.engine.max_batch_size=7"],
            lambda cli: cli.model.engine.max_batch_size,
            7,
        ),
        (["--model.reward=ExactMatchReward"], lambda cli: type(cli.model.reward).__name__, "ExactMatchReward"),
        (
            ["--data.forgetting=ConstantForgetting", "--data.forgetting.factor=0.9"],
            lambda cli: cli.datamodule.value_start is not None,
            True,
        ),
        (
            ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.5"],
            lambda cli: cli.model.optimizer_factory([_parameter()]).defaults["lr"],
            0.5,
        ),
        (
            ["--model.lr_scheduler=LinearLR", "--model.lr_scheduler.total_iters=9"],
            lambda cli: cli.model.lr_scheduler_factory(_optimizer()).total_iters,
            9,
        ),
        (
            ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"],
            lambda cli: type(cli.trainer.logger).__name__,
            "CSVLogger",
        ),
        (["--trainer.logger=false"], lambda cli: cli.trainer.logger, None),
        (["--trainer.strategy=ddp"], lambda cli: type(cli.trainer.strategy).__name__, "DDPStrategy"),
        (["--seed_everything=7"], lambda cli: cli.model.seed, 7),
        (["--checkpoint.every_n_iterations=3"], lambda cli: cli.trainer.checkpoint_callback.every_n_iterations, 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_seam_is_swapped_from_the_command_line(arguments, look, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    cli = SPOCLI(["--config=configs/quickstart.yaml", f"--trainer.default_root_dir={tmp_path}", *arguments], run=False)
    assert look(cli) == expected


def _parameter():
    import torch

    return torch.nn.Parameter(torch.zeros(1))


def _optimizer():
    import torch

    return torch.optim.SGD([_parameter()], lr=1.0)


def test_later_configs_override_earlier_ones_and_flags_override_both(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model:\n  num_minibatches: 2\n  micro_batch_tokens: 9999\ndata:\n  batch_size: 64\n")
    arguments = ["--config=configs/quickstart.yaml", f"--config={overlay}", "--data.batch_size=32"]
    cli = SPOCLI([*arguments, f"--trainer.default_root_dir={tmp_path}"], run=False)
    assert (cli.model.num_minibatches, cli.model.micro_batch_tokens, cli.datamodule.batch_size) == (2, 9999, 32)
    assert cli.model.sampling.max_tokens == 48


def test_the_learning_rate_is_one_for_language_models_unless_another_is_asked_for(monkeypatch, tmp_path):
    """Torch's own default is a thousand times larger."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    small = tmp_path / "small.yaml"
    small.write_text(
        "model: {policy: {path: configs/quickstart/policy}, reward: ExactMatchReward}\n"
        "data: {num_iterations: 1, train: {path: configs/quickstart/train.jsonl}}\n"
    )
    for arguments, rate in (([], 1e-6), (["--model.optimizer.init_args.lr=0.01"], 0.01)):
        model = SPOCLI([f"--config={small}", *arguments], run=False).model
        assert model.optimizer_factory([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == rate
    own = SPOModule(PolicyConfig("configs/quickstart/policy"), model.reward)
    assert own.optimizer_factory([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 1e-6


def test_a_text_that_begins_with_a_hash_is_no_comment(monkeypatch, tmp_path):
    """Quoted in a file, on the command line, and in the configuration that a run writes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    pattern, prompt = r"####\s*(.+)$", "# Role: solver"
    given, written = tmp_path / "given.yaml", tmp_path / "written.yaml"
    given.write_text(f"data:\n  train:\n    answer_pattern: '{pattern}'\n  system_prompt: '{prompt}'\n")
    quickstart = "--config=configs/quickstart.yaml"
    typed = [f"--data.train.answer_pattern={pattern}", "--data.system_prompt", prompt]
    for arguments in ([f"--config={given}"], typed, [f"--config={written}"]):
        cli = SPOCLI([quickstart, *arguments], run=False)
        train = cli.config.data.train
        assert (train.answer_pattern, cli.config.data.system_prompt) == (pattern, prompt)
        written.write_text(cli.parser.dump(cli.config, skip_link_targets=False))


def test_the_resolved_config_is_a_config(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    reward = ["--model.reward=FunctionReward", "--model.reward.function=runs:digit_share"]
    root = f"--trainer.default_root_dir={tmp_path}"
    first = SPOCLI(["--config=configs/quickstart.yaml", *reward, root], run=False)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(first.parser.dump(first.config, skip_none=False))
    second = SPOCLI([f"--config={resolved}"], run=False)
    assert second.parser.dump(second.config, skip_none=False) == resolved.read_text()
    assert second.model.reward.function("12", "", "") == 1.0


CHOICES = {
    "model.loss": PolicyLoss,
    "model.advantage": AdvantageEstimator,
    "model.drift": DriftEstimator,
    "data.forgetting": ForgettingRule,
    "data.prompt_weights": PromptWeights,
}


@pytest.mark.parametrize(
    ("key", "name"), [(key, cls.__name__) for key, base in CHOICES.items() for cls in base.__subclasses__()]
)
def test_a_class_that_is_chosen_has_the_defaults_of_its_signature(key, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    chosen = SPOCLI(["--config=configs/quickstart.yaml", f"--{key}={name}"], run=False).config
    for part in key.split("."):
        chosen = chosen[part]
    cls = next(cls for cls in CHOICES[key].__subclasses__() if cls.__name__ == name)
    assert chosen.class_path.endswith(f".{name}")
    defaults = {n: p.default for n, p in inspect.signature(cls).parameters.items() if p.default is not p.empty}
    assert {n: chosen.init_args[n] for n in defaults} == defaults


def test_what_was_asked_of_the_class_before_carries_over_and_its_defaults_do_not(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    arguments = ["--model.loss.clip_ratio_low=0.11", "--model.loss=GSPOLoss", "--model.optimizer=torch.optim.SGD"]
    config = SPOCLI(["--config=configs/quickstart.yaml", *arguments], run=False).config
    assert (config.model.loss.init_args.clip_ratio_low, config.model.loss.init_args.clip_ratio_high) == (0.11, 0.0004)
    assert config.model.optimizer.init_args.lr == 1.5e-5
