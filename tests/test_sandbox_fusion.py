"""The client of SandboxFusion, over real HTTP to a stand-in service that really runs the scripts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from spo_lightning.errors import ConfigError
from spo_lightning.tools import SandboxFusion
from spo_lightning.tools.fusion_requests import RateLimit

from fusion_service import FusionService, Handler, run_code


@pytest.fixture
def service():
    service = FusionService()
    yield service
    service.close()


@pytest.fixture
def fusion(service):
    fusion = SandboxFusion(
        service.url,
        run_timeout_s=5.0,
        memory_limit_mb=300,
        max_output_chars=2000,
        request_timeout_s=8.0,
        retry_delay_s=0.01,
        headers={"X-Key": "secret"},
    )
    fusion.start()
    yield fusion
    fusion.close()


def status(code, text="no", **headers):
    return lambda handler: handler.answer(code, text, **headers)


# Programs


def test_value_and_output_are_told_apart(fusion):
    execution = fusion.run("print('out')\nimport sys\nprint('err', file=sys.stderr)\n[1, 'a']")
    assert (execution.stdout, execution.stderr, execution.value) == ("out\n", "err\n", "[1, 'a']")
    assert execution.ending == "ok" and execution.detail == "" and execution.seconds > 0


@pytest.mark.parametrize(
    "code, value",
    [
        ("1\n2", "2"),  # only the last one is shown, and once
        ("x = 3", None),
        ("None", None),
        ("print(4)", None),
        ("if True:\n    5", None),
        ("f'{6}'", "'6'"),
        ("", None),
        ("# nothing", None),
        ("x = 1; x", "1"),
        ("import os\nos.environ['MKL_NUM_THREADS']", "'1'"),
        ("__name__", "'__main__'"),
        (
            "import os, sys\nsorted(os.listdir('.')) + sys.argv[1:]",
            "['tmpscript.py']",
        ),  # what we sent is not in the way
        ("def f(n):\n    return n and f(n - 1)\nf(50)", "0"),
        ("s = '''\n  indented\n'''\ns", "'\\n  indented\\n'"),
        ("class C: pass\nimport pickle\nlen(pickle.dumps(C)) > 0", "True"),
        ("input()", None),
    ],
)
def test_last_bare_expression(fusion, code, value):
    assert fusion.run(code).value == value


def test_program_is_compiled_as_it_stands(fusion):
    # the driver's own future import would leave annotations unevaluated
    execution = fusion.run("def f(x: 1 + 1): pass\nf.__annotations__")
    assert execution.value == "{'x': 2}"


def test_same_traceback_as_python(fusion, tmp_path):
    code = "def f(x):\n    return 1 / x\n\n\nf(0)\n"
    path = tmp_path / "program.py"
    path.write_text(code)
    real = subprocess.run([sys.executable, path], capture_output=True, text=True).stderr
    execution = fusion.run(code)
    assert execution.stderr == real.replace(str(path), "<code>")
    assert execution.ending == "error" and execution.value is None
    syntax = fusion.run("x = = 1")
    assert syntax.ending == "error" and syntax.stderr.endswith("SyntaxError: invalid syntax\n")
    assert "fusion_driver" not in syntax.stderr and "tmpscript" not in syntax.stderr


@pytest.mark.parametrize(
    "code, ending, said",
    [
        ("raise SystemExit(3)", "error", ""),
        ("import sys\nsys.exit()", "ok", ""),
        ("import sys\nsys.exit('bye')", "error", "bye\n"),
        ("import os\nos._exit(0)", "ok", ""),
        ("import os\nos._exit(7)", "error", ""),
        ("x = 'a' * (2 ** 30)", "memory", "MemoryError"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "crash", ""),
        ("class C:\n    def __repr__(self): raise ValueError('mine')\nC()", "error", "ValueError: mine\n"),
        ("'\ud800'.encode()", "error", "surrogates not allowed"),
        ("a\0b", "error", "null bytes"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", "ok", ""),
    ],
)
def test_endings(fusion, code, ending, said):
    execution = fusion.run(code)
    assert execution.ending == ending and said in execution.stderr
    expected = {"memory": "more than 300 MiB", "crash": "signal 11"}.get(ending, "")
    assert expected in execution.detail and bool(expected) == bool(execution.detail)


def test_timeout_keeps_what_was_printed(service):
    fusion = SandboxFusion(service.url, run_timeout_s=0.5, request_timeout_s=8.0)
    fusion.start()
    execution = fusion.run("print('before', flush=True)\nwhile True: pass")
    assert (execution.ending, execution.stdout) == ("timeout", "before\n")
    assert execution.detail == "The program was stopped after 0.5 s."
    execution = fusion.run("print('x' * 70_000, flush=True)\nwhile True: pass")
    assert (execution.ending, execution.stdout) == ("timeout", "x" * 65536)


@pytest.mark.parametrize("code", ["print('x' * 5000)", "import sys\nsys.stderr.write('x' * 5000)", "'x' * 20_000_000"])
def test_long_output_is_cut(fusion, code):
    execution = fusion.run(code)
    assert execution.ending == "output" and "2000" in execution.detail
    longest = max(execution.stdout, execution.stderr, execution.value or "", key=len)
    assert len(longest) == 2000


@pytest.mark.parametrize("report", ["garbage", "[1]", '{"value": 5, "ending": []}', "[" * 100_000])
def test_forged_report_is_harmless(fusion, report):
    code = f"import os\nopen('.spo_report', 'w').write({report!r})\nos._exit(0)"
    execution = fusion.run(code)
    assert (execution.ending, execution.value) == ("ok", None)


# The service's faults


def test_passing_faults_are_tried_again(service, fusion):
    sandbox_error = json.dumps({"status": "SandboxError", "message": "no pod", "run_result": None})
    half_result = json.dumps({"status": "Success", "run_result": {"status": "Finished"}})
    for fault in [
        *[status(code) for code in (408, 429, 500, 503, 504)],
        *[status(200, text) for text in ("garbage", "[]", "[" * 100_000, sandbox_error, half_result, "{}")],
        lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
    ]:
        service.faults = [fault]
        before = len(service.bodies)
        assert fusion.run("6 + 1").value == "7"
        assert len(service.bodies) == before + 2


def test_faults_that_last_are_told(service, fusion):
    service.faults = [status(500)] * 4
    before = len(service.bodies)
    execution = fusion.run("1")
    assert execution.ending == "unavailable" and "answered 500" in execution.detail
    assert "attempt 4 of 4" in execution.detail and len(service.bodies) == before + 4
    assert fusion.run("1").value == "1"


def test_refusals_are_not_tried_again(service, fusion):
    service.faults = [status(401, "who are you?")]
    before = len(service.bodies)
    execution = fusion.run("1")
    assert execution.ending == "unavailable" and "who are you?" in execution.detail
    assert len(service.bodies) == before + 1


def test_backoff_grows_and_obeys_the_service(service, fusion, monkeypatch):
    waits = []
    monkeypatch.setattr(fusion._requests, "_wait", waits.append)
    monkeypatch.setattr(fusion._requests, "_retry_delay", 1.0)
    service.faults = [status(500), status(429, Retry_After="7"), status(429, Retry_After="9999")]
    assert fusion.run("1").value == "1"
    pauses = [wait for wait in waits if wait > 0]
    assert 0.5 <= pauses[0] <= 1 and pauses[1:] == [7.0, 30.0]
    del waits[:]
    service.faults = [status(500)] * 3
    assert fusion.run("1").value == "1"
    pauses = [wait for wait in waits if wait > 0]
    assert all(2**i / 2 <= pause <= 2**i for i, pause in enumerate(pauses)) and len(pauses) == 3


def test_slow_answers_are_given_up(service):
    fusion = SandboxFusion(service.url, run_timeout_s=0.3, request_timeout_s=0.5, retries=1, retry_delay_s=0.01)
    released = threading.Event()

    def drip(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while not released.wait(0.1):
            handler.wfile.write(b" ")

    fusion.start()
    service.faults = [lambda _: released.wait(60), drip]
    execution = fusion.run("1")
    released.set()
    assert execution.ending == "unavailable" and "slowly" in execution.detail and "attempt 2 of 2" in execution.detail


def test_answers_may_come_in_chunks(service, fusion):
    def in_chunks(handler: Handler) -> None:
        text = json.dumps(run_code(service.bodies[-1])).encode()
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for begin in range(0, len(text), 50):
            part = text[begin : begin + 50]
            handler.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    service.faults = [in_chunks]
    execution = fusion.run("print('x' * 200)\n1 + 1")
    assert (execution.stdout, execution.value) == ("x" * 200 + "\n", "2")


def test_huge_answers_are_refused(service, fusion):
    service.faults = [status(200, " " * (2**24 + 1))]
    execution = fusion.run("1")
    assert execution.ending == "unavailable" and "more than 16777216 bytes" in execution.detail


# Limits of the client


def test_rate_limit_spaces_requests():
    now = 100.0
    limit = RateLimit(4.0, clock=lambda: now)
    assert [limit.delay() for _ in range(4)] == [0.0, 0.25, 0.5, 0.75]
    now = 100.5
    assert limit.delay() == 0.5  # at 101.0
    now = 200.0
    assert [limit.delay(), limit.delay()] == [0.0, 0.25]  # idle time is not saved up
    free = RateLimit(None, clock=lambda: now)
    assert [free.delay() for _ in range(3)] == [0.0] * 3


def test_every_attempt_takes_a_place_in_the_rate_limit(service, fusion, monkeypatch):
    waits = []
    monkeypatch.setattr(fusion._requests, "_wait", waits.append)
    monkeypatch.setattr(fusion._requests, "_rate", RateLimit(0.5, clock=lambda: 0.0))
    monkeypatch.setattr(fusion._requests, "_retry_delay", 0.0)
    service.faults = [status(500)]
    fusion.run("1")
    fusion.run("1")
    assert waits == [0.0, 0.0, 2.0, 4.0]  # place, backoff, place, place


def test_threads_share_the_client_and_its_places(service):
    fusion = SandboxFusion(service.url, max_concurrency=3)
    fusion.start()
    with ThreadPoolExecutor(12) as pool:
        executions = list(pool.map(fusion.run, [f"import time\ntime.sleep(0.05)\n{i}" for i in range(12)]))
    assert [execution.value for execution in executions] == [str(i) for i in range(12)]
    assert service.most_running == 3


# Life


def test_request_is_what_the_service_expects(service, fusion):
    fusion.run("1")
    body = service.bodies[-1]
    assert body["language"] == "python" and body["run_timeout"] == 5.0 and body["memory_limit_MB"] == 300
    assert set(body) == {"code", "language", "run_timeout", "memory_limit_MB", "files", "fetch_files"}
    assert service.headers[-1]["x-key"] == "secret" and service.headers[-1]["content-type"] == "application/json"


def test_start_refuses_a_service_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    fusion = SandboxFusion(url, retries=1, retry_delay_s=0.01)
    with pytest.raises(ConfigError, match=rf"SandboxFusion at {url} runs no programs: .*start the service"):
        fusion.start()
    with pytest.raises(RuntimeError, match="not started"):
        fusion.run("1")


def test_start_refuses_a_service_that_does_not_run_programs(service):
    result = {"status": "Finished", "return_code": 0, "stdout": "", "stderr": ""}
    service.faults = [status(200, json.dumps({"status": "Success", "run_result": result, "files": {}}))]
    with pytest.raises(ConfigError, match=r"'6 \* 7' gave Execution"):
        SandboxFusion(service.url).start()


def test_close_frees_whoever_waits_and_start_begins_again(service, fusion):
    service.faults = [status(429, Retry_After="30")] * 4
    with ThreadPoolExecutor(1) as pool:
        before = len(service.bodies)
        waiting = pool.submit(fusion.run, "1")
        while len(service.bodies) == before:
            time.sleep(0.01)
        fusion.close()
        execution = waiting.result(timeout=20)
    assert execution.ending == "unavailable" and "closed" in execution.detail
    with pytest.raises(RuntimeError, match="not started"):
        fusion.run("1")
    service.faults = []
    fusion.start()
    assert fusion.run("2").value == "2"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"url": "localhost:8080"}, "url is 'localhost:8080'; it must begin with http"),
        ({"run_timeout_s": 0}, "run_timeout_s is 0; it must be positive"),
        ({"max_requests_per_second": 0}, "max_requests_per_second is 0; it must be positive"),
        ({"retries": -1}, "retries is -1; it must not be negative"),
        ({"request_timeout_s": 10.0}, "request_timeout_s is 10.0; it must exceed run_timeout_s=10.0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SandboxFusion(**{"url": "http://localhost", **options})
