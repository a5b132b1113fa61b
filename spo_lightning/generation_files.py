"""The completions of benchmarks as Parquet files, from which every metric can be computed again without the policy.

While a benchmark runs, every rank writes each of its batches to a part of its own, ``<benchmark>.parts/*.parquet``; at
the end they become one file, ``<benchmark>.parquet``, the same whatever the number of ranks. A crash leaves the parts,
which are read like the whole; the next test moves them aside.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from spo_lightning.distributed import Ranks
from spo_lightning.folders import whole_file

log = logging.getLogger(__name__)

_KEY = b"spo_lightning.generations"
_TYPES = {
    "problem": pyarrow.int64(),
    "sample": pyarrow.int64(),
    "answer_class": pyarrow.int64(),
    "reward": pyarrow.float64(),
    "num_tokens": pyarrow.int64(),
    "tool_turns": pyarrow.int64(),
}
_OPTIONAL = ("sampled_text", "answer", "reward")
INITIAL = "initial"


@dataclass(frozen=True, slots=True)
class BenchmarkRow:
    """One graded completion of a benchmark, a row of its file.

    Attributes:
        problem: ``Prompt.index``.
        sample: number of the completion within its problem, from 0.
        problem_id: ``Prompt.id``.
        prompt: the problem as the data set gives it, without chat template and instruction.
        reference: the gold answer.
        completion: all of it, results of tools included.
        sampled_text: what the policy wrote of it, which is what was graded; ``None`` when that is all of it.
        answer: extracted by the grader; ``None`` when there is none.
        answer_class: equal for equal answers of a problem, from 0; -1 without an answer.
        reward: ``None`` when undecided.
        cause: why it is undecided; empty when decided.
        num_tokens: tokens that the policy sampled.
        finish_reason: "stop" or "length".
        tool_turns: calls of tools that were answered.
    """

    problem: int
    sample: int
    problem_id: str
    prompt: str
    reference: str
    completion: str
    sampled_text: str | None
    answer: str | None
    answer_class: int
    reward: float | None
    cause: str
    num_tokens: int
    finish_reason: str
    tool_turns: int


@dataclass(frozen=True)
class GenerationSettings:
    """Where the completions of a file come from; JSON in the file's metadata.

    Attributes:
        benchmark: its name in the configuration.
        num_samples: completions of each problem.
        num_problems: problems of the benchmark.
        with_tools: whether completions could call tools.
        policy: folder or hub name of the initial policy.
        revision: of a hub policy.
        checkpoint: whose weights answered; ``None`` for the initial policy.
        sampling: ``SamplingParams`` as a dictionary.
        seed: of the run.
        reward: class of the grader.
        source: ``PromptSource`` as a dictionary.
    """

    benchmark: str
    num_samples: int
    num_problems: int
    with_tools: bool
    policy: str
    revision: str | None
    checkpoint: str | None
    sampling: dict[str, Any]
    seed: int
    reward: str
    source: dict[str, Any]


# What the benchmarks of one table share.
_ANSWERED_BY = ("with_tools", "policy", "revision", "checkpoint", "sampling", "seed")

# Text may pass the 2 GiB that a column of plain strings can hold.
_FIELDS = [(f.name, _TYPES.get(f.name, pyarrow.large_string()), f.name in _OPTIONAL) for f in fields(BenchmarkRow)]
_NAMES = [f.name for f in fields(GenerationSettings)]
SCHEMA = pyarrow.schema([pyarrow.field(name, kind, nullable=optional) for name, kind, optional in _FIELDS])


def answered_folder(root: str | Path, stage: str, checkpoint: str | Path | None) -> Path:
    """Where the files of a test or a validation go: ``<root>/generations/<stage>/<what answered>``.

    That is ``initial``, or the name of the checkpoint without its suffix. Links are followed, so that ``last.ckpt``
    stands for the iteration that it is now.

    Args:
        root: of the run, ``trainer.default_root_dir``.
        stage: "test" or "validate".
        checkpoint: a file, or the folder of a run that was sharded; ``None`` for the initial policy.
    """
    answered = INITIAL if checkpoint is None else Path(checkpoint).resolve().name.removesuffix(".ckpt")
    return Path(root, "generations", stage, answered)


class GenerationWriter:
    """Keeps the completions of one benchmark. All processes build one and call ``finish``.

    Parts that an interrupted run left are moved to ``<benchmark>.parts.<time of the last one>``. Its whole file, if
    there is one, stays until this one is whole.

    Args:
        path: the file, on a file system that all ranks share.
        settings: its metadata.
        ranks: the processes of the run.
    """

    def __init__(self, path: Path, settings: GenerationSettings, ranks: Ranks) -> None:
        self.path = path
        self.parts = path.with_suffix(".parts")
        self._schema = _with_settings(settings)
        self._ranks = ranks
        self._rows = self._batches = 0
        if ranks.rank == 0:
            self._set_aside()
            self.parts.mkdir(parents=True)
        ranks.wait()

    def _set_aside(self) -> None:
        if any(self.parts.glob("*.parquet")):
            last = datetime.fromtimestamp(self.parts.stat().st_mtime)
            kept = self.parts.rename(f"{self.parts}.{last:%Y%m%d-%H%M%S-%f}")
            log.warning("completions of an interrupted run moved aside; spo score reads them: %s/*.parquet", kept)
        shutil.rmtree(self.parts, ignore_errors=True)

    def write(self, rows: Sequence[BenchmarkRow]) -> None:
        """Write a batch of this rank, whole problems, at once."""
        if not rows:
            return
        table = pyarrow.Table.from_pylist([asdict(row) for row in rows], schema=self._schema)
        _write(self.parts / f"rank_{self._ranks.rank:05d}_batch_{self._batches:05d}.parquet", table)
        self._rows += len(rows)
        self._batches += 1

    def finish(self) -> Path:
        """Make one file of the parts, in the order of problems and samples.

        Raises:
            RuntimeError: rank 0 does not see what other ranks wrote, or sees what another run wrote.
        """
        written = sum(self._ranks.gather(self._rows))
        if self._ranks.rank == 0:
            parts = sorted(self.parts.glob("*.parquet"))
            table = pyarrow.concat_tables([self._schema.empty_table(), *map(self._own, parts)])
            if len(table) != written:
                raise RuntimeError(
                    f"{self.parts} shows {len(table)} of {written} completions to rank 0; put "
                    "trainer.default_root_dir on a file system that all nodes share"
                )
            _write(self.path, table.sort_by([("problem", "ascending"), ("sample", "ascending")]))
            shutil.rmtree(self.parts)
        self._ranks.wait()
        return self.path

    def _own(self, part: Path) -> pyarrow.Table:
        table = parquet.ParquetFile(part).read()
        settings, theirs = _settings(self._schema), _settings(table.schema)
        if theirs != settings:
            raise RuntimeError(
                f"{part} was written by another run meanwhile, which differs from this one in "
                f"{_differences(theirs, settings, _NAMES)}; run one at a time in a trainer.default_root_dir, and "
                "repeat both"
            )
        return table


def read_generations(paths: Iterable[Path]) -> dict[str, tuple[GenerationSettings, list[BenchmarkRow]]]:
    """Read files of ``GenerationWriter``; parts of one benchmark are put together.

    Returns:
        For each benchmark its settings and its rows by problem and sample.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, files of different runs or policies, a completion that occurs twice, or a
            problem without all of its completions.
    """
    found: dict[str, tuple[Path, GenerationSettings, list[BenchmarkRow]]] = {}
    for path in paths:
        settings, rows = _read(path)
        first, known, before = found.setdefault(settings.benchmark, (path, settings, []))
        _check_alike((first, known), (path, settings), _NAMES)
        _check_alike(next(iter(found.values()))[:2], (path, settings), _ANSWERED_BY)
        before.extend(rows)
    for path, settings, rows in found.values():
        rows.sort(key=lambda row: (row.problem, row.sample))
        _check_complete(path, settings, rows)
    return {name: (settings, rows) for name, (_, settings, rows) in found.items()}


def _check_alike(
    one: tuple[Path, GenerationSettings], other: tuple[Path, GenerationSettings], names: Sequence[str]
) -> None:
    differences = _differences(one[1], other[1], names)
    if differences:
        raise ValueError(
            f"{one[0]} and {other[0]} differ in {differences}; a table is of one policy that answered in one way: "
            "score the files of one run at a time"
        )


def _differences(one: GenerationSettings, other: GenerationSettings, names: Sequence[str]) -> str:
    pairs = [(name, getattr(one, name), getattr(other, name)) for name in names]
    return ", ".join(f"{name} ({a!r} and {b!r})" for name, a, b in pairs if a != b)


def _check_complete(path: Path, settings: GenerationSettings, rows: Sequence[BenchmarkRow]) -> None:
    where = f"{path} (benchmark {settings.benchmark})"
    if not rows:
        raise ValueError(f"{where} holds no completions; run spo test again")
    samples: dict[tuple[int, str], list[int]] = {}
    for row in rows:
        samples.setdefault((row.problem, row.problem_id), []).append(row.sample)
    for (_, problem_id), numbers in samples.items():
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{where}: a completion of problem {problem_id} occurs twice; give each file once")
        if numbers != list(range(settings.num_samples)):
            raise ValueError(
                f"{where}: problem {problem_id} has the samples {numbers}, and should have "
                f"0 to {settings.num_samples - 1}; give the file as spo test wrote it"
            )


def _with_settings(settings: GenerationSettings) -> pyarrow.Schema:
    return SCHEMA.with_metadata({_KEY: json.dumps(asdict(settings)).encode()})


def _settings(schema: pyarrow.Schema) -> GenerationSettings:
    return GenerationSettings(**json.loads(schema.metadata[_KEY]))


def _read(path: Path) -> tuple[GenerationSettings, list[BenchmarkRow]]:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the files in it, {path}/*.parquet")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (looked in {Path.cwd()}); give files that spo test kept")
    try:
        table = parquet.ParquetFile(path).read()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not Parquet: {error}; give files that spo test kept") from error
    has_settings = _KEY in (table.schema.metadata or {})
    if not has_settings or table.schema.remove_metadata() != SCHEMA:
        columns = ", ".join(f"{field.name} {field.type}" for field in table.schema)
        raise ValueError(
            f"{path} is no file of generations: its columns are {columns}, with"
            f"{'' if has_settings else 'out'} settings in the metadata; give files that spo test kept, unchanged"
        )
    return _settings(table.schema), [BenchmarkRow(**row) for row in table.to_pylist()]


def _write(path: Path, table: pyarrow.Table) -> None:
    with whole_file(path) as file:
        parquet.write_table(table, file, compression="zstd")
