"""The program that a sandbox must keep in before it is trusted with others."""

from __future__ import annotations

from spo_lightning.tools.protocol import Execution
from spo_lightning.tools.sandbox_limits import Limits
from spo_lightning.tools.sandbox_process import Zygote, ZygoteGone, refusal

_ATTEMPTS = """
import os, resource, signal, socket, threading

def more_threads_than_allowed():
    resource.setrlimit(resource.RLIMIT_NPROC, (2, 2))  # this thread and the supervisor
    threading.stack_size(65536)  # so that it is not memory that stops the thread
    threading.Thread(target=int).start()

attempts = {
    "open a socket": lambda: socket.socket(),
    "read /etc/passwd": lambda: open("/etc/passwd"),
    "read /proc": lambda: os.listdir("/proc"),
    "write outside its directory": lambda: open(os.__file__, "r+b"),
    "make files outside its directory": lambda: os.mkdir("/new"),
    "start a process": lambda: os.fork(),
    "run a program": lambda: os.execv("/bin/sh", ["sh"]),
    "pass the limit of threads": more_threads_than_allowed,
}
escapes = [] if (os.getpid(), os.getpgrp()) == (1, 1) else ["see other processes"]
if resource.getrlimit(resource.RLIMIT_NPROC)[1] > MOST_PROCESSES:
    escapes.append("start more than max_threads threads")
for name, attempt in attempts.items():
    try:
        attempt()
    except (OSError, RuntimeError):
        continue
    escapes.append(name)
os.kill(0, signal.SIGKILL)  # ends the check itself where it reaches anyone
", ".join(escapes)
"""


def check_isolation(zygote: Zygote, limits: Limits) -> None:
    """See that programs run and, if they shall be, are kept in. Raises ConfigError."""
    program = _ATTEMPTS.replace("MOST_PROCESSES", str(limits.max_threads + 2)) if limits.isolated else "''"
    try:
        execution = zygote.run(program)
    except ZygoteGone as error:
        raise refusal(f"its first program did not end: {error}") from error
    if execution.ending == "unavailable":
        raise refusal(execution.detail)
    if execution.ending != "ok" or execution.value is None:
        raise refusal(f"its first program ended as {execution.ending!r}: {_last_words(execution)}", "check")
    if execution.value != "''":
        raise refusal(f"a program in it could {execution.value.strip(chr(39))}")


def _last_words(execution: Execution) -> str:
    return execution.detail or execution.stderr.strip().rpartition("\n")[2]
