"""Namespaces: users without rights outside, and a file system that holds what the interpreter reads and nothing else.

The zygote enters namespaces of its own once, and every program enters further ones inside them. Nothing here needs a
privilege on the host. Where the host's user 0 starts the sandbox, programs run as another id of the host, because the
kernel does not limit the processes of user 0 and because that user owns files.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from spo_lightning.tools import sandbox_kernel as kernel
from spo_lightning.tools.sandbox_kernel import Refused

SCRATCH = "/run/sandbox"  # a path of its own: packages may lie below /tmp
_NOBODY = 65534  # an id of the host that owns nothing
_PROGRAM_ID = 1000
_SCRATCH_FILES = 4096
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
_DEVICES = ("null", "zero", "random", "urandom")
_PROGRAM_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC
_ZYGOTE_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
_KEPT_OPTIONS = {"nosuid": kernel.MS_NOSUID, "nodev": kernel.MS_NODEV, "noexec": kernel.MS_NOEXEC}


def isolate_zygote(proc: int, visible: list[str]) -> None:
    """Cut this process off from the host's files, network and users. It must have a single thread.

    Args:
        proc: open directory /proc, which is gone afterwards.
        visible: directories that stay, see ``visible_directories``.

    Raises:
        Refused: the kernel does not allow it here.
    """
    user = _enter_user_namespace(proc)
    kernel.unshare(_ZYGOTE_NAMESPACES)
    kernel.set_hostname("sandbox")
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    _build_root(visible)
    _make_read_only(proc)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        kernel.set_dumpable(True)  # the change of user took away its files in /proc, where ids are mapped
    kernel.drop_capabilities()


def isolate_supervisor(proc: int, scratch_bytes: int) -> None:
    """Give this process namespaces for one program; its next child is the first process of the pid namespace.

    Raises:
        Refused: the kernel does not allow it here.
    """
    own = (os.geteuid(), os.getegid())
    kernel.unshare(kernel.CLONE_NEWUSER | _PROGRAM_NAMESPACES)
    _map_own_ids(proc, own, _PROGRAM_ID)
    options = f"size={scratch_bytes},nr_inodes={_SCRATCH_FILES},mode=0700"
    kernel.mount("tmpfs", SCRATCH, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, options)


def visible_directories(paths: Iterable[str]) -> list[str]:
    """What programs may read: the standard library, ``paths`` and shared libraries, as far as they exist."""
    standard = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib"]
    return [path for path in dict.fromkeys([*_LIBRARIES, *standard, *paths]) if os.path.isdir(path)]


def _enter_user_namespace(proc: int) -> int | None:
    """Enter a user namespace. Returns the id to go on with, ``None`` for this process's own."""
    own = (os.geteuid(), os.getegid())
    if own[0] == 0:
        _enter_with_nobody(proc)
        return _NOBODY
    kernel.unshare(kernel.CLONE_NEWUSER)
    _map_own_ids(proc, own, _PROGRAM_ID)
    return None


def _enter_with_nobody(proc: int) -> None:
    """Enter a user namespace that knows users 0 and nobody; the map needs a process left outside to write it.

    Raises:
        Refused: this container does not know that id, or may not map it.
    """
    target = os.getpid()
    entered, tell = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(tell)
        os.read(entered, 1)
        status = 1
        try:
            for name in ("gid_map", "uid_map"):
                _write(proc, f"{target}/{name}", f"0 0 1\n{_NOBODY} {_NOBODY} 1\n")
            status = 0
        except Refused:
            status = 1
        finally:
            os._exit(status)
    os.close(entered)
    try:
        kernel.unshare(kernel.CLONE_NEWUSER)
    finally:
        os.close(tell)
        _, status = os.waitpid(helper, 0)
    if status:
        raise Refused(
            f"map user and group {_NOBODY}, as whom root runs programs: root needs the capabilities CAP_SETUID and "
            f"CAP_SETGID here, and a container that has these ids"
        )


def _map_own_ids(proc: int, own: tuple[int, int], inside: int) -> None:
    """Call this process's user and group ``inside``; no other id exists in its user namespace."""
    _write(proc, "self/setgroups", "deny")
    _write(proc, "self/uid_map", f"{inside} {own[0]} 1")
    _write(proc, "self/gid_map", f"{inside} {own[1]} 1")


def _write(proc: int, name: str, text: str) -> None:
    try:
        file = os.open(name, os.O_WRONLY, dir_fd=proc)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)
    except OSError as error:
        raise Refused(f"write {text!r} to /proc/{name}: {error.strerror}") from error


def _build_root(directories: list[str]) -> None:
    """Make a root of the given directories and a few devices, each at its own path.

    It is put together on top of /proc: that directory exists wherever this program can run, and no source lies in it.
    """
    root = "/proc"
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID, "size=1m,mode=0755")
    sources = {directory: os.path.realpath(directory) for directory in directories}
    bound: list[str] = []
    for source in sorted(set(sources.values())):
        if not within(source, bound):
            _bind(source, root)
            bound.append(source)
    links: list[str] = []
    for path in sorted(path for path, source in sources.items() if path != source):
        if not within(path, [*bound, *links]):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(sources[path], root + path)
            links.append(path)
    os.mkdir(root + "/dev")
    for device in _DEVICES:
        Path(root, "dev", device).touch()
        kernel.mount(f"/dev/{device}", f"{root}/dev/{device}", None, kernel.MS_BIND)
    os.makedirs(root + SCRATCH)
    if not os.path.lexists(root + "/tmp"):  # where many programs write, whatever TMPDIR says
        os.symlink(SCRATCH, root + "/tmp")
    kernel.change_root(root)


def _bind(source: str, root: str) -> None:
    os.makedirs(root + source, exist_ok=True)
    kernel.mount(source, root + source, None, kernel.MS_BIND | kernel.MS_REC)


def within(path: str, directories: Iterable[str]) -> bool:
    """Whether a path is one of the directories or lies in one."""
    return any(path == directory or path.startswith(directory + "/") for directory in directories)


def _make_read_only(proc: int) -> None:
    """Make every mount read-only, those that came along inside a directory too."""
    file = os.open("self/mountinfo", os.O_RDONLY, dir_fd=proc)
    with os.fdopen(file, encoding="utf-8", errors="surrogateescape") as lines:
        mounts = [line.split()[4:6] for line in lines]
    for escaped, options in mounts:
        point = escaped.encode("utf-8", "surrogateescape").decode("unicode_escape").encode("latin-1").decode()
        flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID
        flags |= 0 if point.startswith("/dev/") else kernel.MS_NODEV
        for option in options.split(","):
            flags |= _KEPT_OPTIONS.get(option, 0)
        kernel.mount(None, point, None, flags)
