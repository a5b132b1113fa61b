"""A real ``vllm serve`` on loopback, as a child process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

FLAGS = (
    "--worker-extension-cls spo_lightning.rollouts.server_worker.ServerWorker --logprobs-mode processed_logprobs "
    '--weight-transfer-config {"backend":"spo"} --enable-scale-out '
    "--dtype float32 --enforce-eager --max-num-seqs 16 --kv-cache-memory-bytes 67108864 --max-model-len 1024 "
    "--disable-uvicorn-access-log --no-enable-chunked-prefill --max-num-batched-tokens 2048"
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class ServerProcess:
    """Starts at once; does not wait until it answers. ``kill`` and ``freeze`` act on all its processes."""

    def __init__(self, model: Path, log: Path, port: int | None = None, flags: str = FLAGS) -> None:
        self.model, self.log, self.flags = model, log, flags
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        environment = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *self.flags.split()]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def freeze(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """kill -9 of the server and its engine process; returns when they are gone."""
        with suppress(ProcessLookupError):  # the engine process may outlive the server
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
