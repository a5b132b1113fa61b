"""The process that programs are forked from: isolated, with the modules imported, and nothing of the trainer in it."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from spo_lightning.tools import sandbox_kernel as kernel
from spo_lightning.tools.sandbox_filter import compile_filter
from spo_lightning.tools.sandbox_limits import FILENAME, Limits, parent_is, send_message, unavailable
from spo_lightning.tools.sandbox_namespaces import isolate_zygote, visible_directories, within
from spo_lightning.tools.sandbox_supervisor import Surroundings, supervise

_OWN_MODULES = ("spo_lightning", "pyseccomp")  # programs shall not find them imported
_LOOK_S = 1.0  # between two looks at whether the trainer lives


def main(parent: int, control: int, settings: str) -> None:
    """Get ready, say so or why not, and fork until the trainer closes its end or dies.

    Args:
        parent: process id of the trainer.
        control: file descriptor of a socket to the trainer.
        settings: Limits as JSON.
    """
    values = json.loads(settings)
    limits = Limits(**{**values, "preload": tuple(values["preload"]), "paths": tuple(values["paths"])})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=control)
    try:
        surroundings = _prepare(limits)
    except (kernel.Refused, OSError) as error:
        connection.send(json.dumps({"isolation": str(error)}).encode())
        return
    except ImportError as error:
        connection.send(json.dumps({"preload": str(error)}).encode())
        return
    connection.send(b"{}")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors leave no zombies
    _serve(connection, parent, surroundings)


def _prepare(limits: Limits) -> Surroundings:
    """Isolate this process and import what programs shall find; the import happens where programs run."""
    os.umask(0o022)
    os.chdir("/")
    sys.orig_argv[:] = [FILENAME]
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # programs go before the trainer
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    instructions = b""
    if limits.isolated:
        try:
            instructions = compile_filter()
        except (ImportError, RuntimeError) as error:
            raise kernel.Refused(f"the filter of system calls: {error}") from error
        visible = visible_directories(limits.paths)
        sys.path[:] = [path for path in sys.path if within(path, visible)]
        isolate_zygote(proc, visible)
    for name in limits.preload:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in _OWN_MODULES]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # a collection in a program would write to the memory that it shares with this process
    return Surroundings(limits, proc, instructions, _address_space(proc))


def _address_space(proc: int) -> int:
    """Bytes of this process's address space."""
    with os.fdopen(os.open("self/statm", os.O_RDONLY, dir_fd=proc)) as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _serve(connection: socket.socket, parent: int, surroundings: Surroundings) -> None:
    """Fork a supervisor for every connection that the trainer sends."""
    zygote = os.getpid()
    connection.settimeout(_LOOK_S)
    while parent_is(parent):
        try:
            message, files, _, _ = socket.recv_fds(connection, 1, 1)
        except TimeoutError:
            continue
        if not message:
            return
        with socket.socket(fileno=files[0]) as client:
            _fork(connection, client, zygote, surroundings)


def _fork(connection: socket.socket, client: socket.socket, zygote: int, surroundings: Surroundings) -> None:
    try:
        pid = os.fork()
    except OSError as error:
        send_message(client, json.dumps(asdict(unavailable(f"fork: {error.strerror}"))).encode())
        return
    if pid:
        return
    status = 1
    try:
        connection.close()  # so that its closing tells the trainer of the zygote's death
        kernel.die_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if parent_is(zygote):
            supervise(client, surroundings)
        status = 0
    finally:
        if status:
            traceback.print_exc()
        os._exit(status)
