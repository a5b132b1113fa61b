"""The process between the zygote and one program: it isolates, watches, ends and reports it.

It believes nothing that the program says: limits are kept by the kernel or by this process, and what comes through the
pipes is bytes to be cut at a length.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import socket
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

from spo_lightning.tools import sandbox_kernel as kernel
from spo_lightning.tools.protocol import Ending, Execution
from spo_lightning.tools.sandbox_limits import Limits, receive_message, send_message, unavailable
from spo_lightning.tools.sandbox_namespaces import SCRATCH, isolate_supervisor
from spo_lightning.tools.sandbox_program import MEMORY, REPORT, VALUE, run_program

_STREAMS = ("stdin", "stdout", "stderr", "value")  # by the program's file descriptor
_SIGNALS = {member.value: member.name for member in signal.Signals}  # real-time signals have no names
_CHUNK = 1 << 16
_COUNTED_LATE_S = 0.5  # the kernel may end a program a little before its CPU seconds are full


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the zygote hands to every supervisor.

    Attributes:
        limits: of each program.
        proc: open directory /proc; -1 without isolation.
        instructions: the filter of system calls; empty without isolation.
        base_bytes: address space of the zygote.
    """

    limits: Limits
    proc: int
    instructions: bytes
    base_bytes: int


def supervise(client: socket.socket, surroundings: Surroundings) -> None:
    """Read a program from the client, run it and send the Execution, as JSON."""
    message = receive_message(client)
    if message is None:
        return
    try:
        if surroundings.limits.isolated:
            isolate_supervisor(surroundings.proc, surroundings.limits.scratch_bytes)
            execution = _Supervised(surroundings, SCRATCH).run(message)
        else:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
                execution = _Supervised(surroundings, scratch).run(message)
    except (kernel.Refused, OSError) as error:
        execution = unavailable(str(error))
    send_message(client, json.dumps(asdict(execution)).encode())


class _Supervised:
    """One program from its start to its end."""

    def __init__(self, surroundings: Surroundings, scratch: str) -> None:
        self.surroundings = surroundings
        self.limits = surroundings.limits
        self.scratch = scratch
        self.output = {name: bytearray() for name in _STREAMS[1:]}
        self.selector = selectors.DefaultSelector()

    def run(self, message: bytes) -> Execution:
        """Run the program whose UTF-8 source the message is."""
        start = time.monotonic()
        pid = self._start(message.decode("utf-8", "surrogatepass"))
        try:
            stopped = self._watch(pid, start + self.limits.wall_time_s)
        finally:
            os.kill(pid, signal.SIGKILL)  # the first process of its pid namespace takes all others along
            _, status, usage = os.wait4(pid, 0)
            if not self.limits.isolated:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        seconds = time.monotonic() - start
        ending, detail = stopped or self._ending(status, usage)
        return self._execution(ending, detail, seconds)

    def _start(self, source: str) -> int:
        """Fork the program; this process keeps the reading ends of its output."""
        pipes = {name: os.pipe() for name in self.output}
        pid = os.fork()
        if pid == 0:
            os.setsid()  # else a signal to its process group would reach the zygote and all other programs
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # an open file of the zygote would be shared by all programs
            for name, (_, write) in pipes.items():
                os.dup2(write, _STREAMS.index(name))
            base, instructions = self.surroundings.base_bytes, self.surroundings.instructions
            run_program(source, self.limits, base, instructions, self.scratch)
        for name, (read, write) in pipes.items():
            os.close(write)
            os.set_blocking(read, False)
            self.selector.register(read, selectors.EVENT_READ, name)
        return pid

    def _watch(self, pid: int, deadline: float) -> tuple[Ending, str] | None:
        """Read output until the program ends; what ended it, if this process must end it."""
        process = os.pidfd_open(pid)
        self.selector.register(process, selectors.EVENT_READ)
        ended = False
        while not ended:
            left = deadline - time.monotonic()
            events = self.selector.select(left) if left > 0 else []
            if not events:
                return "timeout", f"the program was stopped after {self.limits.wall_time_s:g} s of wall time"
            ended = any(key.fd == process for key, _ in events)
            for key, _ in events:
                if key.fd != process and not self._read(key.fd, key.data):
                    return self._flooded(key.data)
        for key in list(self.selector.get_map().values()):
            if key.fd != process and not self._read(key.fd, key.data):
                return self._flooded(key.data)
        return None

    def _read(self, file: int, name: str) -> bool:
        """Read what there is of one stream; False when it passes the limit, behind which it is cut."""
        data = self.output[name]
        most = self.limits.max_output_bytes + (len(VALUE) if name == "value" else 0)
        while len(data) <= most:
            try:
                part = os.read(file, _CHUNK)
            except BlockingIOError:
                return True
            if not part:
                self.selector.unregister(file)
                return True
            data += part
        del data[most:]
        return False

    def _flooded(self, name: str) -> tuple[Ending, str]:
        what = "the value of its last line" if name == "value" else name
        return "output", f"the program was stopped: {what} passed {self.limits.max_output_bytes} bytes"

    def _ending(self, status: int, usage: resource.struct_rusage) -> tuple[Ending, str]:
        """How a program ended that was not stopped by this process."""
        limits = self.limits
        memory = f"the program needed more than {limits.memory_bytes / 2**20:g} MiB of memory"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number != signal.SIGKILL:
                return "crash", f"the program crashed with signal {_SIGNALS.get(number, number)}"
            if usage.ru_utime + usage.ru_stime >= limits.cpu_time_s - _COUNTED_LATE_S:
                return "timeout", f"the program was stopped after {limits.cpu_time_s} s of CPU time"
            return "memory", "the program was killed by the system, most likely for want of memory"
        if self.output["value"].startswith(MEMORY):
            return "memory", memory
        return ("ok" if os.WEXITSTATUS(status) == 0 else "error"), ""

    def _execution(self, ending: Ending, detail: str, seconds: float) -> Execution:
        stdout, stderr, report = (bytes(self.output[name]).decode("utf-8", "replace") for name in _STREAMS[1:])
        mark = VALUE.decode()
        value = report.removeprefix(mark) if report.startswith(mark) else None
        return Execution(stdout, stderr, value, ending, detail, seconds)


assert _STREAMS.index("value") == REPORT
