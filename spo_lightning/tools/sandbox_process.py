"""The trainer's side of a zygote: start it, send it programs, end it."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from spo_lightning.errors import ConfigError
from spo_lightning.tools.protocol import Execution
from spo_lightning.tools.sandbox_limits import Limits, receive_message, send_message

_START_LIMIT_S = 120.0
_END_LIMIT_S = 5.0
_PATIENCE_S = 30.0  # for a busy machine, beyond the wall time that the supervisor keeps
_LAUNCH = """
import json, sys
project, parent, control, settings = sys.argv[1:]
sys.path.extend(path for path in json.loads(settings)["paths"] if path not in sys.path)
sys.path.insert(0, project)
from spo_lightning.tools.sandbox_zygote import main
sys.path.remove(project)
main(int(parent), int(control), settings)
"""
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "PYTHONMALLOC": "malloc",  # with the next line: large pages, of which a fork copies fewer table entries
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
_REMEDIES = {
    "isolation": (
        "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
        "kernel.apparmor_restrict_unprivileged_userns=0; in Docker --security-opt seccomp=unconfined --security-opt "
        "apparmor=unconfined), start as an ordinary user where root has no capabilities, install libseccomp2 and "
        "`pip install pyseccomp`, send programs to a SandboxFusion server, or, for programs that you trust, set "
        "unsafe_no_isolation: true"
    ),
    "check": (
        "raise the limit that it names (wall_time_s, cpu_time_s, memory_bytes, max_output_bytes), or leave modules "
        "out of preload"
    ),
    "preload": "install it in a directory of packages that other users may read, or leave it out of preload",
}


class ZygoteGone(Exception):
    """The zygote, or the supervisor of one call, ended before the program's result came."""


class Zygote:
    """A running zygote. Calls may come from several threads.

    Args:
        limits: of every program.

    Raises:
        ConfigError: this machine does not let programs be isolated, or a module cannot be imported.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [str(Path(__file__).parents[2]), str(os.getpid()), str(theirs.fileno()), json.dumps(asdict(limits))]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-B", "-c", _LAUNCH, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            self._await_readiness()
        except ConfigError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs; told by its socket, which closes before the calls under way notice anything."""
        if self._process.poll() is not None:  # ``close`` may have closed the socket too
            return False
        poll = select.poll()
        poll.register(self._control, 0)
        return not poll.poll(0)

    def run(self, code: str) -> Execution:
        """Run one program. Raises ZygoteGone."""
        ours, theirs = socket.socketpair()
        with ours:
            ours.settimeout(self._limits.wall_time_s + _PATIENCE_S)
            try:
                with theirs:
                    socket.send_fds(self._control, [b"+"], [theirs.fileno()])
                send_message(ours, code.encode("utf-8", "surrogatepass"))
                reply = receive_message(ours)
            except TimeoutError:
                self._process.kill()  # it may be stopped: the next call shall find a new one
                self._process.wait()
                raise ZygoteGone("its supervisor does not answer") from None
            except OSError as error:
                raise ZygoteGone(f"its process ended: {error}") from error
        if reply is None:
            raise ZygoteGone("its process ended")
        return Execution(**json.loads(reply))

    def close(self) -> None:
        """End it, with all programs."""
        self._control.close()
        try:
            self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _await_readiness(self) -> None:
        self._control.settimeout(_START_LIMIT_S)
        try:
            reply = self._control.recv(1 << 16)
        except (TimeoutError, ConnectionError):
            reply = b""
        self._control.settimeout(None)
        if not reply:
            raise ConfigError(f"the sandbox's process did not become ready; {sys.executable} may say why on stderr")
        for kind, problem in json.loads(reply).items():
            raise refusal(problem, kind)


def refusal(problem: str, kind: str = "isolation") -> ConfigError:
    """The error that says what failed and what to do."""
    return ConfigError(f"the sandbox for model-written programs cannot start: {problem}. Remedy: {_REMEDIES[kind]}")


def _environment() -> dict[str, str]:
    """Nothing of the trainer's environment except where the interpreter's own libraries lie."""
    libraries = os.environ.get("LD_LIBRARY_PATH")
    return _ENVIRONMENT if libraries is None else {**_ENVIRONMENT, "LD_LIBRARY_PATH": libraries}
