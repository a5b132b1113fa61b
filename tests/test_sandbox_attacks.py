"""Programs that try to get out of the sandbox, to hurt it or to outlast it. Each runs in the real one."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spo_lightning.errors import ConfigError
from spo_lightning.tools.sandbox import LocalSandbox
from spo_lightning.tools.sandbox_check import check_isolation
from spo_lightning.tools.sandbox_filter import compile_filter

WALL_TIME_S = 1.2
MAX_OUTPUT = 4096


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalSandbox]:
    runner = LocalSandbox(
        max_workers=2,
        wall_time_s=WALL_TIME_S,
        cpu_time_s=1,
        memory_bytes=128 << 20,
        scratch_bytes=4 << 20,
        max_output_bytes=MAX_OUTPUT,
        max_threads=8,
        preload=["math", "ctypes", "socket", "asyncio", "mmap"],
    )
    try:
        runner.start()
    except ConfigError as error:
        if "program in it" in str(error) or "first program" in str(error):
            raise  # programs run here, and the check of them failed
        pytest.skip(str(error))
    yield runner
    runner.close()


@pytest.fixture(autouse=True)
def serves_the_next_call(sandbox: LocalSandbox) -> Iterator[None]:
    yield
    assert sandbox.run("6 * 7").value == "42"


LIMITS = {
    "endless loop": ("while True: pass", "timeout"),
    "sleep": ("import time; time.sleep(60)", "timeout"),
    "endless loop that ignores exceptions": (
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "timeout",
    ),
    "signals ignored": (
        "import signal, time\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)",
        "timeout",
    ),
    "slow output": ("import time\nwhile True: print('x', end='', flush=True); time.sleep(0.01)", "timeout"),
    "repr that never ends": ("class A:\n  def __repr__(self):\n    while True: pass\nA()", "timeout"),
    "sys.exit replaced": ("import sys, os\nsys.exit = os._exit = print\nwhile True: pass", "timeout"),
    "raised CPU limit": (
        "import resource\ntry: resource.setrlimit(resource.RLIMIT_CPU, (99, 99))\n"
        "except ValueError: pass\nwhile True: pass",
        "timeout",
    ),
    "memory in one piece": ("b'x' * (1 << 30)", "memory"),
    "memory in small pieces": ("kept = []\nwhile True: kept.append([0] * 60)", "memory"),
    "memory by mmap": ("import mmap\nkept = []\nwhile True: kept.append(mmap.mmap(-1, 1 << 24))", "error"),
    "memory by shared mmap": (
        "import mmap\nkept = []\nwhile True:\n  kept.append(mmap.mmap(-1, 1 << 22))\n"
        "  kept[-1].write(b'x' * (1 << 22))",
        "error",
    ),
    "raised memory limit": (
        "import resource\ntry: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\n"
        "except ValueError: pass\nb'x' * (1 << 30)",
        "memory",
    ),
    "stdout flood": ("while True: print('x' * 1000)", "output"),
    "stderr flood": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
    "huge value": ("list(range(100_000))", "output"),
    "full disk": ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 65536); f.flush()", "error"),
    "full disk in many files": ("for i in range(999):\n  open(str(i), 'wb').write(b'x' * 65536)", "error"),
    "out of inodes": ("for i in range(9999): open(str(i), 'w').close()", "error"),
    "sparse file mapped": (
        "import mmap\nf = open('a', 'w+b'); f.truncate(4 << 20); g = open('b', 'w+b'); g.truncate(4 << 20)\n"
        "m = mmap.mmap(f.fileno(), 0); n = mmap.mmap(g.fileno(), 0)\nm.write(b'x' * len(m)); n.write(b'x' * len(n))",
        "crash",
    ),
    "deep recursion": ("def f(): f()\nf()", "error"),
    "deep native recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\n"
        "class A:\n  def __getattr__(s, n): return getattr(s, n + '')\nrepr(A().x)",
        "crash",
    ),
    "null pointer": ("import ctypes\nctypes.string_at(0)", "crash"),
    "abort": ("import os\nos.abort()", "crash"),
    "fork bomb": ("import os\nwhile True: os.fork()", "error"),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
        "error",
    ),
    "files by the thousand": ("kept = []\nwhile True: kept.append(open('/dev/null'))", "error"),
    "null byte": ("x = 1\0", "error"),
    "deeply nested source": ("-" * 100_000 + "1", "error"),
    "lone surrogate": ("x = '\ud800'", "error"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_end_a_program(sandbox: LocalSandbox, name: str) -> None:
    code, ending = LIMITS[name]
    execution = sandbox.run(code)
    assert execution.ending == ending, execution
    assert max(len(execution.stdout), len(execution.stderr), len(execution.value or "")) <= MAX_OUTPUT
    assert execution.seconds < WALL_TIME_S + 5
    assert (execution.detail != "") == (ending not in ("ok", "error"))


FORBIDDEN = {
    "read /etc/passwd": "open('/etc/passwd')",
    "read /etc/shadow": "open('/etc/shadow')",
    "read /proc": "open('/proc/self/status')",
    "read the parent": "open('/proc/1/environ')",
    "read /sys": "os.listdir('/sys')",
    "read a disk": "open('/dev/vda')",
    "read memory": "open('/dev/mem')",
    "read a terminal": "open('/dev/tty')",
    "list the home of root": "os.listdir('/root/.ssh')",
    "write to the root": "os.mkdir('/new')",
    "write to /dev": "open('/dev/new', 'w')",
    "write to the standard library": "open(os.__file__, 'r+b')",
    "remove from the standard library": "os.unlink(os.__file__)",
    "make a library writable": "os.chmod(os.__file__, 0o777)",
    "make a link to a library": "os.link(os.__file__, 'copy')",
    "make a device": "os.mknod('disk', 0o60666, os.makedev(254, 0))",
    "make a device, elsewhere": "os.mknod('/dev/disk', 0o60666, os.makedev(254, 0))",
    "follow a link out": "os.symlink('/proc/1/root/etc/passwd', 'link') or open('link')",
    "climb out": "open('../../../../etc/passwd')",
    "change the owner": "os.chown('.', 0, 0)",
    "become root": "os.setuid(0)",
    "another root": "os.chroot('.')",
    "fork": "os.fork()",
    "posix_spawn": "os.posix_spawn('/bin/sh', ['sh'], {})",
    "exec": "os.execv('/bin/sh', ['sh'])",
    "exec a library": "os.execv(os.__file__, ['x'])",
    "subprocess": "__import__('subprocess').run(['true'])",
    "shell": "__import__('subprocess').check_output('id', shell=True)",
    "TCP socket": "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "UDP socket": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "TCP6 socket": "socket.socket(socket.AF_INET6, socket.SOCK_STREAM)",
    "unix socket": "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
    "netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW)",
    "datagram pair, which can send elsewhere": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "name lookup": "socket.getaddrinfo('example.com', 80)",
    "connection": "socket.create_connection(('1.1.1.1', 80), 1)",
    "memory file": "os.memfd_create('x')",
    "process handle": "os.pidfd_open(1)",
    "kill process 2": "os.kill(2, 9)",
    "kill everything": "os.kill(-1, 9)",
    "kill a group": "os.killpg(999, 9)",
    "better priority": "os.nice(-10)",
    "all cores": "os.sched_setaffinity(0, range(64))",
    "real-time": "os.sched_setscheduler(0, 1, os.sched_param(1))",
    "clock": "__import__('time').clock_settime(0, 0)",
    "host name": "socket.sethostname('x')",
    "attribute": "os.setxattr('.', 'user.x', b'y')",
    "larger pipe": "__import__('fcntl').fcntl(os.pipe()[1], 1031, 1 << 18)",
    "larger socket buffer": "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)",
    "file parked in a socket": "socket.send_fds(socket.socketpair()[0], [b'x'], [0])",
    "urgent data": "socket.socketpair()[0].send(b'x', socket.MSG_OOB)",
    "lock of a file that others read": "__import__('fcntl').flock(open(os.__file__), 6)",
    "record lock of a file that others read": "__import__('fcntl').lockf(open(os.__file__), 5)",
    "watch of a directory that others read": "__import__('fcntl').fcntl(os.open('/usr/lib', 0), 1026, 1)",
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_forbidden_fails(sandbox: LocalSandbox, name: str) -> None:
    attempt = f"import os, socket\ntry:\n    {FORBIDDEN[name]}\n"
    execution = sandbox.run(attempt + "except OSError:\n    print('refused')\nelse:\n    print('ESCAPED')")
    assert (execution.ending, execution.stdout) == ("ok", "refused\n"), execution


# Numbers of x86-64. Arguments are such that an unfiltered kernel would do it, or say EFAULT or EINVAL.
SYSCALLS = {
    "ptrace": "101, 0, 0, 0, 0",
    "process_vm_readv": "310, 1, 0, 0, 0, 0, 0",
    "mount": "165, b'none', b'/tmp', b'tmpfs', 0, 0",
    "remount": "165, None, b'/', None, 0x1020, 0",
    "umount2": "166, b'/tmp', 2",
    "pivot_root": "155, b'.', b'.'",
    "open_tree": "428, -100, b'/', 1",
    "fsopen": "430, b'proc', 0",
    "unshare": "272, 0x10000000",
    "setns": "308, 0, 0",
    "clone with a new user": "56, 0x10000011, 0, 0, 0, 0",
    "clone": "56, 17, 0, 0, 0, 0",
    "clone3": "435, bytes(88), 88",
    "vfork": "58",
    "execveat": "322, -100, b'/bin/sh', 0, 0, 0",
    "memfd_create": "319, b'x', 0",
    "memfd_secret": "447, 0",
    "shmget": "29, 0, 4096, 0o1777",
    "msgget": "68, 0, 0o1777",
    "semget": "64, 0, 1, 0o1777",
    "mq_open": "240, b'/x', 66, 0o777, 0",
    "keyctl": "250, 0, -3, 1",
    "add_key": "248, b'user', b'x', b'y', 1, -3",
    "bpf": "321, 0, bytes(72), 72",
    "perf_event_open": "298, bytes(128), 0, -1, -1, 0",
    "userfaultfd": "323, 1",
    "io_uring_setup": "425, 1, bytes(120)",
    "socket": "41, 2, 1, 0",
    "open_by_handle_at": "304, 3, bytes(64), 0",
    "name_to_handle_at": "303, -100, b'/', bytes(128), bytes(8), 0",
    "fanotify_init": "300, 0, 0",
    "kexec_load": "246, 0, 0, 0, 0",
    "init_module": "175, 0, 0, b''",
    "reboot": "169, 0xfee1dead, 672274793, 0, 0",
    "quotactl": "179, 0, 0, 0, 0",
    "personality": "135, 0x0040000",
    "prctl undoing the death with the parent": "157, 1, 0, 0, 0, 0",
    "prctl dumpable": "157, 4, 1, 0, 0, 0",
    "seccomp": "317, 1, 0, 0",
    "pidfd_getfd": "438, 0, 0, 0",
    "ioctl that types into a terminal": "16, 0, 0x5412, b'x'",
    "vmsplice": "278, 1, 0, 0, 0",
    "landlock": "444, 0, 0, 1",
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")
@pytest.mark.parametrize("name", SYSCALLS)
def test_system_calls_are_refused(sandbox: LocalSandbox, name: str) -> None:
    code = (
        f"import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nprint(c.syscall({SYSCALLS[name]}), ctypes.get_errno())"
    )
    execution = sandbox.run(code)
    assert (execution.ending, execution.stdout) in (("ok", "-1 1\n"), ("ok", "-1 38\n")), execution
    number, *arguments = eval(f"({SYSCALLS[name]},)")  # for what an ordinary user may not do without the filter either
    assert decide(number, *(word if isinstance(word, int) else 0 for word in arguments)) in (ERROR | 1, ERROR | 38)


ALLOW, ERROR = 0x7FFF0000, 0x00050000
HIGH = 1 << 32  # of an argument of which the kernel reads the low half
THREAD = 0x003D0F00  # what pthread_create passes to clone
RULES = {
    "thread": (56, [THREAD], True),
    "thread without shared files": (56, [THREAD & ~0x400], False),
    "thread without shared memory": (56, [THREAD & ~0x100], False),
    "thread in a network of its own": (56, [THREAD | 0x40000000], False),
    "close files": (436, [3, 9, 0], True),
    "close files in a table of one's own": (436, [3, 9, 2], False),
    "close files in a table of one's own, high bit": (436, [3, 9, 2 | HIGH], False),
    "F_GETFL": (72, [1, 3], True),
    "F_DUPFD_CLOEXEC": (72, [1, 1030], True),
    "F_SETPIPE_SZ": (72, [1, 1031], False),
    "F_SETPIPE_SZ, high bit": (72, [1, 1031 | HIGH], False),
    "F_SETSIG": (72, [1, 10], False),
    "F_SETLK": (72, [1, 6], False),
    "F_OFD_SETLK": (72, [1, 37], False),
    "F_SETLEASE": (72, [1, 1024], False),
    "F_ADD_SEALS": (72, [1, 1033], False),
    "send": (44, [5, 0, 1, 0x4040], True),
    "send urgently": (44, [5, 0, 1, 0x1], False),
    "receive": (45, [5, 0, 1, 0x2], True),
    "receive urgently": (45, [5, 0, 1, 0x1], False),
    "receive errors, high bit": (45, [5, 0, 1, 0x2000 | HIGH], False),
    "stream pair": (53, [1, 1 | 0o2004000, 0], True),
    "stream pair of another kind": (53, [1, 1 | 0x10, 0], False),
    "datagram pair": (53, [1, 2, 0], False),
    "datagram pair, high bit": (53, [1, 2 | HIGH, 0], False),
    "pair of another family": (53, [16, 1, 0], False),
    "name of a thread": (157, [15], True),
    "new filter by prctl": (157, [22], False),
    "dumpable, high bit": (157, [4 | HIGH], False),
    "size of a terminal": (16, [1, 0x5413], True),
    "typing into a terminal, high bit": (16, [1, 0x5412 | HIGH], False),
    **{name: (number, [], False) for name, number in {"setsockopt": 54, "getsockopt": 55, "sendmsg": 46}.items()},
    **{name: (number, [], False) for name, number in {"recvmsg": 47, "getsockname": 51, "getpeername": 52}.items()},
    **{name: (number, [], False) for name, number in {"flock": 73, "mincore": 27, "membarrier": 324}.items()},
    **{name: (number, [], False) for name, number in {"rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297}.items()},
    **{name: (number, [], False) for name, number in {"copy_file_range": 326, "sendfile": 40}.items()},
}


@functools.cache
def compiled_filter() -> bytes:
    return compile_filter()


def decide(number: int, *arguments: int) -> int:
    """What the filter says to a call on x86-64: the program of classic BPF, worked through by hand."""
    words = [word % (1 << 64) for word in (*arguments, 0, 0, 0, 0, 0, 0)][:6]
    call = struct.pack("<iIQ6Q", number, 0xC000003E, 0, *words)
    program = compiled_filter()
    here = accumulator = 0
    while True:
        code, jump, other, operand = struct.unpack_from("<HBBI", program, 8 * here)
        here += 1
        if code == 0x06:
            return int(operand)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", call, operand)
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x05:
            here += operand
        else:
            tests = {0x15: accumulator == operand, 0x25: accumulator > operand, 0x35: accumulator >= operand}
            here += jump if {**tests, 0x45: accumulator & operand != 0}[code] else other


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")
@pytest.mark.parametrize("name", RULES)
def test_the_filter_reads_arguments_as_the_kernel_does(name: str) -> None:
    number, arguments, allowed = RULES[name]
    assert (decide(number, *arguments) == ALLOW) == allowed


GROUP = ["os.kill(0, 9)", "os.kill(0, 19)", "os.killpg(0, 9)", "os.killpg(0, 19)", "os.kill(os.getppid(), 9)"]


@pytest.mark.parametrize("signal", GROUP)
def test_signals_to_its_group_reach_nobody_else(sandbox: LocalSandbox, signal: str) -> None:
    zygote = sandbox._living_zygote().pid
    with ThreadPoolExecutor(1) as threads:
        sibling = threads.submit(sandbox.run, "import time\ntime.sleep(0.35)\n'whole'")
        attack = f"import os, time\ntime.sleep(0.15)\n{signal}\nprint('alive', os.getpgrp(), os.getsid(0))"
        assert sandbox.run(attack).stdout == "alive 1 1\n"
        assert sibling.result().value == "'whole'"
    assert sandbox._living_zygote().pid == zygote


def test_stdin_is_not_shared_with_the_next_program(sandbox: LocalSandbox) -> None:
    code = "import os, fcntl\nflags = fcntl.fcntl(0, fcntl.F_GETFL)\nfcntl.fcntl(0, fcntl.F_SETFL, flags | {})\nflags"
    first, second = (sandbox.run(code.format(os.O_NONBLOCK | os.O_APPEND)).value for _ in range(2))
    assert first == second is not None


def test_what_sockets_hold_is_bounded(sandbox: LocalSandbox) -> None:
    """Kernel memory outside the limit of memory: as many sockets as files may be open, each with its first buffer."""
    code = (
        "import socket\nkept = []; held = 0\ntry:\n  while True:\n    for s in socket.socketpair():\n"
        "      kept.append(s); s.setblocking(False)\n      try:\n        while True: held += s.send(bytes(1 << 15))\n"
        "      except BlockingIOError: pass\nexcept OSError: pass\nheld"
    )
    assert 0 < int(sandbox.run(code).value or 0) < 64 << 20


def test_the_check_finds_what_gets_out() -> None:
    runner = LocalSandbox(1, preload=[], unsafe_no_isolation=True)
    with pytest.warns(UserWarning, match="unsafe_no_isolation"):
        runner.start()
    try:
        with pytest.raises(ConfigError, match="its first program ended as"):
            check_isolation(runner._living_zygote(), dataclasses.replace(runner.limits, isolated=True))
    finally:
        runner.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="drops capabilities of root")
@pytest.mark.parametrize("capability", [6, 7], ids=["CAP_SETGID", "CAP_SETUID"])
def test_root_that_cannot_change_its_user_is_refused(capability: int) -> None:
    """Else programs would run as user 0 of the host, whose threads the kernel does not limit."""
    code = (
        "import ctypes\nfrom spo_lightning.tools.sandbox import LocalSandbox\n"
        "from spo_lightning.errors import ConfigError\n"
        f"assert ctypes.CDLL(None).prctl(24, {capability}, 0, 0, 0) == 0\n"
        "try: LocalSandbox(1, preload=[], memory_bytes=64 << 20).start()\nexcept ConfigError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "CAP_SETUID and CAP_SETGID" in said.stdout, said


def test_little_memory_does_not_hide_a_missing_limit_of_threads() -> None:
    runner = LocalSandbox(1, preload=[], memory_bytes=16 << 20, max_threads=40)
    runner.start()
    try:
        code = (
            "import threading\nthreading.stack_size(65536); done = threading.Event(); n = 0\ntry:\n  while n < 99:\n"
            "    threading.Thread(target=done.wait, daemon=True).start(); n += 1\nexcept RuntimeError: pass\nn"
        )
        assert runner.run(code).value == "40"
    finally:
        runner.close()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86-64")
@pytest.mark.parametrize(
    "code", [b"\xb8\x14\x00\x00\x00\xcd\x80\xc3", b"\xb8\x27\x00\x00\x40\x0f\x05\xc3"], ids=["i386", "x32"]
)
def test_system_calls_of_another_machine_kill(sandbox: LocalSandbox, code: bytes) -> None:
    program = (
        f"import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7); m.write({code!r})\n"
        "a = ctypes.addressof(ctypes.c_char.from_buffer(m)); print(ctypes.CFUNCTYPE(ctypes.c_long)(a)())"
    )
    assert sandbox.run(program).ending == "crash"


@pytest.fixture
def secret() -> Iterator[Path]:
    """A file that every user of the host may read, not below /tmp, where programs have a directory of their own."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    folder.chmod(0o755)
    file = folder / "secret.txt"
    file.write_text("the treasure")
    file.chmod(0o644)
    yield file
    shutil.rmtree(folder)


def test_files_of_the_host_are_not_there(sandbox: LocalSandbox, secret: Path) -> None:
    here = Path(__file__).resolve()
    for path in (secret, here, here.parents[1] / "pyproject.toml", Path("/etc/hostname")):
        execution = sandbox.run(f"open({str(path)!r}).read()")
        assert "FileNotFoundError" in execution.stderr, execution
    walk = (
        "import os\nfor folder, folders, names in os.walk('/'):\n"
        "  folders[:] = [f for f in folders if f not in ('usr', 'lib', 'lib64', 'site-packages', 'dist-packages')]\n"
        "  print(*[os.path.join(folder, n) for n in names if n in ('secret.txt', 'pyproject.toml', 'shadow')], end='')"
    )
    execution = sandbox.run(walk)
    assert (execution.ending, execution.stdout) == ("ok", "")


def test_nothing_of_the_trainers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_treasure")
    runner = LocalSandbox(max_workers=1, preload=["ctypes"])
    runner.start()
    try:
        seen = runner.run("import os, ctypes\nprint(dict(os.environ), ctypes.CDLL(None).getenv(b'HF_TOKEN'))").stdout
        memory = runner.run(
            "import gc\nprint(any('trea' + 'sure' in str(o) for o in gc.get_objects() if isinstance(o, (dict, list))))"
        )
    finally:
        runner.close()
    assert "treasure" not in seen and seen.endswith("} 0\n")
    assert memory.stdout == "False\n"


def test_servers_of_the_host_are_out_of_reach(sandbox: LocalSandbox, tmp_path: Path) -> None:
    names = [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, str(tmp_path / "s")), (socket.AF_UNIX, "\0spo-test")]
    servers = []
    for family, address in names:
        server = socket.socket(family)
        server.bind(address)
        server.listen()
        server.settimeout(0)
        servers.append(server)
        target = server.getsockname()
        code = f"import socket\ns = socket.socket({int(family)})\ns.connect({target!r})"
        assert "PermissionError" in sandbox.run(code).stderr
        raw = "import socket, ctypes\na, b = socket.socketpair()\nc = ctypes.CDLL(None, use_errno=True)\n"
        raw += "print(c.connect(a.fileno(), bytes(16), 16), ctypes.get_errno())"
        assert sandbox.run(raw).stdout == "-1 1\n"
        with pytest.raises(BlockingIOError):
            server.accept()
    for server in servers:
        server.close()


def test_processes_of_the_host_are_out_of_reach(sandbox: LocalSandbox) -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        code = (
            "import os, ctypes\nc = ctypes.CDLL(None, use_errno=True)\nreached = []\n"
            f"for pid in [{victim.pid}, {os.getpid()}, *range(2, 40000)]:\n"
            "  try: os.kill(pid, 0); reached.append(pid)\n  except ProcessLookupError: pass\nreached"
        )
        assert sandbox.run(code).value == "[]"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_a_program_leaves_nothing_for_the_next(sandbox: LocalSandbox) -> None:
    sandbox.run("import os, math\nopen('left', 'w').write('x'); os.mkdir('dir'); math.pi = 3")
    assert sandbox.run("import os, math\nos.listdir('.'), math.pi > 3").value == "([], True)"


def test_programs_at_the_same_time_do_not_see_each_other(sandbox: LocalSandbox) -> None:
    code = "import os, time\nopen('mine', 'x').close(); time.sleep(0.4)\nos.listdir('.'), os.getpid()"
    values: list[str | None] = []
    threads = [threading.Thread(target=lambda: values.append(sandbox.run(code).value)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == ["(['mine'], 1)"] * 2


def test_threads_left_behind_end_with_the_program(sandbox: LocalSandbox) -> None:
    code = "import threading, time\nfor _ in range(4): threading.Thread(target=time.sleep, args=(60,)).start()\n"
    execution = sandbox.run(code + "print('end')")
    assert (execution.ending, execution.stdout) == ("ok", "end\n")


def test_at_most_max_threads(sandbox: LocalSandbox) -> None:
    code = (
        "import threading\ndone = threading.Event(); n = 0\ntry:\n  while n < 99:\n"
        "    threading.Thread(target=done.wait, daemon=True).start(); n += 1\nexcept RuntimeError: pass\nn"
    )
    assert sandbox.run(code).value == "8"


FORGERIES = {
    "garbage into every file": (
        "import os\nfor n in range(3, 300):\n  try: os.write(n, b'x' * 100)\n  except OSError: pass\nprint('own')"
    ),
    "every file closed": "import os\nprint('own', flush=True)\nos.closerange(0, 300)",
    "runner's objects": (
        "import gc, sys\nprint('own', flush=True)\nfor o in gc.get_objects():\n"
        "  if isinstance(o, dict) and '__name__' in o and 'sandbox' in str(o['__name__']): o.clear()"
    ),
    "builtins gone": "import builtins, sys\nprint('own', flush=True)\nvars(builtins).clear()",
    "modules gone": "import sys\nprint('own', flush=True)\nsys.modules.clear()",
    "atexit": "import atexit\natexit.register(lambda: print('late'))\nprint('own')",
    "stdout replaced": "import sys\nprint('own')\nsys.stdout = None",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_program_only_harms_its_own_result(sandbox: LocalSandbox, name: str) -> None:
    execution = sandbox.run(FORGERIES[name])
    assert execution.stdout == "own\n"
    assert execution.ending in ("ok", "error", "crash", "timeout")


def test_a_forged_report_changes_only_the_value(sandbox: LocalSandbox) -> None:
    execution = sandbox.run("import os\nos.write(3, b'v' + 'forged \\u00e9'.encode() + b'\\xff')\nos._exit(0)")
    assert (execution.value, execution.ending) == ("forged \u00e9\ufffd", "ok")
    assert sandbox.run("import os\nwhile True: os.write(3, b'v' * 1000)").ending == "output"


def test_bytes_that_are_no_text(sandbox: LocalSandbox) -> None:
    execution = sandbox.run("import os\nos.write(1, bytes(range(256)))\nos.write(2, b'\\xff\\xfe')")
    assert execution.stdout == bytes(range(256)).decode(errors="replace")
    assert execution.stderr == "\ufffd\ufffd"


def test_a_program_of_a_megabyte(sandbox: LocalSandbox) -> None:
    code = "x = '" + "a" * (1 << 20) + "'\nlen(x)"
    assert sandbox.run(code).value == str(1 << 20)
