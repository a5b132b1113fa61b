"""The process that runs a program nobody trusts. Its supervisor believes nothing that it says."""

from __future__ import annotations

import ast
import linecache
import os
import random
import resource
import select
import signal
import sys
import traceback
from contextlib import suppress
from types import CodeType, ModuleType
from typing import NoReturn

from spo_lightning.tools import sandbox_kernel as kernel
from spo_lightning.tools.sandbox_limits import FILENAME, Limits

VALUE = b"v"  # begins a report with the repr of the last expression
MEMORY = b"m"  # is the report of a program that ran out of memory
REPORT = 3  # file descriptor of the report

_SEED = 0
_STACK_BYTES = 8 << 20
_OPEN_FILES = 256
_PENDING_SIGNALS = 64
_LAST_WORDS_BYTES = 32 << 20  # more memory for the traceback of a MemoryError
_FIRST_AID_BYTES = 1 << 20
_DEEP_SOURCE = 3  # the parser's tree may be that much deeper than calls, as it is when source is compiled directly


def run_program(source: str, limits: Limits, base_bytes: int, instructions: bytes, scratch: str) -> NoReturn:
    """Give up all rights, run the program and end this process.

    Stdin, stdout, stderr and the report are open as files 0 to 3; every other file is closed.

    Args:
        source: of the program.
        limits: of the program.
        base_bytes: address space of the process before the program.
        instructions: the filter of system calls; empty without isolation.
        scratch: directory of the program.
    """
    status = 1
    try:
        _prepare(limits, base_bytes, scratch)
        if limits.isolated:
            kernel.set_no_new_privileges()
            kernel.drop_capabilities()
            kernel.set_dumpable(False)
        kernel.die_with_parent()
        _exit_without_supervisor()
        if limits.isolated:
            kernel.load_filter(instructions)
        status = _run(source)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _prepare(limits: Limits, base_bytes: int, scratch: str) -> None:
    os.closerange(REPORT + 1, 1 << 20)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(scratch)
    os.environ.update({"HOME": scratch, "TMPDIR": scratch, "PWD": scratch})
    memory = base_bytes + limits.memory_bytes
    bounds = {
        resource.RLIMIT_AS: (memory, memory + _LAST_WORDS_BYTES),
        resource.RLIMIT_CPU: (limits.cpu_time_s, limits.cpu_time_s),
        resource.RLIMIT_FSIZE: (limits.scratch_bytes, limits.scratch_bytes),
        resource.RLIMIT_STACK: (_STACK_BYTES, _STACK_BYTES),
        resource.RLIMIT_NOFILE: (_OPEN_FILES, _OPEN_FILES),
        resource.RLIMIT_SIGPENDING: (_PENDING_SIGNALS, _PENDING_SIGNALS),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
    }
    if limits.isolated:  # else the count would be of all processes of this user
        threads = limits.max_threads + 2  # the main thread and the supervisor count too
        bounds[resource.RLIMIT_NPROC] = (threads, threads)
    for name, bound in bounds.items():
        resource.setrlimit(name, bound)


def _exit_without_supervisor() -> None:
    """End here if the supervisor died before it could take this process along: nobody reads the report then."""
    poll = select.poll()
    poll.register(REPORT, 0)
    if poll.poll(0):
        os._exit(1)


def _run(source: str) -> int:
    """Run a program, write its report, and return its exit status."""
    report = b""
    status = 0
    reserve = bytearray(_FIRST_AID_BYTES)
    try:
        value = _evaluate(source)
        report = b"" if value is None else VALUE + value.encode("utf-8", "backslashreplace")
    except SystemExit as stop:
        status = _exit_status(stop)
    except BaseException as error:
        status = 1
        if isinstance(error, MemoryError):
            del reserve  # else the next lines would run out of memory too
            report = MEMORY
            _, most = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        _print_error(error)
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with suppress(BaseException):  # the program may have put anything in its place
            stream.flush()  # type: ignore[union-attr]
    while report:
        report = report[os.write(REPORT, report) :]
    return status


def _evaluate(source: str) -> str | None:
    """Run the source as ``__main__``; the ``repr`` of its last statement's value if that is an expression."""
    source = source.removeprefix("\ufeff")
    module = ModuleType("__main__")
    module.__file__ = FILENAME  # ``inspect`` finds the source of classes by it
    sys.modules["__main__"] = module
    sys.argv = [FILENAME]
    sys.path.insert(0, "")
    lines = [line + "\n" for line in source.split("\n")]
    linecache.cache[FILENAME] = (len(source), None, lines, FILENAME)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # kept when the program is stopped
    random.seed(_SEED)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(_SEED)
    body, last = _compile(source)
    exec(body, module.__dict__)
    value = None if last is None else eval(last, module.__dict__)
    return None if value is None else repr(value)


def _compile(source: str) -> tuple[CodeType, CodeType | None]:
    depth = sys.getrecursionlimit()
    sys.setrecursionlimit(_DEEP_SOURCE * depth)
    try:
        tree = ast.parse(source, FILENAME)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        body = compile(tree, FILENAME, "exec", dont_inherit=True)
        if not isinstance(last, ast.Expr) or _silenced(source, last):
            return body, None
        return body, compile(ast.Expression(last.value), FILENAME, "eval", dont_inherit=True)
    except MemoryError:  # the parser's word for its own limit
        raise RecursionError("the source is nested too deeply, or too long") from None
    finally:
        sys.setrecursionlimit(depth)


def _silenced(source: str, last: ast.Expr) -> bool:
    """Whether a semicolon follows the last expression, which hides its value in a notebook."""
    line = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")[(last.end_lineno or 1) - 1]
    return line.encode()[last.end_col_offset :].lstrip().startswith(b";")


def _exit_status(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return int.__and__(stop.code, 0xFF)  # not by a method of the program's
    with suppress(BaseException):  # the object is the program's, and so may stderr be
        print(stop.code, file=sys.stderr)
    return 1


def _print_error(error: BaseException) -> None:
    """Print a traceback that begins with the program's own first line."""
    first = error.__traceback__
    while first is not None and first.tb_frame.f_code.co_filename != FILENAME:
        first = first.tb_next
    traceback.print_exception(error.with_traceback(first))
