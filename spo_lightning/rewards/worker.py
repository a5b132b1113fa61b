"""The loop of a worker process, started by :mod:`~spo_lightning.rewards.process_pool`. Standard library only."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
from importlib import import_module
from multiprocessing.connection import Connection

_STDIN = 0


def main() -> None:
    """Serve tasks until the parent is gone. Arguments: descriptor of the connection, module of the functions."""
    descriptor, module_name = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # these reach a whole process group, or job
        signal.signal(number, signal.SIG_IGN)  # the parent decides, and this process ends with it
    die_with_parent()
    module = import_module(module_name)
    with Connection(int(descriptor)) as connection:
        connection.send(None)  # ready: from here on the parent's clock may run
        while True:
            try:
                name, arguments = connection.recv()
            except EOFError:
                return
            connection.send(getattr(module, name)(*arguments))


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that ends and whatever this one is busy with.

    Standard input is a pipe that only the parent holds open. With O_ASYNC its closing raises SIGIO, whose default
    action terminates; a watching thread would not get the interpreter's lock during a long integer power. Unlike
    ``PR_SET_PDEATHSIG`` this does not depend on the thread that started the process.
    """
    fcntl.fcntl(_STDIN, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(_STDIN, fcntl.F_SETFL, fcntl.fcntl(_STDIN, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([_STDIN], [], [], 0)[0]:  # the parent had gone before
        sys.exit()


if __name__ == "__main__":
    main()
