"""The system calls that a program may make: a seccomp filter, compiled once and loaded by every program.

What is not named fails with ENOSYS, as on a kernel without the call, so that libraries fall back to older calls. What
programs are likely to try fails with EPERM, which Python shows as ``PermissionError``. Sockets keep the buffers of
their birth and carry bytes only, and no file can be locked: other programs and the host share the read-only ones.
"""

from __future__ import annotations

import errno
import os
from importlib import import_module
from typing import Any

_OPTIMIZE_BINARY_TREE = 2
_WORD = 0xFFFFFFFF  # the kernel reads these arguments as 32 bits, a filter compares 64
_CLONE_THREAD = 0x00010000
_CLONE_SHARED = _CLONE_THREAD | 0x00040F00  # VM, FS, FILES, SIGHAND, THREAD, SYSVSEM: no table of files of its own
_CLONE_NAMESPACES = 0x7E020080  # every CLONE_NEW* flag
_AF_UNIX = 1
_SOCK_STREAM = 1
_SOCKET_FLAGS = 0o2004000  # SOCK_CLOEXEC, SOCK_NONBLOCK
_MESSAGE_FLAGS = 0x4042  # MSG_NOSIGNAL, MSG_DONTWAIT, MSG_PEEK
_FCNTLS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD F_GETFD F_SETFD F_GETFL F_SETFL F_DUPFD_CLOEXEC
_PRCTLS = (15, 16)  # PR_SET_NAME, PR_GET_NAME
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX

_ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev lseek open openat close dup dup2 dup3 pipe pipe2
fsync fdatasync ftruncate truncate fallocate fadvise64
stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getdents getdents64
getcwd chdir fchdir mkdir mkdirat rmdir rename renameat renameat2 link linkat symlink symlinkat unlink unlinkat
chmod fchmod fchmodat utime utimes utimensat futimesat umask
mmap munmap mprotect mremap madvise msync brk
futex set_robust_list get_robust_list rseq set_tid_address sched_yield sched_getaffinity getcpu gettid exit exit_group
rt_sigaction rt_sigprocmask rt_sigpending rt_sigtimedwait rt_sigsuspend rt_sigreturn
sigaltstack kill tkill tgkill pause alarm setitimer getitimer restart_syscall
clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage
select pselect6 poll ppoll epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2
timerfd_create timerfd_settime timerfd_gettime shutdown
getpid getppid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid getpriority
getrlimit setrlimit prlimit64 getrandom uname sysinfo
""".split()
_REFUSED = """
fork vfork execve execveat socket connect bind listen accept accept4 ptrace process_vm_readv process_vm_writev
mount umount2 chroot pivot_root unshare setns mknod mknodat chown fchown lchown fchownat
setuid setgid setreuid setregid setresuid setresgid setgroups setpgid setsid sethostname
memfd_create shmget shmat msgget semget mq_open keyctl add_key request_key bpf perf_event_open
""".split()

_CONDITIONAL: tuple[tuple[str, list[tuple[int, int, int]]], ...] = (  # call, and by argument: bits, their value
    ("clone", [(0, _CLONE_SHARED | _CLONE_NAMESPACES, _CLONE_SHARED)]),
    ("close_range", [(2, _WORD, 0)]),  # CLOSE_RANGE_UNSHARE would give a thread a table of files of its own
    ("socketpair", [(0, _WORD, _AF_UNIX), (1, _WORD & ~_SOCKET_FLAGS, _SOCK_STREAM)]),
    ("sendto", [(3, _WORD & ~_MESSAGE_FLAGS, 0)]),
    ("recvfrom", [(3, _WORD & ~_MESSAGE_FLAGS, 0)]),
    *(("fcntl", [(1, _WORD, command)]) for command in _FCNTLS),
    *(("prctl", [(0, _WORD, option)]) for option in _PRCTLS),
    *(("ioctl", [(1, _WORD, request)]) for request in _IOCTLS),
)


def compile_filter() -> bytes:
    """The filter as instructions of classic BPF.

    Raises:
        ImportError: the package pyseccomp is missing.
        RuntimeError: the library libseccomp is missing.
        OSError: libseccomp does not take a rule.
    """
    seccomp: Any = import_module("pyseccomp")
    syscalls = seccomp.SyscallFilter(seccomp.ERRNO(errno.ENOSYS))
    syscalls.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    syscalls.set_attr(seccomp.Attr.CTL_OPTIMIZE, _OPTIMIZE_BINARY_TREE)

    def add(action: int, name: str, *conditions: tuple[int, int, int]) -> None:
        if seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) >= 0:  # else a call of other machines
            arguments = [seccomp.Arg(which, seccomp.MASKED_EQ, mask, value) for which, mask, value in conditions]
            syscalls.add_rule(action, name, *arguments)

    for name in _ALLOWED:
        add(seccomp.ALLOW, name)
    refusal = seccomp.ERRNO(errno.EPERM)
    for name in _REFUSED:
        add(refusal, name)
    for name in ("listxattr", "llistxattr", "flistxattr"):
        add(seccomp.ERRNO(errno.ENOTSUP), name)  # the answer with which shutil.copy2 can live
    add(refusal, "clone", (0, _CLONE_THREAD, 0))
    for name, conditions in _CONDITIONAL:
        add(seccomp.ALLOW, name, *conditions)
    with os.fdopen(os.memfd_create("filter"), "w+b") as file:
        syscalls.export_bpf(file)
        file.seek(0)
        return file.read()
