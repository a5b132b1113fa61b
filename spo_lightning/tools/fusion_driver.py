"""The script that SandboxFusion runs in place of a program: it runs the program, as it is written, and reports.

It is sent as text, so it imports nothing of this package, and keeps to what Python 3.8 knows.
"""

from __future__ import annotations

import ast
import json
import linecache
import os
import sys
import traceback
import types
from typing import Any

PROGRAM_FILE = ".spo_program"
REPORT_FILE = ".spo_report"
NAME = "<code>"
MOST_VALUE_CHARS = 2**20


def run(source: str, namespace: dict[str, Any]) -> Any:
    """Run a program. Returns the value of its last statement when that is a bare expression, else ``None``."""
    tree = ast.parse(source, NAME)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NAME, "exec", dont_inherit=True), namespace)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), NAME, "eval"), namespace)


def show(error: BaseException) -> None:
    """Print an exception as Python does, without the frames of this script."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != NAME:
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames)


def exit_status(error: SystemExit) -> int:
    """The process's exit status for what ``sys.exit`` was called with."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def main() -> None:
    """Run the program, write the report, and end the process with all threads that the program has left."""
    report_path = os.path.abspath(REPORT_FILE)
    with open(PROGRAM_FILE, "rb") as file:
        source = file.read().decode("utf-8", "surrogatepass")
    os.remove(PROGRAM_FILE)
    linecache.cache[NAME] = (len(source), None, source.splitlines(True), NAME)
    for library in ("OMP", "OPENBLAS", "MKL"):  # the stack of each thread counts in the memory limit
        os.environ.setdefault(library + "_NUM_THREADS", "1")
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    report: dict[str, Any] = {"value": None, "ending": "ok"}
    status = 1
    try:
        try:
            value = run(source, program.__dict__)
            report["value"] = None if value is None else repr(value)[:MOST_VALUE_CHARS]
            status = 0
        except SystemExit as error:
            status = exit_status(error)
        except BaseException as error:  # whatever a program raises ends it, and nothing else
            report["ending"] = "memory" if isinstance(error, MemoryError) else "error"
            show(error)
        with open(report_path, "w") as report_file:
            json.dump(report, report_file)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status & 0xFF)


if __name__ == "__main__":
    main()
