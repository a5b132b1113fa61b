"""Runs model-written Python on this machine, shut off from it by Linux namespaces, limits and a system-call filter."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Sequence

from spo_lightning.errors import ConfigError
from spo_lightning.tools.protocol import CodeRunner, Execution
from spo_lightning.tools.sandbox_check import check_isolation
from spo_lightning.tools.sandbox_limits import PRELOAD, Limits, unavailable
from spo_lightning.tools.sandbox_process import Zygote, ZygoteGone

_TRIES = 2
_RANGES = {  # of whole numbers, both ends included
    "max_workers": (1, 4096),
    "cpu_time_s": (1, 86400),
    "memory_bytes": (16 << 20, 1 << 42),
    "scratch_bytes": (4096, 1 << 42),
    "max_output_bytes": (256, 1 << 30),
    "max_threads": (0, 4096),
}
_WALL_TIMES_S = (0.1, 86400.0)


class LocalSandbox(CodeRunner):
    """Runs programs in fresh processes of this machine that see no network, no files and no other process.

    Programs are forked from a process that has the preloaded modules imported, so that a call takes milliseconds.
    ``docs/sandbox.md`` says what keeps programs in, what each environment must allow, and what is not protected.

    Args:
        max_workers: most programs at a time; others wait. ``None`` takes the number of CPU cores.
        wall_time_s: seconds of one program, from 0.1 to a day.
        cpu_time_s: whole seconds of one program, all its threads together.
        memory_bytes: of one program, beyond what the interpreter and the preloaded modules take.
        scratch_bytes: of a program's directory, which is its working directory and gone with it.
        max_output_bytes: of stdout, of stderr and of the value; a program that passes it is stopped.
        max_threads: of one program, besides its main thread.
        preload: modules that programs find imported; ``None`` takes ``sandbox_limits.PRELOAD``. Programs can import
            other modules of this interpreter too, and pay for their import.
        unsafe_no_isolation: run programs without isolation, as this user, with limits of time and memory only.

    Raises:
        ValueError: arguments out of range or of another type.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        wall_time_s: float = 10.0,
        cpu_time_s: int = 10,
        memory_bytes: int = 1 << 30,
        scratch_bytes: int = 64 << 20,
        max_output_bytes: int = 64 << 10,
        max_threads: int = 16,
        preload: Sequence[str] | None = None,
        unsafe_no_isolation: bool = False,
    ) -> None:
        self.max_workers = _cores() if max_workers is None else max_workers
        self.limits = Limits(
            wall_time_s=wall_time_s,
            cpu_time_s=cpu_time_s,
            memory_bytes=memory_bytes,
            scratch_bytes=scratch_bytes,
            max_output_bytes=max_output_bytes,
            max_threads=max_threads,
            preload=tuple(PRELOAD if preload is None else preload),
            paths=_package_directories(),
            isolated=not unsafe_no_isolation,
        )
        _check_arguments(self.max_workers, self.limits, preload)
        self.max_concurrent = self.max_workers
        self._line = _Line(self.max_workers)
        self._lock = threading.Lock()
        self._zygote: Zygote | None = None  # from start to close

    def start(self) -> None:
        """Start the zygote and see, with a program that tries to get out, that it isolates.

        Raises:
            ConfigError: what the kernel or the installation refuses, and what to do.
        """
        if sys.platform != "linux":
            raise ConfigError(
                f"LocalSandbox isolates programs by means of Linux, and this is {sys.platform}: it needs Linux; use "
                "SandboxFusion, which sends programs to a server"
            )
        with self._lock:  # other calls of start wait for the check
            if self._zygote is not None:
                return
            if not self.limits.isolated:
                warnings.warn(
                    "unsafe_no_isolation: model-written programs run as this user, with its files and its network",
                    stacklevel=2,
                )
            zygote = Zygote(self.limits)
            try:
                check_isolation(zygote, self.limits)
            except BaseException:
                zygote.close()
                raise
            self._zygote = zygote

    def run(self, code: str) -> Execution:
        """Run one program, as it is written, and wait for its end.

        A call whose processes were killed from outside is run once more.

        Raises:
            RuntimeError: ``start`` was not called, or ``close`` was.
        """
        if self._zygote is None:
            raise RuntimeError("the sandbox is not started; call start() first")
        with self._line:
            reason = ""
            for _ in range(_TRIES):
                try:
                    return self._living_zygote().run(code)
                except (ZygoteGone, ConfigError, OSError) as error:  # the last from a machine short of files or memory
                    reason = str(error)
            return unavailable(reason)

    def close(self) -> None:
        """End the zygote and all programs."""
        with self._lock:
            if self._zygote is not None:
                self._zygote.close()
                self._zygote = None

    def _living_zygote(self) -> Zygote:
        """The zygote, a new one in place of a dead one. Raises ConfigError and ZygoteGone."""
        with self._lock:
            if self._zygote is None:
                raise ZygoteGone("it was closed meanwhile")
            if not self._zygote.alive:
                self._zygote.close()
                self._zygote = Zygote(self.limits)
            return self._zygote


class _Line:
    """Lets a number of threads in, first come, first served; a ``threading.Semaphore`` may let some wait for ever."""

    def __init__(self, places: int) -> None:
        self._lock = threading.Lock()
        self._places = places
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if self._places:
                self._places -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._places += 1


def _check_arguments(max_workers: int, limits: Limits, preload: Sequence[str] | None) -> None:
    problems = []
    for name, (least, most) in _RANGES.items():
        value = max_workers if name == "max_workers" else getattr(limits, name)
        if not isinstance(value, int) or not least <= value <= most:
            problems.append(f"{name} is {value!r}; it must be a whole number from {least} to {most}")
    shortest, longest = _WALL_TIMES_S
    if not shortest <= limits.wall_time_s <= longest:
        problems.append(f"wall_time_s is {limits.wall_time_s!r}; it must be a number from {shortest} to {longest}")
    if isinstance(preload, str):
        problems.append(f"preload is {preload!r}; it must be a list of names of modules, such as [{preload!r}]")
    if problems:
        raise ValueError("bad sandbox: " + "; ".join(problems))


def _cores() -> int:
    """CPU cores of this process, or of the machine where a process is not told."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _package_directories() -> tuple[str, ...]:
    """Where this interpreter finds installed packages; the directory of a project is not among them."""
    names = ("site-packages", "dist-packages")
    return tuple(path for path in sys.path if os.path.basename(path) in names and os.path.isdir(path))
