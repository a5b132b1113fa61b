"""Rows of a prompt data set, from the Hugging Face hub or a local file, as plain Python values.

Hub data sets, folders and Parquet files go through Hugging Face ``datasets`` and ``pyarrow``: their column types are
declared. JSON and CSV files are read with the standard library instead, because type inference changes answers:
``datasets`` reads "025" beside 25 as 25, "2020-01-01" as a time, and 2**99 as a float.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from spo_lightning.errors import raise_problems

Row = dict[str, Any]
_ABSENT = object()
_Table = tuple[Sequence[str], Iterable[Row]]


@dataclass(frozen=True)
class PromptSource:
    r"""Where prompts and their reference answers come from.

    Attributes:
        path: hub name (``org/name``), a local .jsonl, .json, .csv or .parquet file, or a folder that ``datasets`` can
            load. A relative path starts at the current directory.
        name: configuration of a hub data set or folder, e.g. ``en``.
        split: split of a hub data set or folder; ``datasets`` slices such as ``train[:100]`` work. A single file has
            only ``train``.
        prompt_column: column of the problem: text, or a conversation as a list of {role, content} that ends with the
            user. A dot leads into a column of records, here as in the other columns.
        answer_column: column of the reference answer, such as ``answer`` or verl's ``reward_model.ground_truth``: text
            or a number. Numbers become text, whole ones without ".0".
        id_column: column of unique ids; without one the id is a hash of problem and answer.
        value_column: column of a known mean reward in [0, 1] under the initial policy, for ``ValueColumn``; empty
            cells are allowed.
        answer_pattern: regular expression whose first group (or whole match) is the answer, e.g. ``####\s*(.+)$``
            for GSM8K.
        data_dir: sub-folder of a hub data set.
        revision: commit, tag or branch of a hub data set.
        max_rows: read only the first rows.
    """

    path: str
    name: str | None = None
    split: str = "train"
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    id_column: str | None = None
    value_column: str | None = None
    answer_pattern: str | None = None
    data_dir: str | None = None
    revision: str | None = None
    max_rows: int | None = None

    def __post_init__(self) -> None:
        problems = []
        for field in ("path", "split", "prompt_column", "answer_column"):
            if not getattr(self, field):
                problems.append(f"{field} is empty; give it a name")
        if self.max_rows is not None and self.max_rows < 1:
            problems.append(f"max_rows is {self.max_rows}; it must be at least 1, or null for all rows")
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                problems.append(f"answer_pattern {self.answer_pattern!r} is no regular expression: {error}; correct it")
        raise_problems("bad prompt source", problems)

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [c for c in (self.prompt_column, self.answer_column, self.id_column, self.value_column) if c is not None]

    def read(self) -> list[Row]:
        """Read the rows, each with ``columns`` only; an absent cell is ``None``.

        Raises:
            FileNotFoundError: the path looks like a file and there is none.
            ConnectionError: the hub cannot be reached or does not have the data set.
            ValueError: unreadable file, unknown suffix, missing column, no rows, or an option that does not go with a
                single file.
        """
        path = Path(self.path).expanduser()
        if not path.is_file():
            if not path.is_dir() and looks_local(self.path):
                raise _no_such_file(path, ", or give a hub name of the form org/name")
            table = _read_dataset(self, str(path) if path.is_dir() else self.path, _with_records(self.columns))
            return _select(self.path, table, self.columns, self.max_rows)
        given = [f"{k} {getattr(self, k)!r}" for k in ("name", "data_dir", "revision") if getattr(self, k) is not None]
        if self.split != "train":
            given.append(f"split {self.split!r}")
        if given:
            raise ValueError(
                f"{', '.join(given)} given with the single file {self.path}; these choose parts of a hub data set or "
                "folder: remove them, or cut the file with max_rows"
            )
        return read_file(path, self.columns, self.max_rows)


def looks_local(path: str) -> bool:
    """Whether a path was meant as a file, not as a hub name: by a data suffix, or a first ".", "/" or "~"."""
    return Path(path).suffix.lower() in _READERS or path.startswith((".", "/", "~"))


def read_file(path: Path, columns: Sequence[str], max_rows: int | None = None) -> list[Row]:
    """Read ``columns`` of a local .jsonl, .json, .csv or .parquet file; an absent cell is ``None``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable, unknown suffix, missing column or no rows.
    """
    if not path.is_file():
        raise _no_such_file(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path} has the suffix {path.suffix!r}; known are {', '.join(_READERS)}: rename or convert the file"
        )
    return _select(str(path), reader(path, _with_records(columns)), columns, max_rows)


def _no_such_file(path: Path, otherwise: str = "") -> FileNotFoundError:
    return FileNotFoundError(f"{path} does not exist (looked in {Path.cwd()}); correct the path{otherwise}")


def _select(where: str, table: _Table, columns: Sequence[str], max_rows: int | None) -> list[Row]:
    available, rows = table
    if not available:
        raise ValueError(f"{where} has no rows; a data set needs at least one")
    for column in columns:
        if not {column, _record_of(column)} & set(available):
            close = difflib.get_close_matches(column.lower(), [c.lower() for c in available], n=1)
            hint = [c for c in available if close and c.lower() == close[0]]
            remedy = f"did you mean {hint[0]!r}?" if hint else "set the column option to one of these"
            raise ValueError(f"{where} has no column {column!r}; it has {', '.join(map(repr, available))}: {remedy}")
    whole = list(islice(rows, max_rows))
    if not whole:
        raise ValueError(f"{where} has no rows; a data set needs at least one")
    selected: list[Row] = [{} for _ in whole]
    for column in columns:
        path = [column] if column in available else column.split(".")
        cells = [_cell(row, path) for row in whole]
        if column not in available and all(cell is _ABSENT for cell in cells):
            held = next((row[path[0]] for row in whole if row.get(path[0])), None)
            raise ValueError(
                f"{where} has no {column!r}: its column {path[0]!r} holds "
                f"{', '.join(map(repr, held)) if isinstance(held, dict) else 'no records'}; set the column option to "
                "what is there"
            )
        for row, cell in zip(selected, cells, strict=True):
            row[column] = None if cell is _ABSENT else cell
    return selected


def _record_of(column: str) -> str:
    return column.partition(".")[0]


def _with_records(columns: Sequence[str]) -> list[str]:
    """Columns to read so that a column within records of another is there."""
    return list(dict.fromkeys([*columns, *map(_record_of, columns)]))


def _cell(row: Row, path: Sequence[str]) -> Any:
    """The value that a path leads to, through records; ``_ABSENT`` where a record lacks the next name."""
    cell: Any = row
    for name in path:
        cell = cell.get(name, _ABSENT) if isinstance(cell, dict) else _ABSENT
    return cell


def _read_dataset(source: PromptSource, path: str, columns: Sequence[str]) -> _Table:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        dataset = load_dataset(
            path, source.name, split=source.split, data_dir=source.data_dir, revision=source.revision
        )
    except (ConnectionError, DatasetNotFoundError) as error:
        raise ConnectionError(
            f"cannot load {source.path!r} from the Hugging Face hub: {error}. Check name and network; without network, "
            "copy the data to this machine as .jsonl, .json, .csv or .parquet and set path to that file"
        ) from error
    except DatasetsError as error:
        raise ValueError(f"{source.path} cannot be loaded by datasets: {error.__cause__ or error}") from error
    wanted = [c for c in columns if c in dataset.column_names]
    return dataset.column_names, dataset.select_columns(wanted)


def _read_jsonl(path: Path, columns: Sequence[str]) -> _Table:
    available: dict[str, None] = {}
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # includes bytes that are no UTF-8
                raise ValueError(
                    f"{path}, line {number} is not JSON: {error}; each line must be one JSON object"
                ) from error
            rows.append(_keep(record, columns, available, f"{path}, line {number}"))
    return list(available), rows


def _read_json(path: Path, columns: Sequence[str]) -> _Table:
    content = path.read_bytes()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return _read_jsonl(path, columns)
    try:
        records = json.loads(content)
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON: {error}; it must be one array of objects, or one object a line"
        ) from error
    available: dict[str, None] = {}
    rows = [
        _keep(record, columns, available, f"{path}, row {number}") for number, record in enumerate(records, start=1)
    ]
    return list(available), rows


def _keep(record: object, columns: Sequence[str], available: dict[str, None], where: str) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a JSON {type(record).__name__}; each row must be an object with named columns")
    available.update(dict.fromkeys(record))
    return {column: record.get(column) for column in columns}


def _read_csv(path: Path, columns: Sequence[str]) -> _Table:
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            available = list(reader.fieldnames or [])
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():  # more cells, or fewer
                    raise ValueError(
                        f"{path}, row {number} does not have {len(available)} cells like the header; quote cells with "
                        "commas"
                    )
                rows.append({column: row.get(column) for column in columns})
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}, line {reader.reader.line_num} is not CSV in UTF-8: {error}; save it again as such"
            ) from error
    return available, rows


def _read_parquet(path: Path, columns: Sequence[str]) -> _Table:
    from pyarrow import ArrowInvalid, parquet

    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not Parquet: {error}; write it again or correct the suffix") from error
    available = file.schema_arrow.names

    def rows() -> Iterator[Row]:
        for batch in file.iter_batches(columns=[c for c in columns if c in available]):
            yield from batch.to_pylist()

    return available, rows()


_READERS: dict[str, Callable[[Path, Sequence[str]], _Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
