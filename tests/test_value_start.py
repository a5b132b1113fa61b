"""Start values from value files, a column of the data set, and the public recipe's JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from spo_lightning.data import (
    DrawValues,
    PriorStart,
    PromptDataset,
    PromptFormatter,
    PromptSource,
    RecipeScores,
    StartValues,
    ValueColumn,
    ValueFile,
    ValueRow,
    load_prompts,
    write_values,
)

from tiny_models import make_byte_tokenizer


@pytest.fixture
def dataset(tmp_path: Path) -> PromptDataset:
    rows = [{"id": f"id{i}", "prompt": f" p{i}\n", "answer": i, "mean": m} for i, m in enumerate([0.25, None, 1, 0.0])]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = PromptSource(str(path), id_column="id", value_column="mean")
    return load_prompts(source, PromptFormatter(make_byte_tokenizer()), 100)


def as_dict(start: StartValues) -> dict[int, tuple[int, float]]:
    assert start.index.dtype == torch.int64 and start.reward_sum.dtype == torch.float64
    columns = zip(start.index.tolist(), start.num_samples.tolist(), start.reward_sum.tolist(), strict=True)
    return {index: (n, reward_sum) for index, n, reward_sum in columns}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_value_file_round_trip(tmp_path, dataset, suffix):
    path = tmp_path / "new" / f"values{suffix}"
    rows = [
        ValueRow("id3", "p3", 8, 2.5),
        ValueRow("gone", "é", 4, 1.0),
        ValueRow("id0", "p0", 8, 8.0),
        ValueRow("id1", "p1", 0, 0.0),
    ]
    write_values(path, rows)
    start = ValueFile(str(path)).load(dataset)
    assert as_dict(start) == {3: (8, 2.5), 0: (8, 8.0)}
    assert start.missing == 2  # id2 is not in the file, id1 has no decided completion
    assert start.unmatched == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_value_file_columns_are_public(tmp_path):
    write_values(tmp_path / "v.parquet", [ValueRow("a", "p", 8, 3.0)])
    write_values(tmp_path / "v.jsonl", [ValueRow("a", "p", 8, 3.0)])
    expected = {"id": "a", "prompt": "p", "n": 8, "reward_sum": 3.0}
    assert parquet.read_table(tmp_path / "v.parquet").to_pylist() == [expected]
    assert json.loads((tmp_path / "v.jsonl").read_text()) == expected


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "v.jsonl"
    write_values(path, [ValueRow("a", "p", 8, 3.0)])
    before = path.read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_values(path, [ValueRow("b", "p", 8, 3.0)])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_value_file_of_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match="suffix '.txt'; a value file is .parquet or .jsonl"):
        write_values(tmp_path / "v.txt", [])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("id0", 8, float("inf"))], "row 1: reward_sum is inf; it must be a finite number"),
        ([("id0", 8, float("nan"))], "row 1: reward_sum is nan"),
        ([("id0", 8, None)], "row 1: reward_sum is None"),
        ([("id1", 1, 1.0), ("id0", -1, 0.0)], "row 2: n is -1; it must be a whole number"),
        ([("id0", None, 0.0)], "row 1: n is None"),
        ([("id0", 8, 1.0), ("id0", 8, 1.0)], "row 2: the id 'id0' was there before; add up"),
        (
            [("x", 8, 1.0), ("y", 8, 1.0)],
            "none of its 2 ids belongs to the 4 training prompts.*run `spo estimate` again",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_malformed_value_files(tmp_path, dataset, rows, message, suffix):
    path = tmp_path / f"v{suffix}"
    records = [{"id": i, "n": n, "reward_sum": r} for i, n, r in rows]
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    with pytest.raises(ValueError, match=message) as caught:
        ValueFile(str(path)).load(dataset)
    assert str(path) in str(caught.value)


def test_column_is_a_mean_over_samples(dataset):
    start = ValueColumn(num_samples=4).load(dataset)
    assert as_dict(start) == {0: (4, 1.0), 2: (4, 4.0), 3: (4, 0.0)}
    assert start.missing == 1


def test_column_must_be_named(tmp_path, dataset):
    rows = PromptSource(str(tmp_path / "train.jsonl"))
    with pytest.raises(ValueError, match="no start values; set train.value_column"):
        ValueColumn().load(load_prompts(rows, PromptFormatter(make_byte_tokenizer()), 100))


def test_recipe_scores_are_matched_by_text(tmp_path, dataset):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({" p0\n": [1, 0, 0.5], "p1": [1.0], "other": [0], "p3": []}))
    start = RecipeScores(str(path)).load(dataset)
    assert as_dict(start) == {0: (3, 1.5), 1: (1, 1.0)}
    assert (start.missing, start.unmatched) == (2, 1)


def test_recipe_scores_prefer_the_exact_text(tmp_path, dataset):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"p0": [0, 0], " p0\n": [1]}))
    start = RecipeScores(str(path)).load(dataset)
    assert as_dict(start) == {0: (1, 1.0)} and start.unmatched == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds a JSON list; it must be one object"),
        ("{", "is not JSON"),
        ('{"p0": 1}', r"entry 1 \('p0'\) is 1; it must be a list of scores in \[0, 1\]"),
        ('{"p0": [0], "p1": [NaN]}', r"entry 2 \('p1'\)"),
        ('{"p0": [1.5]}', "entry 1"),
        ('{"p0": ["1"]}', "entry 1"),
        ('{"zzz": [1]}', "none of its 1 prompts is among the 4 training prompts"),
    ],
)
def test_malformed_recipe_scores(tmp_path, dataset, content, message):
    path = tmp_path / "scores.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        RecipeScores(str(path)).load(dataset)


@pytest.mark.parametrize("start", [ValueFile("nowhere.parquet"), RecipeScores("nowhere.json")])
def test_missing_files(dataset, start):
    with pytest.raises(FileNotFoundError, match=r"nowhere\S+ does not exist \(looked in .*\); correct [^,]*$"):
        start.load(dataset)


def test_prior_and_drawn_starts(dataset):
    start = PriorStart().load(dataset)
    assert as_dict(start) == {} and start.missing == 4
    with pytest.raises(RuntimeError, match="nothing to load; draw the values"):
        DrawValues().load(dataset)
    for cls in (DrawValues, ValueColumn):
        with pytest.raises(ValueError, match="num_samples is 0; it must be at least 1"):
            cls(num_samples=0)
