"""Linux calls that Python 3.11 does not offer.

Sources: the manual pages user_namespaces(7), mount_namespaces(7), capabilities(7), prctl(2), seccomp(2).
"""

from __future__ import annotations

import ctypes
import os
import signal

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

_MNT_DETACH = 2
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_INSTRUCTION_BYTES = 8
_FLAG_NAMES = {
    CLONE_NEWNS: "CLONE_NEWNS",
    CLONE_NEWUTS: "CLONE_NEWUTS",
    CLONE_NEWIPC: "CLONE_NEWIPC",
    CLONE_NEWUSER: "CLONE_NEWUSER",
    CLONE_NEWPID: "CLONE_NEWPID",
    CLONE_NEWNET: "CLONE_NEWNET",
}

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The kernel refused a call; the text names the call and the reason."""


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _check(result: int, call: str) -> None:
    if result == -1:
        raise Refused(f"{call}: {os.strerror(ctypes.get_errno())}")


def unshare(flags: int) -> None:
    """Move this process into new namespaces. Raises Refused."""
    names = "|".join(name for flag, name in _FLAG_NAMES.items() if flags & flag)
    _check(_libc.unshare(flags), f"unshare({names})")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount or remount; ``None`` stands for NULL. Raises Refused."""
    words = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    options = None if data is None else data.encode()
    _check(_libc.mount(*words, ctypes.c_ulong(flags), options), f"mount({source or kind} on {target}, {flags:#x})")


def change_root(directory: str) -> None:
    """Make a mount point the root of this mount namespace and let go of the old root. Raises Refused."""
    os.chdir(directory)
    _check(_libc.pivot_root(b".", b"."), f"pivot_root({directory})")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2(old root)")
    os.chdir("/")


def set_hostname(name: str) -> None:
    """Name the host in this uts namespace. Raises Refused."""
    _check(_libc.sethostname(name.encode(), len(name)), "sethostname")


def _prctl(name: str, option: int, value: int, pointer: object = None) -> None:
    zero = ctypes.c_ulong(0)
    third = zero if pointer is None else pointer
    _check(_libc.prctl(option, ctypes.c_ulong(value), third, zero, zero), f"prctl({name})")


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends. A change of user or capabilities undoes it."""
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, signal.SIGKILL)


def set_dumpable(dumpable: bool) -> None:
    """Whether this process owns its files in /proc, may be traced by its user and leaves core files."""
    _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, int(dumpable))


def set_no_new_privileges() -> None:
    """Give up gaining privileges by running a program; a filter of system calls needs it."""
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Give up all capabilities in this process's user namespace. Raises Refused."""
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: two words each
    _check(_libc.capset(ctypes.byref(header), ctypes.byref(nothing)), "capset")


def load_filter(instructions: bytes) -> None:
    """Apply a seccomp filter, compiled to classic BPF, to this thread and all that it starts. Raises Refused."""
    program = _FilterProgram(len(instructions) // _INSTRUCTION_BYTES, instructions)
    _prctl("PR_SET_SECCOMP", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))
