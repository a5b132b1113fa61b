"""Shipped benchmarks, kept completions, intervals, `spo score`: against the hub's shapes, real rows and brute force."""

from __future__ import annotations

import fcntl
import json
import random
import re
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet
from torch import Tensor

from spo_lightning.benchmark_table import render_table
from spo_lightning.callbacks import IterationCheckpoint, RunSummary
from spo_lightning.cli import SPOCLI
from spo_lightning.data import Benchmark, PromptFormatter, PromptSource, ShardedPromptLoader, load_prompts
from spo_lightning.distributed import Ranks
from spo_lightning.errors import ConfigError
from spo_lightning.evaluation import BenchmarkResult, interval_metrics
from spo_lightning.generation_files import (
    SCHEMA,
    BenchmarkRow,
    GenerationSettings,
    GenerationWriter,
    answered_folder,
    read_generations,
)
from spo_lightning.intervals import Estimate, estimate, resampled_means
from spo_lightning.plan_command import PlanCLI
from spo_lightning.rewards import FunctionReward, MathVerifyReward
from spo_lightning.score_command import parser, report, run, score

from runs import digit_share, make_run, write_inputs
from tiny_models import make_byte_tokenizer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "benchmarks"
REAL = ROOT.parent / "shared" / "data" / "benchmarks"
PROBLEMS = {"aime_24": 30, "aime_25": 30, "beyond_aime": 100, "brumo_25": 30, "hmmt_25": 30}
REAL_FILES = {"aime_24": "aime_2024", "aime_25": "aime_2025", "brumo_25": "brumo_2025", "hmmt_25": "hmmt_feb_2025"}

# Configurations


def shipped(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def test_every_benchmark_stands_alone_and_among_the_papers() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*PROBLEMS, "paper"}
    paper = shipped("paper")
    assert list(paper["data"]["benchmarks"]) == list(PROBLEMS)
    for name in PROBLEMS:
        alone = shipped(name)
        assert alone["data"]["benchmarks"] == {name: paper["data"]["benchmarks"][name]}
        assert alone["model"] == paper["model"]
        assert name in (FOLDER / f"{name}.yaml").read_text().splitlines()[1]


@pytest.fixture(scope="module")
def overlaid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """configs/qwen3_8b.yaml under two of the overlays, with a policy that is there."""
    folder = tmp_path_factory.mktemp("policy")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", ["spo"])
        policy = f"--model.policy.path={folder / 'start'}"
        files = {name: f"--config=configs/benchmarks/{name}.yaml" for name in ("hmmt_25", "paper")}
        return {n: PlanCLI(["--config=configs/qwen3_8b.yaml", file, policy]).config for n, file in files.items()}


def test_an_overlay_replaces_the_benchmarks_of_a_run(overlaid: dict[str, Any]) -> None:
    assert list(overlaid["hmmt_25"].data.benchmarks) == ["hmmt_25"]
    config = overlaid["paper"]
    assert list(config.data.benchmarks) == list(PROBLEMS)
    assert {benchmark.num_samples for benchmark in config.data.benchmarks.values()} == {32}
    sampling = config.model.eval_sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.6, 0.95, 20, 32_768)
    assert config.data.train.path == "open-r1/DAPO-Math-17k-Processed"


# Rows as the hub has them: columns and types, by benchmark; the folder stands for the hub's repository.
TEXT, TEXTS, NUMBER = pyarrow.string(), pyarrow.list_(pyarrow.string()), pyarrow.int64()
MATH_ARENA = {"problem_idx": NUMBER, "problem": TEXT, "answer": TEXT, "problem_type": TEXTS}
HUB: dict[str, dict[str, pyarrow.DataType]] = {
    "aime_24": {"ID": TEXT, "Problem": TEXT, "Solution": TEXT, "Answer": NUMBER},
    "aime_25": {"id": NUMBER, "problem": TEXT, "answer": TEXT, "solution": TEXT, "url": TEXT, "year": NUMBER},
    "beyond_aime": {"problem": TEXT, "answer": NUMBER},
    "brumo_25": MATH_ARENA,
    "hmmt_25": MATH_ARENA,
}
CELLS = {TEXT: ["\\frac{1}{2}", "070"], NUMBER: [70, 33], TEXTS: [["Algebra"], ["Number Theory"]]}


def write_hub_folder(folder: Path, split: str, columns: dict[str, Any], config: str | None = None) -> str:
    """Two rows under ``folder``, laid out like a repository of the hub; distinct problems."""
    table = pyarrow.table({name: pyarrow.array(CELLS[kind], kind) for name, kind in columns.items()})
    data = folder / (config or "data")
    data.mkdir(parents=True)
    parquet.write_table(table, data / f"{split}-00000-of-00001.parquet")
    if config is not None:
        header = {"configs": [{"config_name": config, "data_files": [{"split": split, "path": f"{config}/{split}-*"}]}]}
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump(header)}---\n")
    return str(folder)


@pytest.mark.parametrize("name", PROBLEMS)
def test_loaders_read_the_hub_s_columns_and_split(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    benchmark = shipped(name)["data"]["benchmarks"][name]
    split = "test" if name == "beyond_aime" else "train"
    benchmark["source"]["path"] = write_hub_folder(tmp_path / name, split, HUB[name])
    benchmark = Benchmark(PromptSource(**benchmark.pop("source")), **benchmark)
    prompts = load_prompts(benchmark.source, PromptFormatter(make_byte_tokenizer()), 2048)
    answers = CELLS[HUB[name][benchmark.source.answer_column]]
    assert prompts.references == [str(answer) for answer in answers]
    assert prompts.texts == CELLS[TEXT]
    (batch,) = ShardedPromptLoader(name, prompts, benchmark.num_samples, benchmark.problems_per_batch)
    assert (batch.benchmark, len(batch.prompts), batch.num_samples) == (name, 2, 32)


def test_training_rows_of_dapo_s_english_part(
    overlaid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    message = pyarrow.list_(pyarrow.struct({"content": TEXT, "role": TEXT}))
    model = pyarrow.struct({"ground_truth": TEXT, "style": TEXT})
    monkeypatch.setitem(CELLS, message, [[{"content": "Solve.", "role": "user"}]] * 2)
    monkeypatch.setitem(CELLS, model, [{"ground_truth": "34", "style": "rule"}] * 2)
    columns = {"prompt": TEXT, "solution": TEXT, "data_source": TEXT, "source_prompt": message, "reward_model": model}
    folder = write_hub_folder(tmp_path / "dapo", "train", columns, config="en")
    train = overlaid["paper"].data.train
    source = PromptSource(**{**train.as_dict(), "path": folder})
    prompts = load_prompts(source, PromptFormatter(make_byte_tokenizer()), 2048)
    assert (source.name, prompts.texts, prompts.references) == ("en", CELLS[TEXT], CELLS[TEXT])
    with pytest.raises(ValueError, match="cn"):
        replace(source, name="cn").read()


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there; the rows are not part of the project")
def test_real_rows_load_and_their_answers_can_be_graded() -> None:
    references = []
    for name, file in REAL_FILES.items():
        options = shipped(name)["data"]["benchmarks"][name]
        columns = {"prompt_column": "problem", "answer_column": "answer"}  # that publisher's names for AIME 2024
        source = PromptSource(**{**options["source"], **columns, "path": str(REAL / f"{file}.jsonl")})
        prompts = load_prompts(source, PromptFormatter(make_byte_tokenizer()), 10_000)
        loader = ShardedPromptLoader(name, prompts, options["num_samples"], options["problems_per_batch"])
        batches = list(loader)
        assert [len(batch.prompts) for batch in batches] == [8, 8, 8, 6]
        assert len(prompts) == PROBLEMS[name] and prompts.num_merged == 0
        references += prompts.references
    assert len(references) == 120 and "025" in references
    reward = MathVerifyReward(num_workers=1)
    assert reward.check_references(references) == []
    grades = reward.grade([f"\\boxed{{{reference}}}" for reference in references], references, references)
    reward.close()
    assert [grade.value for grade in grades] == [1.0] * 120


# Intervals


def plain_means(scores: list[float], resamples: int, seed: int) -> list[float]:
    """The bootstrap as a loop, with the same draws."""
    count = len(scores)
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed)).tolist()
    return [fmean(scores[i] for i in row) for row in drawn]


def test_resampling_is_the_plain_loop_s_and_draws_the_same_problems_for_all_metrics() -> None:
    avg, maj = [0.0, 0.25, 1.0, 0.5, 0.125], [1.0, 0.0, 1.0, 0.5, 0.0]
    means = resampled_means({"avg": torch.tensor(avg).double(), "maj": torch.tensor(maj).double()}, 50, seed=3)
    assert means["avg"].tolist() == pytest.approx(plain_means(avg, 50, 3), abs=1e-12)
    assert means["maj"].tolist() == pytest.approx(plain_means(maj, 50, 3), abs=1e-12)
    assert resampled_means({"avg": torch.tensor(avg).double()}, 50, seed=4)["avg"].tolist() != means["avg"].tolist()


def random_list(count: int, seed: int) -> Tensor:
    source = random.Random(seed)
    return torch.tensor([source.random() for _ in range(count)], dtype=torch.float64)


def test_intervals_have_the_width_of_the_normal_theory_and_those_of_the_average_of_independent_draws() -> None:
    """A resampled mean has variance (M - 1)/M · s²/M; the average of two benchmarks a quarter of the sum of theirs."""
    scores = {name: {"avg_at_4": random_list(80, 0)} for name in ("a", "b")}  # the same, so that equal draws would show
    found = estimate(scores, resamples=40_000)
    spread = {}
    for name, metrics in scores.items():
        values = metrics["avg_at_4"].tolist()
        spread[name] = (len(values) - 1) / len(values) * variance(values) / len(values)
        assert found[name]["avg_at_4"].value == pytest.approx(fmean(values), abs=1e-15)
    spread["average"] = (spread["a"] + spread["b"]) / 4
    for name, expected in spread.items():
        value, low, high = found[name]["avg_at_4"]
        assert low < value < high
        assert high - low == pytest.approx(2 * 1.959964 * expected**0.5, rel=0.03)
    halves = [found[name]["avg_at_4"].value / 2 for name in scores]
    assert found["average"]["avg_at_4"].value == pytest.approx(sum(halves))


def test_percentiles_by_hand() -> None:
    """Of 1 of 2 problems solved, resampled means are 0, ½ and 1 with chances ¼, ½, ¼: the ends are 0 and 1."""
    halves = {"x": {"avg_at_1": torch.tensor([0.0, 1.0]).double(), "maj_at_1": torch.tensor([1.0, 1.0]).double()}}
    assert estimate(halves) == {"x": {"avg_at_1": Estimate(0.5, 0.0, 1.0), "maj_at_1": Estimate(1.0, 1.0, 1.0)}}


def test_the_average_is_of_what_all_benchmarks_have_in_any_order() -> None:
    few = {"avg_at_2": random_list(7, 2), "pass_at_1": random_list(7, 3)}
    many = {"avg_at_8": random_list(9, 4), "pass_at_1": random_list(9, 5)}
    third = {"avg_at_8": random_list(5, 6), "pass_at_1": random_list(5, 7)}
    found = estimate({"few": few, "many": many, "third": third})
    assert list(found["average"]) == ["pass_at_1"]
    assert estimate({"third": third, "many": many, "few": few}) == found
    tenths = [("a", 0.1), ("b", 0.2), ("c", 0.3)]  # 0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1
    forth = {name: {"avg_at_1": torch.tensor([tenth], dtype=torch.float64)} for name, tenth in tenths}
    back = dict(reversed(forth.items()))
    assert estimate(forth) == estimate(back)
    assert "average" not in estimate({"few": few, "other": {"avg_at_8": many["avg_at_8"]}})


def test_names_of_a_test_s_intervals() -> None:
    estimates = {
        "x": {"avg_at_2": Estimate(0.5, 0.1, 0.9), "pass_at_2": Estimate(0.7, 0.2, 1.0)},
        "average": {"avg_at_2": Estimate(0.6, 0.3, 0.8), "pass_at_2": Estimate(0.8, 0.4, 1.0)},
    }
    assert interval_metrics(estimates, "test") == {
        "test/average/avg_at_2": 0.6,
        "test/average/pass_at_2": 0.8,
        "test/x/avg_at_2_ci_low": 0.1,
        "test/x/avg_at_2_ci_high": 0.9,
        "test/average/avg_at_2_ci_low": 0.3,
        "test/average/avg_at_2_ci_high": 0.8,
    }


def test_table() -> None:
    ones, halves = torch.ones(2).double(), torch.full((3,), 0.5).double()
    results = {
        "easy": BenchmarkResult({"avg_at_2": ones, "maj_at_2": ones, "pass_at_1": ones}, {"mean_length": 1234.5}),
        "hard": BenchmarkResult({"avg_at_2": halves, "maj_at_2": halves}, {"mean_length": 2.0, "clipped_ratio": 0.25}),
    }
    assert render_table(results).splitlines()[:6] == [
        "| (problems)  |             easy (2) |          hard (3) |           average |",
        "| ----------- | -------------------: | ----------------: | ----------------: |",
        "| maj@2       | 100.0 [100.0, 100.0] | 50.0 [50.0, 50.0] | 75.0 [75.0, 75.0] |",
        "| avg@2       | 100.0 [100.0, 100.0] | 50.0 [50.0, 50.0] | 75.0 [75.0, 75.0] |",
        "| pass@1      | 100.0 [100.0, 100.0] |                   |                   |",
        "| mean length |              1,234.5 |               2.0 |                   |",
    ]
    assert "| clipped     |                      |              25.0 |                   |" in render_table(results)
    assert "average" not in render_table({"easy": results["easy"]})


# Files

SETTINGS = GenerationSettings("b", 2, 3, False, "some/policy", None, None, {"temperature": 0.6}, 0, "R", {"path": "x"})


def row(problem: int, sample: int, **changes: Any) -> BenchmarkRow:
    values: dict[str, Any] = {"answer": "7", "answer_class": 0, "reward": 1.0, "cause": "", "sampled_text": None}
    values |= {"num_tokens": 3, "finish_reason": "stop", "tool_turns": 0, "completion": "it is \\boxed{7}"}
    values |= {"problem_id": f"p{problem}", "prompt": "3 + 4?", "reference": "7"}
    return BenchmarkRow(problem, sample, **{**values, **changes})


ROWS = [
    row(0, 0),
    row(0, 1, reward=None, cause="timeout", answer="é"),
    row(1, 0, answer=None, answer_class=-1, reward=0.0, finish_reason="length", sampled_text="x", tool_turns=2),
    row(1, 1, num_tokens=9),
    row(2, 0, answer_class=0, reward=0.0, answer="8"),
    row(2, 1, answer_class=1),
]


def test_rows_come_back_from_parts_and_from_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "b.parquet"
    writer = GenerationWriter(path, SETTINGS, Ranks())
    writer.write(ROWS[4:])
    writer.write([])
    writer.write(ROWS[:2])
    parts = sorted(writer.parts.iterdir())
    assert len(parts) == 2 and not path.exists()
    assert read_generations(parts) == {"b": (SETTINGS, [*ROWS[:2], *ROWS[4:]])}
    writer.write(ROWS[2:4])
    assert writer.finish() == path
    assert read_generations([path]) == {"b": (SETTINGS, ROWS)}
    assert parquet.read_table(path)["problem"].to_pylist() == [0, 0, 1, 1, 2, 2]
    assert [entry.name for entry in path.parent.iterdir()] == ["b.parquet"]


def test_an_interrupted_test_leaves_the_file_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "b.parquet"
    first = GenerationWriter(path, SETTINGS, Ranks())
    first.write(ROWS)
    first.finish()
    interrupted = GenerationWriter(path, SETTINGS, Ranks())
    cut_short = [replace(r, num_tokens=1) for r in ROWS[:2]]
    interrupted.write(cut_short)
    assert read_generations([path])["b"][1] == ROWS
    last = GenerationWriter(path, replace(SETTINGS, seed=5), Ranks())
    assert list(last.parts.iterdir()) == []
    last.write(ROWS[:4])
    last.finish()
    assert read_generations([path]) == {"b": (replace(SETTINGS, seed=5), ROWS[:4])}
    (aside,) = tmp_path.glob("b.parts.*")
    assert read_generations(aside.iterdir()) == {"b": (SETTINGS, cut_short)}
    assert len(list(tmp_path.iterdir())) == 2


def test_every_interrupted_test_is_kept(tmp_path: Path) -> None:
    for seed in range(3):
        GenerationWriter(tmp_path / "b.parquet", replace(SETTINGS, seed=seed), Ranks()).write(ROWS[:2])
    GenerationWriter(tmp_path / "b.parquet", SETTINGS, Ranks())
    GenerationWriter(tmp_path / "b.parquet", SETTINGS, Ranks())  # after one that has written nothing
    kept = [read_generations(folder.iterdir())["b"][0].seed for folder in sorted(tmp_path.glob("b.parts.*"))]
    assert kept == [0, 1, 2]


def test_completions_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    """The other one takes the name of a batch of this one, so that the number of completions is right."""
    writer = GenerationWriter(tmp_path / "b.parquet", SETTINGS, Ranks())
    writer.write(ROWS[:2])
    other = GenerationWriter(tmp_path / "elsewhere.parquet", replace(SETTINGS, seed=7), Ranks())
    other.write(ROWS[:2])
    (part,) = other.parts.iterdir()
    part.replace(writer.parts / part.name)
    with pytest.raises(RuntimeError, match=r"00000.parquet was written by another run .* seed \(7 and 0\); run one at"):
        writer.finish()
    assert not writer.path.exists() and len(list(writer.parts.iterdir())) == 1


def test_files_stand_by_what_answered(tmp_path: Path) -> None:
    folder = tmp_path / "generations" / "test"
    assert answered_folder(tmp_path, "test", None) == folder / "initial"
    (tmp_path / "iteration-000040.ckpt").mkdir()  # of a run that was sharded
    (tmp_path / "last.ckpt").symlink_to("iteration-000040.ckpt")
    for name in ("iteration-000040.ckpt", "last.ckpt"):
        assert answered_folder(tmp_path, "test", tmp_path / name) == folder / "iteration-000040"
    assert answered_folder(tmp_path, "validate", "lr-0.5") == folder.with_name("validate") / "lr-0.5"


def test_parts_that_rank_0_does_not_see_are_missed(tmp_path: Path) -> None:
    writer = GenerationWriter(tmp_path / "b.parquet", SETTINGS, Ranks())
    writer.write(ROWS[:2])
    writer.write(ROWS[2:])
    next(writer.parts.glob("*00001.parquet")).unlink()
    with pytest.raises(RuntimeError, match="shows 2 of 6 completions to rank 0; put .*default_root_dir"):
        writer.finish()


def write_file(path: Path, rows: list[BenchmarkRow], settings: GenerationSettings = SETTINGS) -> Path:
    writer = GenerationWriter(path, settings, Ranks())
    writer.write(rows)
    return writer.finish()


def test_bad_files_are_refused(tmp_path: Path) -> None:
    good = write_file(tmp_path / "good.parquet", ROWS)
    other = write_file(tmp_path / "other.parquet", ROWS, replace(SETTINGS, checkpoint="last.ckpt", seed=1))
    reworded = write_file(tmp_path / "reworded.parquet", ROWS, replace(SETTINGS, source={"path": "y"}))
    torn = write_file(tmp_path / "torn.parquet", ROWS[:3])
    empty = write_file(tmp_path / "empty.parquet", [])
    (tmp_path / "text.parquet").write_text("no Parquet")
    parquet.write_table(pyarrow.table({"id": ["x"]}), tmp_path / "values.parquet")
    table = parquet.read_table(good)
    parquet.write_table(table.drop_columns(["cause"]), tmp_path / "less.parquet")
    cases = [
        ([good, good], "problem p0 occurs twice; give each file once"),
        (
            [good, other],
            r"differ in checkpoint \(None and 'last.ckpt'\), seed \(0 and 1\); .*score the files of one run",
        ),
        ([good, reworded], r"differ in source \(.*'x'.*'y'.*\)"),
        ([torn], r"problem p1 has the samples \[0\], and should have 0 to 1"),
        ([empty], "holds no completions; run spo test again"),
        ([tmp_path / "text.parquet"], "is not Parquet: .*; give files that spo test kept"),
        ([tmp_path / "values.parquet"], "its columns are id string, without settings in the metadata"),
        ([tmp_path / "less.parquet"], "its columns are problem int64, .*with settings in the metadata"),
    ]
    for paths, message in cases:
        with pytest.raises(ValueError, match=message):
            read_generations(paths)
    with pytest.raises(FileNotFoundError, match="none.parquet does not exist"):
        read_generations([tmp_path / "none.parquet"])
    with pytest.raises(IsADirectoryError, match=rf"is a folder; give the files in it, {tmp_path}/\*.parquet"):
        read_generations([tmp_path])
    assert parquet.read_schema(good).remove_metadata() == SCHEMA


@pytest.mark.parametrize(
    ("name", "value", "alike"),
    [
        ("with_tools", True, False),
        ("policy", "other/policy", False),
        ("revision", "main", False),
        ("checkpoint", "last.ckpt", False),
        ("sampling", {"temperature": 1.0}, False),
        ("seed", 1, False),
        ("num_problems", 30, True),
        ("source", {"path": "y"}, True),
    ],
)
def test_benchmarks_of_a_table_are_of_one_policy(tmp_path: Path, name: str, value: Any, alike: bool) -> None:
    first = write_file(tmp_path / "b.parquet", ROWS)
    changed: Any = {"benchmark": "c", name: value}
    second = write_file(tmp_path / "c.parquet", ROWS, replace(SETTINGS, **changed))
    if alike:
        assert list(read_generations([first, second])) == ["b", "c"]
        return
    words = re.escape(
        f"{first} and {second} differ in {name} ({getattr(SETTINGS, name)!r} and {value!r}); a table is of"
    )
    with pytest.raises(ValueError, match=words):
        read_generations([first, second])


# spo test and spo score


def test_scores_by_hand() -> None:
    """Problem 0: one answer, once right and once undecided; 1: right and no answer; 2: a tie of right and wrong."""
    result = score({"b": (SETTINGS, ROWS)})["b"]
    assert result.scores["avg_at_2"].tolist() == [0.5, 0.5, 0.5]
    assert result.scores["maj_at_2"].tolist() == [1.0, 1.0, 0.5]
    assert result.scores["pass_at_2"].tolist() == [1.0, 1.0, 1.0]
    assert result.means == {"mean_length": 4.0, "clipped_ratio": 1 / 6, "undecided_ratio": 1 / 6}
    with_tools = score({"b": (replace(SETTINGS, with_tools=True), ROWS)})["b"]
    assert with_tools.means["tool_turns"] == 2 / 6


def spo_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, benchmarks: dict[str, Any], job: str = "test") -> SPOCLI:
    overlay = tmp_path / "benchmarks.yaml"
    overlay.write_text(yaml.safe_dump({"data": {"benchmarks": benchmarks}}))
    monkeypatch.chdir(ROOT)
    files = ["--config=configs/quickstart.yaml", f"--config={overlay}"]
    folder = [f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=CSVLogger"]
    monkeypatch.setattr("sys.argv", ["spo", job, *files, *folder, f"--trainer.logger.save_dir={tmp_path}"])
    return SPOCLI()


def small(rows: int, **options: Any) -> dict[str, Any]:
    source = {"path": "configs/quickstart/val.jsonl", "prompt_column": "problem", "id_column": "id", "max_rows": rows}
    return {"source": source, "num_samples": 4, **options}


def markdown(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_a_test_keeps_its_completions_and_score_repeats_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = spo_run(monkeypatch, tmp_path, {"nine": small(9, problems_per_batch=4), "twelve": small(12)})
    printed = capsys.readouterr().out
    files = sorted((tmp_path / "generations" / "test" / "initial").iterdir())
    assert [file.name for file in files] == ["nine.parquet", "twelve.parquet"]
    assert f"{tmp_path}/generations/test/initial/*.parquet" in printed

    table = parquet.read_table(files[0]).to_pylist()
    assert [(r["problem"], r["sample"]) for r in table] == [(p, s) for p in range(9) for s in range(4)]
    prompts = list(cli.datamodule.benchmark_prompts["nine"])
    assert [r["problem_id"] for r in table[::4]] == [prompt.id for prompt in prompts]
    assert [(r["prompt"], r["reference"]) for r in table[::4]] == [(p.text, p.reference) for p in prompts]
    assert all(r["num_tokens"] > 0 and r["tool_turns"] == 0 for r in table)
    logged = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    rewards = [r["reward"] for r in table]
    assert 0 < fmean(rewards) < 1
    assert logged["test/nine/avg_at_4"] == pytest.approx(fmean(rewards), abs=1e-6)
    assert logged["test/nine/mean_length"] == pytest.approx(fmean(r["num_tokens"] for r in table))
    average = (logged["test/nine/maj_at_4"] + logged["test/twelve/maj_at_4"]) / 2
    assert logged["test/average/maj_at_4"] == pytest.approx(average)
    ends = [logged[f"test/average/avg_at_4_ci_{end}"] for end in ("low", "high")]
    assert ends[0] < logged["test/average/avg_at_4"] < ends[1]
    settings = json.loads(parquet.read_schema(files[0]).metadata[b"spo_lightning.generations"])
    assert (settings["policy"], settings["checkpoint"]) == ("configs/quickstart/policy", None)
    assert settings["sampling"] == json.loads(json.dumps(asdict(cli.model.eval_sampling)))

    again = {name: result.scores for name, result in score(read_generations(files)).items()}
    for name, result in cli.model.benchmark_results.items():
        assert {k: v.tolist() for k, v in again[name].items()} == {k: v.tolist() for k, v in result.scores.items()}
    monkeypatch.setattr("sys.argv", ["spo", "score", *map(str, files)])
    run()
    assert len(markdown(printed)) == 10
    assert markdown(capsys.readouterr().out) == markdown(printed)
    monkeypatch.setattr("sys.argv", ["spo", "score", *map(str, files), "--regrade"])
    run()
    regraded = capsys.readouterr().out
    assert markdown(regraded) == markdown(printed)
    assert "graded again by MathVerifyReward:\nnine: 0 of 36 rewards changed" in regraded


@pytest.mark.parametrize("job", ["test", "validate"])
def test_a_folder_in_use_takes_no_test(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as caught:
            spo_run(monkeypatch, tmp_path, {"nine": small(9)}, job)
    assert caught.value.code == 2
    assert f"another run is using {tmp_path}; wait for it" in capsys.readouterr().err
    assert not (tmp_path / "generations").exists()


def test_a_checkpoint_s_completions_stand_beside_those_of_the_initial_policy(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    benchmark = Benchmark(PromptSource(str(tmp_path / "train.jsonl"), id_column="id", max_rows=3), 2)
    callbacks = [IterationCheckpoint()]
    options: dict[str, Any] = {"data": {"benchmarks": {"b": benchmark}, "num_iterations": 1}}
    trainer, module, data = make_run(tmp_path, callbacks=callbacks, **options, trainer={"enable_checkpointing": True})
    trainer.fit(module, data)
    link = tmp_path / "checkpoints" / "last.ckpt"
    for checkpoint in (None, link):
        trainer, module, data = make_run(tmp_path, **options)
        trainer.test(module, data, ckpt_path=checkpoint)
    files = sorted((tmp_path / "generations" / "test").rglob("*.parquet"))
    assert [file.parent.name for file in files] == ["initial", "iteration-000001"]
    assert [read_generations([file])["b"][0].checkpoint for file in files] == [None, str(link)]


def of_score(*arguments: str) -> str:
    arguments_parser = parser()
    return report(arguments_parser.instantiate(arguments_parser.parse_args(list(arguments))))


def test_regrading_takes_the_reward_it_is_given_and_what_the_policy_wrote(tmp_path: Path) -> None:
    """Of "7777" the policy wrote "xx7", which earns nothing; the other rewards are by the text."""
    texts = [("77", None), ("x", None), ("7777", "xx7"), ("x", None), ("7", None), ("7", None)]
    rows = [replace(r, completion=text, sampled_text=own) for r, (text, own) in zip(ROWS, texts, strict=True)]
    path = write_file(tmp_path / "b.parquet", rows)
    text = of_score(str(path), "--regrade", "--reward=FunctionReward", "--reward.function=runs:digit_share")
    assert "graded again by FunctionReward:\nb: 3 of 6 rewards changed" in text
    assert "| avg@2       | 50.0 [0.0, 100.0] |" in text
    (tmp_path / "reward.yaml").write_text("class_path: FunctionReward\ninit_args: {function: 'runs:digit_share'}")
    assert of_score(str(path), "--regrade", f"--reward={tmp_path / 'reward.yaml'}") == text
    with pytest.raises(ValueError, match="--reward is given .*add --regrade"):
        of_score(str(path), "--reward=ExactMatchReward")


def test_a_part_of_a_benchmark_is_said_to_be_one_and_errors_end_with_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_file(tmp_path / "b.parquet", ROWS[:4])
    assert "b: 2 problems, 2 samples each, by some/policy, which is not all of it: 2 of 3" in of_score(str(path))
    monkeypatch.setattr("sys.argv", ["spo", "score", str(tmp_path / "none.parquet")])
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/none.parquet does not exist")


def test_an_interrupted_test_keeps_its_finished_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graded = []

    def breaks(completion: str, reference: str, prompt: str) -> float:
        graded.append(completion)
        if len(graded) > 9:
            raise RuntimeError("grader lost")
        return 1.0

    write_inputs(tmp_path)
    benchmark = Benchmark(PromptSource(str(tmp_path / "train.jsonl"), max_rows=6), 2, problems_per_batch=2)
    trainer, module, data = make_run(tmp_path, breaks, [RunSummary()], data={"benchmarks": {"six": benchmark}})
    with pytest.raises(RuntimeError, match="grader lost"):
        trainer.test(module, data)
    folder = tmp_path / "generations" / "test" / "initial"
    assert f"spo score reads them: {folder}/*.parts/*.parquet" in capsys.readouterr().out
    parts = sorted(map(str, folder.glob("*.parts/*.parquet")))
    assert len(parts) == 2
    text = of_score(*parts)
    assert f"six: 4 problems, 2 samples each, by {tmp_path}/start, which is not all of it: 4 of 6" in text


def test_validation_within_fit_keeps_nothing_and_logs_no_intervals(tmp_path: Path) -> None:
    source = PromptSource(str(tmp_path / "train.jsonl"), id_column="id", max_rows=3)
    benchmarks = {"average": Benchmark(source, 2), "b": Benchmark(source, 2)}
    trainer, module, data = make_run(
        tmp_path, data={"benchmarks": benchmarks, "num_iterations": 1}, trainer={"val_check_interval": 1}
    )
    trainer.fit(module, data)
    names = {name for name in trainer.callback_metrics if name.startswith("val/")}
    metrics = {"avg_at_2", "maj_at_2", "pass_at_1", "pass_at_2", "mean_length", "clipped_ratio", "undecided_ratio"}
    assert names == {f"val/{benchmark}/{metric}" for benchmark in benchmarks for metric in metrics}
    assert not (tmp_path / "generations").exists()
    with pytest.raises(ConfigError, match="a benchmark is called average, .*rename it"):
        trainer.validate(module, data)
    data.benchmark_prompts.clear()
    data.benchmarks = {"b": benchmarks["b"]}
    trainer.validate(module, data)
    (settings, rows) = read_generations([tmp_path / "generations" / "validate" / "iteration-000001" / "b.parquet"])["b"]
    assert len(rows) == 6 and settings.reward == FunctionReward.__name__
    assert [r.reward for r in rows] == [digit_share(r.completion, "", "") for r in rows]
