"""A stand-in for a SandboxFusion service: it speaks ``POST /run_code`` and runs the scripts, without isolating them.

What it does with a script, its files, its limits and its output follows sandbox/runners/base.py and
sandbox/server/sandbox_api.py of SandboxFusion. Faults are queued in ``faults`` and each spoils one request.
"""

from __future__ import annotations

import base64
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = Callable[["Handler"], None]


class FusionService:
    """Attributes say what came in: ``bodies`` and ``headers`` of all requests, and how many ran at once at most."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.service = self  # type: ignore[attr-defined]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        service: FusionService = self.server.service  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with service.lock:
            service.bodies.append(body)
            service.headers.append({name.lower(): value for name, value in self.headers.items()})
            service.running += 1
            service.most_running = max(service.most_running, service.running)
            fault = service.faults.pop(0) if service.faults else None
        if fault is not None:
            fault(self)
        elif self.path != "/run_code":
            self.answer(404, "{}")
        else:
            self.answer(200, json.dumps(run_code(body)))

    def answer(self, status: int, text: str, **headers: str) -> None:
        service: FusionService = self.server.service  # type: ignore[attr-defined]
        with service.lock:  # before the client can send its next request
            service.running -= 1
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


def run_code(body: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in body["files"].items():
            (Path(folder) / name).write_bytes(base64.b64decode(content))
        (script := Path(folder) / "tmpscript.py").write_text(body["code"])
        result = _run(script, folder, body)
        files = {
            name: base64.b64encode(path.read_bytes()).decode()
            for name in body["fetch_files"]
            if (path := Path(folder) / name).is_file()
        }
    status = "Success" if result.get("return_code") == 0 else "Failed"
    return {"status": status, "message": "", "compile_result": None, "run_result": result, "files": files}


def _run(script: Path, folder: str, body: dict[str, Any]) -> dict[str, Any]:
    def limit_memory() -> None:
        most = body["memory_limit_MB"] * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))

    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=limit_memory,
    )
    began = time.monotonic()
    try:
        stdout, stderr = process.communicate(timeout=body["run_timeout"])
        status = {"status": "Finished", "return_code": process.returncode}
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        status = {"status": "TimeLimitExceeded", "return_code": None}
    return {
        **status,
        "execution_time": time.monotonic() - began,
        "stdout": _decode(stdout),
        "stderr": _decode(stderr),
    }


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return f"[DecodeError] {error}"
