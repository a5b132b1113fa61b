"""What programs in the local sandbox do and say, and how it lives through the death of its processes."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spo_lightning.errors import ConfigError
from spo_lightning.tools import sandbox as sandbox_module
from spo_lightning.tools import sandbox_kernel, sandbox_process
from spo_lightning.tools.protocol import Execution
from spo_lightning.tools.sandbox import LocalSandbox


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalSandbox]:
    runner = LocalSandbox(wall_time_s=5, max_workers=4)
    try:
        runner.start()
    except ConfigError as error:
        if "program in it" in str(error) or "first program" in str(error):
            raise  # programs run here, and the check of them failed
        pytest.skip(str(error))
    yield runner
    runner.close()


def descendants(root: int) -> set[int]:
    """Process ids below one, from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


VALUES = {
    "1 + 1": "2",
    "x = 3\nx": "3",
    "x = 3": None,
    "": None,
    "# nothing": None,
    "None": None,
    "print(7)": None,
    "'text'": "'text'",
    "2\n3": "3",
    "if True:\n    5": None,
    "5;": None,
    "x = 3\r\n(x);  # hidden": None,
    "5  # shown;": "5",
    "'é;'": "'é;'",
    "\ufeff1 + 1": "2",
    "0.1 + 0.2": "0.30000000000000004",
    "1e22, 1e-7, float('nan'), 1 / 3": "(1e+22, 1e-07, nan, 0.3333333333333333)",
    '"""a docstring"""\nx = 1': None,
    '"""a docstring"""': "'a docstring'",
    "__name__": "'__main__'",
    "def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nf(20)": "2432902008176640000",
    "from __future__ import annotations\ndef f(x: undefined): pass\nf.__annotations__": "{'x': 'undefined'}",
    "import sys\n__name__ in sys.modules, sys.modules['__main__'].__name__": "(True, '__main__')",
    '\'%d\' % 3 + """\n  <code>\n"""': "'3\\n  <code>\\n'",
    "x = 1\nx += 1  # the last statement is no expression": None,
    "(lambda: 4)()": "4",
    "class A:\n    def __repr__(self): return ''\nA()": "",
    "'é\\u2603'": "'é☃'",
    "import sympy\nx = sympy.Symbol('x')\nsympy.integrate(x**2, (x, 0, 3))": "9",
    "import numpy as np\nnp.linalg.det(np.array([[2.0, 0.0], [0.0, 3.0]]))": "6.0",
    "+".join(["1"] * 2500): "2500",
    "import sys\nsys.getrecursionlimit()": "1000",
    "input": "<built-in function input>",
    "import asyncio\nasync def f(): return 8\nasyncio.run(f())": "8",
    "from concurrent.futures import ThreadPoolExecutor\nlist(ThreadPoolExecutor(3).map(abs, [-1, 2]))": "[1, 2]",
    "open('f.txt', 'w').write('abc')\nopen('/run/sandbox/f.txt').read()": "'abc'",
    "import tempfile\ntempfile.gettempdir()": "'/run/sandbox'",
    "import shutil\nopen('a', 'w').write('abc')\nshutil.copy2('a', 'b')\nopen('b').read()": "'abc'",
    "import inspect\nclass A:\n    x = 1\ninspect.getsource(A)": "'class A:\\n    x = 1\\n'",
    "import sys\nclass F:\n    def flush(self): raise RuntimeError('no')\nsys.stdout = F()\n5": "5",
    "import sys\nsys.orig_argv, sys.argv": "(['<code>'], ['<code>'])",
    (
        "import asyncio, socket\nasync def main():\n  a, b = socket.socketpair()\n"
        "  _, writer = await asyncio.open_connection(sock=a)\n  reader, _ = await asyncio.open_connection(sock=b)\n"
        "  writer.write(b'to you\\n')\n  return await reader.readline(), await asyncio.to_thread(abs, -3)\n"
        "asyncio.run(main())"
    ): "(b'to you\\n', 3)",
    "open('own.py', 'w').write('y = 6')\nimport own\nown.y": "6",
    "import os\nos.path.expanduser('~'), os.getcwd()": "('/run/sandbox', '/run/sandbox')",
    "import os\nos.getpid(), os.getuid()": "(1, 1000)",
}


@pytest.mark.parametrize("code", VALUES)
def test_the_value_is_that_of_the_last_expression(sandbox: LocalSandbox, code: str) -> None:
    execution = sandbox.run(code)
    expected = VALUES[code]
    if expected == "6.0":
        assert float((execution.value or "nan").removeprefix("np.float64(").rstrip(")")) == pytest.approx(6.0)
    else:
        assert execution.value == expected, execution
    assert (execution.ending, execution.stderr, execution.detail) == ("ok", "", "")


def test_output_goes_where_the_program_sent_it(sandbox: LocalSandbox) -> None:
    code = "import sys\nprint('a', end='')\nsys.stderr.write('b')\nprint('é')\nprint(*range(3), sep='|')"
    execution = sandbox.run(code)
    assert (execution.stdout, execution.stderr, execution.value) == ("aé\n0|1|2\n", "b", None)


def test_stdin_is_empty(sandbox: LocalSandbox) -> None:
    execution = sandbox.run("import sys\nprint(repr(sys.stdin.read()))\ninput()")
    assert (execution.stdout, execution.ending) == ("''\n", "error")
    assert execution.stderr.endswith("EOFError: EOF when reading a line\n")


def test_a_traceback_shows_the_program_and_not_its_runner(sandbox: LocalSandbox) -> None:
    execution = sandbox.run("def f(x):\n    return 1 / x\nprint('before')\nf(0)")
    assert (execution.ending, execution.stdout, execution.value) == ("error", "before\n", None)
    assert execution.stderr.splitlines()[:6] == [
        "Traceback (most recent call last):",
        '  File "<code>", line 4, in <module>',
        "    f(0)",
        '  File "<code>", line 2, in f',
        "    return 1 / x",
        "           ~~^~~",
    ]
    assert execution.stderr.endswith("ZeroDivisionError: division by zero\n")
    chained = sandbox.run("try:\n    {}['a']\nexcept KeyError as e:\n    raise ValueError('b') from e").stderr
    assert "KeyError: 'a'" in chained and chained.endswith("ValueError: b\n") and "sandbox" not in chained


def test_syntax_errors(sandbox: LocalSandbox) -> None:
    execution = sandbox.run("print('not run')\nx = = 1")
    assert (execution.ending, execution.stdout) == ("error", "")
    assert execution.stderr.splitlines() == [
        '  File "<code>", line 2',
        "    x = = 1",
        "        ^",
        "SyntaxError: invalid syntax",
    ]


EXITS = {
    "exit()": ("ok", ""),
    "import sys\nsys.exit(0)": ("ok", ""),
    "import sys\nsys.exit(3)": ("error", ""),
    "import sys\nsys.exit('why')": ("error", "why\n"),
    "import sys\nsys.exit(type('X', (), {'__str__': lambda self: 1 / 0})())": ("error", ""),
    "raise SystemExit": ("ok", ""),
    "import os\nos._exit(0)": ("ok", ""),
    "import os\nos._exit(9)": ("error", ""),
}


@pytest.mark.parametrize("code", EXITS)
def test_exit_statuses(sandbox: LocalSandbox, code: str) -> None:
    execution = sandbox.run("print('x', flush=True)\n" + code)
    assert (execution.stdout, execution.ending, execution.stderr) == ("x\n", *EXITS[code])


def test_the_same_program_draws_the_same(sandbox: LocalSandbox) -> None:
    code = "import random, numpy\nrandom.random(), float(numpy.random.rand()), hash('text'), list({'a', 'b', 'c', 'd'})"
    values = {sandbox.run(code).value for _ in range(3)}
    assert len(values) == 1
    draws = sandbox.run("import random\nrandom.random() == random.random()").value
    assert draws == "False"


def test_limits_are_told_with_their_value() -> None:
    runner = LocalSandbox(1, wall_time_s=1.2, cpu_time_s=9, memory_bytes=64 << 20, max_output_bytes=1000, preload=[])
    runner.start()
    try:
        assert runner.run("print('begun')\nwhile True: pass") == Like(
            "begun\n", "timeout", "the program was stopped after 1.2 s of wall time"
        )
        assert runner.run("b' ' * 10**9") == Like("", "memory", "the program needed more than 64 MiB of memory")
        flood = runner.run("print('x' * 5000)")
        assert flood == Like("x" * 1000, "output", "the program was stopped: stdout passed 1000 bytes")
        assert runner.run("print('x' * 999)") == Like("x" * 999 + "\n", "ok", "")
        assert runner.run("'x' * 998").value == repr("x" * 998)
        assert runner.run("'x' * 999").ending == "output"
    finally:
        runner.close()


class Like:
    """Equal to an Execution with this stdout, ending and detail."""

    def __init__(self, stdout: str, ending: str, detail: str) -> None:
        self.fields = (stdout, ending, detail)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Execution) and (other.stdout, other.ending, other.detail) == self.fields

    def __repr__(self) -> str:
        return repr(self.fields)


def test_many_threads_call(sandbox: LocalSandbox) -> None:
    with ThreadPoolExecutor(32) as threads:
        values = list(threads.map(lambda n: sandbox.run(f"print({n})\n{n} ** 2"), range(64)))
    assert [(v.stdout, v.value) for v in values] == [(f"{n}\n", str(n * n)) for n in range(64)]


def test_no_more_programs_than_workers() -> None:
    runner = LocalSandbox(max_workers=2, preload=["time"])
    runner.start()
    try:
        code = "import time\na = time.monotonic(); time.sleep(0.2)\na, time.monotonic()"
        with ThreadPoolExecutor(6) as threads:
            spans = [eval(v.value or "") for v in threads.map(runner.run, [code] * 6)]
        assert max(sum(a <= start < b for a, b in spans) for start, _ in spans) <= 2
    finally:
        runner.close()


def test_calls_are_served_in_the_order_of_their_coming() -> None:
    runner = LocalSandbox(max_workers=1, preload=["time"])
    runner.start()
    served: list[str] = []

    def call_twice(name: str) -> None:
        for _ in range(2):
            runner.run("import time\ntime.sleep(0.2)")
            served.append(name)

    try:
        threads = [threading.Thread(target=call_twice, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
    finally:
        runner.close()
    assert "".join(served) == "abcabc"


def test_a_killed_zygote_is_replaced_and_its_calls_run_again(sandbox: LocalSandbox) -> None:
    before = descendants(os.getpid())
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(sandbox.run, f"import time\ntime.sleep(1)\n{n}") for n in range(4)]
        wait_until(lambda: len(descendants(os.getpid()) - before) >= 8)  # four supervisors, four programs
        zygote = min(pid for pid in before if b"sandbox_zygote" in Path(f"/proc/{pid}/cmdline").read_bytes())
        during = descendants(zygote)
        os.kill(zygote, signal.SIGKILL)
        results = [call.result() for call in calls]
        assert [result.value for result in results] == ["0", "1", "2", "3"], results
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in during | {zygote}))
    assert sandbox.run("1").value == "1"


def test_supervisors_killed_again_and_again_end_as_unavailable(sandbox: LocalSandbox) -> None:
    zygote = sandbox._living_zygote().pid
    wait_until(lambda: not descendants(zygote))
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(sandbox.run, "import time\ntime.sleep(4)")
        killed: set[int] = set()
        while len(killed) < 2:
            for pid in {p for p in descendants(zygote) if _parent(p) == zygote} - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.01)
        execution = call.result()
    assert execution.ending == "unavailable" and "could not run the program" in execution.detail
    wait_until(lambda: not descendants(zygote))
    assert sandbox.run("1").value == "1"


def test_a_zygote_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_process, "_PATIENCE_S", 0.3)
    runner = LocalSandbox(1, wall_time_s=1, preload=[])
    runner.start()
    try:
        stopped = runner._living_zygote().pid
        os.kill(stopped, signal.SIGSTOP)
        assert runner.run("6 * 7").value == "42"
        assert runner._living_zygote().pid != stopped
    finally:
        runner.close()


def test_a_machine_without_free_files_is_not_the_programs_fault(
    sandbox: LocalSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def socketpair() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(sandbox_process.socket, "socketpair", socketpair)
        execution = sandbox.run("1")
    assert execution.ending == "unavailable" and "Too many open files" in execution.detail
    assert sandbox.run("1").value == "1"


def test_no_program_runs_before_the_check_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    checking, go_on = threading.Event(), threading.Event()

    def check(*_: object) -> None:
        checking.set()
        go_on.wait(20)
        raise ConfigError("a program gets out")

    monkeypatch.setattr(sandbox_module, "check_isolation", check)
    before = descendants(os.getpid())
    runner = LocalSandbox(1, preload=[])
    with ThreadPoolExecutor(2) as threads:
        starts = [threads.submit(runner.start) for _ in range(2)]
        assert checking.wait(20)
        with pytest.raises(RuntimeError, match="call start"):
            runner.run("1")
        go_on.set()
        for start in starts:
            with pytest.raises(ConfigError, match="gets out"):
                start.result()
    with pytest.raises(RuntimeError, match="call start"):
        runner.run("1")
    wait_until(lambda: descendants(os.getpid()) <= before)


def test_a_trainer_with_many_open_files_can_start_it() -> None:
    bounds = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, bounds[1]), bounds[1]))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    runner = LocalSandbox(1, preload=[])
    try:
        runner.start()
        assert runner.run("1 + 1").value == "2"
    finally:
        runner.close()
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, bounds)


def test_packages_below_tmp_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = Path(tempfile.mkdtemp(dir="/tmp")) / "site-packages"
    packages.mkdir()
    (packages / "package_below_tmp.py").write_text("x = 'found'")
    monkeypatch.syspath_prepend(packages)
    runner = LocalSandbox(1, preload=["package_below_tmp"])
    try:
        runner.start()
        code = "import package_below_tmp, tempfile\ntempfile.NamedTemporaryFile().write(b'y'), package_below_tmp.x"
        assert runner.run(code).value == "(1, 'found')"
    finally:
        runner.close()
        shutil.rmtree(packages.parent)


@pytest.mark.skipif(sys.prefix.startswith("/tmp/"), reason="the packages of this interpreter lie there")
def test_tmp_is_the_programs_directory(sandbox: LocalSandbox) -> None:
    assert sandbox.run("open('/tmp/f.txt', 'w').write('abc')\nopen('f.txt').read()").value == "'abc'"


def test_the_project_is_not_in_the_path_of_programs(sandbox: LocalSandbox) -> None:
    assert str(Path(__file__).parents[1]) not in eval(sandbox.run("import sys\nsys.path").value or "")


def test_other_systems_are_told_what_to_use_instead() -> None:
    code = (
        "import os, sys\nsys.modules['resource'] = None\n"
        "from spo_lightning.tools.sandbox import LocalSandbox\nfrom spo_lightning.errors import ConfigError\n"
        "del os.sched_getaffinity\nsys.platform = 'darwin'\nrunner = LocalSandbox()\n"
        "print(runner.max_concurrent)\ntry: runner.start()\nexcept ConfigError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert said.stdout.startswith(f"{os.cpu_count()}\n"), said
    assert "this is darwin: it needs Linux; use SandboxFusion" in said.stdout


def test_workers_are_the_calls_at_a_time() -> None:
    assert LocalSandbox(max_workers=3).max_concurrent == 3
    assert LocalSandbox().max_concurrent == len(os.sched_getaffinity(0))


def test_a_limit_that_the_check_itself_passes_is_named() -> None:
    runner = LocalSandbox(1, preload=[], wall_time_s=0.1)
    runner.limits = dataclasses.replace(runner.limits, wall_time_s=0.0001)
    with pytest.raises(ConfigError, match="ended as 'timeout'.*Remedy: raise the limit that it names"):
        runner.start()


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.parametrize(("unsafe", "child"), [(False, False), (True, False), (False, True)])
def test_a_killed_trainer_leaves_no_process_behind(unsafe: bool, child: bool) -> None:
    """A child forked by the trainer, such as a data loader's worker, keeps the trainer's sockets open."""
    code = (
        "import os, threading, time\nfrom spo_lightning.tools.sandbox import LocalSandbox\n"
        f"runner = LocalSandbox(max_workers=3, wall_time_s=300, preload=[], unsafe_no_isolation={unsafe})\n"
        f"runner.start()\npid = os.fork() if {child} else -1\nif pid == 0: time.sleep(300)\nprint(pid, flush=True)\n"
        "for _ in range(3): threading.Thread(target=runner.run, args=('import time\\ntime.sleep(300)',)).start()\n"
        "time.sleep(300)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    try:
        holder = int(trainer.stdout.readline())
        wait_until(lambda: len(descendants(trainer.pid) - {holder}) == 7, 60)
        below = descendants(trainer.pid) - {holder}
    finally:
        trainer.kill()
        trainer.wait()
    try:
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
        assert not child or Path(f"/proc/{holder}").exists()
    finally:
        if child:
            os.kill(holder, signal.SIGKILL)


def test_what_the_kernel_says_of_a_program(sandbox: LocalSandbox) -> None:
    zygote = sandbox._living_zygote().pid
    wait_until(lambda: not descendants(zygote))
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(sandbox.run, "import time\nprint('on', flush=True)\ntime.sleep(1.5)")
        wait_until(lambda: len(descendants(zygote)) == 2)
        (program,) = (pid for pid in descendants(zygote) if _parent(pid) != zygote)
        process = Path(f"/proc/{program}")
        wait_until(lambda: "Seccomp:\t2" in (process / "status").read_text())
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
        assert [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0] * 4
        assert status["NoNewPrivs"] == "1"
        for pid in (program, zygote):
            assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
        assert set(status["Uid"].split()) == {str(os.geteuid() or 65534)}
        assert status["NSpid"].split()[-1] == "1"
        if os.geteuid() == 0:  # the program is not dumpable, so that its own user may not look
            assert {file.name for file in (process / "fd").iterdir()} == {"0", "1", "2", "3"}
            for name in ("user", "pid", "mnt", "ipc", "net", "uts"):
                assert os.readlink(process / "ns" / name) != os.readlink(f"/proc/self/ns/{name}")
            assert (process / "fd").stat().st_uid != 65534
            mounts = [line.split()[4:6] for line in (process / "mountinfo").read_text().splitlines()]
            writable = [point for point, options in mounts if not {"ro", "nosuid"} <= set(options.split(","))]
            devices = [point for point, options in mounts if "nodev" not in options.split(",")]
            assert writable == ["/run/sandbox"] and sorted(devices) == [
                f"/dev/{n}" for n in ("null", "random", "urandom", "zero")
            ]
            environment = Path(f"/proc/{zygote}/environ").read_bytes().split(b"\0")
            assert not {b"HOME", b"PATH", b"USER", b"PYTEST_CURRENT_TEST"} & {e.partition(b"=")[0] for e in environment}
        else:
            with pytest.raises(PermissionError):
                list((process / "fd").iterdir())
        assert call.result().ending == "ok"


def test_close_ends_everything_and_start_begins_again() -> None:
    before = descendants(os.getpid())
    runner = LocalSandbox(max_workers=2, preload=[])
    with pytest.raises(RuntimeError, match="call start"):
        runner.run("1")
    runner.start()
    thread = threading.Thread(target=runner.run, args=("import time\ntime.sleep(60)",))
    thread.start()
    wait_until(lambda: len(descendants(os.getpid()) - before) == 3)
    runner.close()
    thread.join(20)
    assert not thread.is_alive()
    wait_until(lambda: descendants(os.getpid()) <= before)
    with pytest.raises(RuntimeError, match="call start"):
        runner.run("1")
    runner.start()
    assert runner.run("5").value == "5"
    runner.close()
    runner.close()


def test_without_isolation_programs_run_and_keep_their_limits() -> None:
    runner = LocalSandbox(
        1, wall_time_s=1, memory_bytes=64 << 20, scratch_bytes=1 << 20, preload=[], unsafe_no_isolation=True
    )
    with pytest.warns(UserWarning, match="unsafe_no_isolation"):
        runner.start()
    try:
        folder = runner.run("import os\nopen('x', 'w').close()\nprint(os.getcwd())\nos.listdir('.')")
        assert folder.value == "['x']" and not Path(folder.stdout.strip()).exists()
        assert runner.run("import time\ntime.sleep(9)").ending == "timeout"
        assert runner.run("b'x' * 10**9").ending == "memory"
        assert "File too large" in runner.run("open('big', 'wb').write(b'x' * (2 << 20))").stderr
        assert runner.run("open('/etc/passwd').read(1)").ending == "ok"
        assert "HOME" not in (
            runner.run("import os\n[n for n in os.environ if n.startswith('PYTEST')]").value or "HOME"
        )
        real_time = runner.run("import os\nos.kill(os.getpid(), 40)")
        assert (real_time.ending, real_time.detail) == ("crash", "the program crashed with signal 40")
        child = runner.run("import os, time\npid = os.fork()\nif pid == 0: time.sleep(60)\nprint(pid)")
        wait_until(lambda: not Path(f"/proc/{child.stdout.strip()}").exists())
    finally:
        runner.close()


def test_a_module_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ConfigError, match="No module named 'no_such_module'.*leave it out of preload"):
        LocalSandbox(preload=["no_such_module"]).start()


def test_a_kernel_that_refuses_is_named() -> None:
    """A process under a filter of its own, in which unshare fails as in a container that forbids it."""
    code = (
        "import errno, sys, pyseccomp as s\nf = s.SyscallFilter(s.ALLOW)\n"
        "f.add_rule(s.ERRNO(errno.EPERM), 'unshare')\nf.load()\n"
        "from spo_lightning.tools.sandbox import LocalSandbox\nfrom spo_lightning.errors import ConfigError\n"
        "try: LocalSandbox(preload=[]).start()\nexcept ConfigError as error: print(error)"
    )
    pytest.importorskip("pyseccomp")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "unshare(CLONE_NEWUSER): Operation not permitted" in said.stdout, said
    for remedy in (
        "kernel.unprivileged_userns_clone=1",
        "seccomp=unconfined",
        "SandboxFusion",
        "unsafe_no_isolation: true",
    ):
        assert remedy in said.stdout


def test_refusals_name_the_call() -> None:
    with pytest.raises(sandbox_kernel.Refused, match="mount.*No such file or directory"):
        sandbox_kernel.mount("none", "/no/such/place", "tmpfs", 0)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_workers", 0),
        ("wall_time_s", 0.0),
        ("wall_time_s", float("nan")),
        ("wall_time_s", float("inf")),
        ("wall_time_s", 0.01),
        ("wall_time_s", 1e10),
        ("cpu_time_s", 0),
        ("cpu_time_s", 1.5),
        ("memory_bytes", 1 << 64),
        ("memory_bytes", 1),
        ("scratch_bytes", 0),
        ("max_output_bytes", 255),
        ("max_threads", -1),
    ],
)
def test_arguments_out_of_range(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{argument} is {value}; it must be a ")):
        LocalSandbox(**{argument: value})  # type: ignore[arg-type]


def test_modules_are_a_list() -> None:
    with pytest.raises(ValueError, match=r"preload is 'math'; it must be a list.*\['math'\]"):
        LocalSandbox(preload="math")
