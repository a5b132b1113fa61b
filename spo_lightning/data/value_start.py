"""Where the tracker's first values come from (SPO Algorithm 2), and the value file that ``spo estimate`` writes."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from spo_lightning.data.prompt_dataset import PromptDataset
from spo_lightning.data.sources import Row, read_file
from spo_lightning.folders import whole_file


@dataclass(frozen=True, slots=True)
class ValueRow:
    """One line of a value file.

    Attributes:
        id: ``Prompt.id``.
        prompt: its text, for people who read the file.
        n: completions whose reward is known; 0 leaves the prompt at the prior.
        reward_sum: sum of their rewards.
    """

    id: str
    prompt: str
    n: int
    reward_sum: float


@dataclass(frozen=True, slots=True, eq=False)
class StartValues:
    """What the initial policy achieved on K prompts of a data set.

    Attributes:
        index: (K,) int64, ``Prompt.index``, each at most once.
        reward_sum: (K,) float64.
        num_samples: (K,) int64, at least 1.
        missing: prompts without a start value; they keep the tracker's prior.
        unmatched: entries of the file that belong to no prompt.
    """

    index: Tensor
    reward_sum: Tensor
    num_samples: Tensor
    missing: int
    unmatched: int = 0

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[int, int, float]], num_prompts: int, unmatched: int = 0) -> StartValues:
        """Build from (index, number of samples, reward sum); rows of 0 samples count as missing."""
        known = [row for row in rows if row[1] > 0]
        return cls(
            index=torch.tensor([index for index, _, _ in known], dtype=torch.int64),
            reward_sum=torch.tensor([reward_sum for _, _, reward_sum in known], dtype=torch.float64),
            num_samples=torch.tensor([n for _, n, _ in known], dtype=torch.int64),
            missing=num_prompts - len(known),
            unmatched=unmatched,
        )


class ValueStart(ABC):
    """A source of start values."""

    @abstractmethod
    def load(self, dataset: PromptDataset) -> StartValues:
        """Find the start values of a data set's prompts.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a malformed entry (which one), or none that belongs to the data set.
        """


class PriorStart(ValueStart):
    """No start values: every prompt begins at the tracker's prior."""

    def load(self, dataset: PromptDataset) -> StartValues:
        """Return no values."""
        return StartValues.from_rows([], len(dataset))


class DrawValues(ValueStart):
    """The run draws completions of every training prompt itself before the first iteration (SPO Algorithm 2).

    Args:
        num_samples: completions per prompt, n0 of the paper.

    Raises:
        ValueError: ``num_samples`` is below 1.
    """

    def __init__(self, num_samples: int = 8) -> None:
        self.num_samples = _at_least_one(num_samples)

    def load(self, dataset: PromptDataset) -> StartValues:
        """Raise RuntimeError: these values exist only once the policy has drawn them."""
        raise RuntimeError(
            "DrawValues has nothing to load; draw the values with the policy and give them to initialize_values"
        )


class ValueColumn(ValueStart):
    """Mean rewards from ``PromptSource.value_column`` of the training data set.

    Args:
        num_samples: completions that each mean stands for.

    Raises:
        ValueError: ``num_samples`` is below 1.
    """

    def __init__(self, num_samples: int = 8) -> None:
        self.num_samples = _at_least_one(num_samples)

    def load(self, dataset: PromptDataset) -> StartValues:
        """Take the column; empty cells are missing."""
        means = dataset.start_values.tolist()
        rows = [
            (index, self.num_samples, mean * self.num_samples)
            for index, mean in enumerate(means)
            if not math.isnan(mean)
        ]
        if not rows:
            raise ValueError(
                "the training data has no start values; set train.value_column to the column that holds them"
            )
        return StartValues.from_rows(rows, len(dataset))


class ValueFile(ValueStart):
    """A value file (columns id, n, reward_sum; prompt is for people), Parquet or JSONL, as ``spo estimate`` writes it.

    Entries are matched by prompt id, so the prompt source must name its prompts as it did when the file was written.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def load(self, dataset: PromptDataset) -> StartValues:
        """Match the file's rows to the data set's ids."""
        positions = {prompt_id: index for index, prompt_id in enumerate(dataset.ids)}
        found: dict[int, tuple[int, int, float]] = {}
        seen: set[str] = set()
        for number, row in enumerate(read_file(Path(self.path).expanduser(), ["id", "n", "reward_sum"]), start=1):
            where = f"{self.path}, row {number}"
            prompt_id = str(row["id"])
            if prompt_id in seen:
                raise ValueError(f"{where}: the id {prompt_id!r} was there before; add up its samples and keep one row")
            seen.add(prompt_id)
            num_samples, reward_sum = _checked(row, where)
            if prompt_id in positions:
                index = positions[prompt_id]
                found[index] = (index, num_samples, reward_sum)
        if not found:
            raise ValueError(
                f"{self.path}: none of its {len(seen)} ids belongs to the {len(dataset)} training prompts; it is the "
                "file of another data set, or id_column has changed since: run `spo estimate` again"
            )
        return StartValues.from_rows(list(found.values()), len(dataset), unmatched=len(seen) - len(found))


class RecipeScores(ValueStart):
    """The JSON of SPO's public recipe: ``{prompt: [score, ...]}``, scores in [0, 1], keyed by the problem's text.

    Keys are compared with ``Prompt.text`` exactly, and after that without surrounding white space.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def load(self, dataset: PromptDataset) -> StartValues:
        """Match the file's keys to the data set's texts."""
        scores = self._read()
        by_stripped = {key.strip(): key for key in scores}
        used: set[str] = set()
        rows = []
        for index, text in enumerate(dataset.texts):
            key = text if text in scores else by_stripped.get(text.strip())
            if key is not None:
                used.add(key)
                rows.append((index, *scores[key]))
        if not rows:
            raise ValueError(
                f"{self.path}: none of its {len(scores)} prompts is among the {len(dataset)} training prompts; it is "
                "the file of another data set, or its keys hold more than the bare problem"
            )
        return StartValues.from_rows(rows, len(dataset), unmatched=len(scores) - len(used))

    def _read(self) -> dict[str, tuple[int, float]]:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist (looked in {Path.cwd()}); correct value_start's path")
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}; it must be one object {{prompt: [scores]}}") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"{path} holds a JSON {type(content).__name__}; it must be one object {{prompt: [scores]}}"
            )
        totals = {}
        for number, (prompt, scores) in enumerate(content.items(), start=1):
            where = f"{path}, entry {number} ({prompt[:40]!r})"
            if not isinstance(scores, list) or not all(isinstance(s, int | float) and 0 <= s <= 1 for s in scores):
                raise ValueError(f"{where} is {str(scores)[:80]}; it must be a list of scores in [0, 1]")
            totals[prompt] = (len(scores), float(sum(scores)))
        return totals


def write_values(path: Path | str, rows: Iterable[ValueRow]) -> None:
    """Write a value file that ``ValueFile`` reads; it appears whole or not at all.

    Args:
        path: target, .parquet or .jsonl; folders are made, an existing file is replaced.
        rows: one per prompt.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"{path} has the suffix {path.suffix!r}; a value file is .parquet or .jsonl")
    records = [asdict(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        if path.suffix == ".parquet":
            _write_parquet(records, file)
        else:
            file.writelines(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def _write_parquet(records: list[Row], file: BinaryIO) -> None:
    import pyarrow
    from pyarrow import parquet

    types = {"id": pyarrow.string(), "prompt": pyarrow.string(), "n": pyarrow.int64(), "reward_sum": pyarrow.float64()}
    parquet.write_table(pyarrow.Table.from_pylist(records, schema=pyarrow.schema(types)), file)


def _checked(row: dict[str, Any], where: str) -> tuple[int, float]:
    num_samples, reward_sum = row["n"], row["reward_sum"]
    if not isinstance(num_samples, int) or num_samples < 0:
        raise ValueError(f"{where}: n is {num_samples!r}; it must be a whole number of samples, 0 or more")
    if not isinstance(reward_sum, int | float) or not math.isfinite(reward_sum):
        raise ValueError(f"{where}: reward_sum is {reward_sum!r}; it must be a finite number")
    return num_samples, float(reward_sum)


def _at_least_one(num_samples: int) -> int:
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    return num_samples
