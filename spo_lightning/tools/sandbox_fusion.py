"""Running programs on a SandboxFusion service (https://github.com/bytedance/SandboxFusion)."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from spo_lightning.errors import ConfigError
from spo_lightning.tools import fusion_driver
from spo_lightning.tools.fusion_requests import FusionError, FusionRequests
from spo_lightning.tools.protocol import CodeRunner, Ending, Execution

_PROBE = "6 * 7"
_SIGNALS_FROM = 128  # a shell's exit status for a signal is this and its number


class SandboxFusion(CodeRunner):
    """Sends programs to ``POST {url}/run_code``, each with a script of ours that runs it and reports.

    The report, a file that comes back with the answer, holds the value of the last bare expression, so that what the
    program prints cannot be taken for it. The service isolates the programs; how well depends on how it is set up.

    Args:
        url: base URL of the service, e.g. ``"http://10.0.0.7:8080"``.
        run_timeout_s: most seconds of one program.
        memory_limit_mb: most MiB of one program.
        max_output_chars: most characters of standard output, and of error output; what is longer is cut, and the
            program ends with "output".
        request_timeout_s: most seconds until an answer, the wait for a place on the service included; longer than
            ``run_timeout_s``.
        max_concurrency: requests of this process under way at once; others wait.
        max_requests_per_second: of this process; ``None`` for no limit.
        retries: further attempts after a failure of the service that may pass; the model is told of the last one.
        retry_delay_s: before the first of them; it doubles each time.
        headers: of every request, for a service that asks who comes.

    Raises:
        ValueError: arguments out of range.
    """

    def __init__(
        self,
        url: str,
        run_timeout_s: float = 10.0,
        memory_limit_mb: int = 1024,
        max_output_chars: int = 65536,
        request_timeout_s: float = 30.0,
        max_concurrency: int = 64,
        max_requests_per_second: float | None = None,
        retries: int = 3,
        retry_delay_s: float = 0.5,
        headers: dict[str, str] | None = None,
    ) -> None:
        problems = [] if url.startswith(("http://", "https://")) else [f"url is {url!r}; it must begin with http(s)://"]
        positive: Mapping[str, float | None] = {
            "run_timeout_s": run_timeout_s,
            "memory_limit_mb": memory_limit_mb,
            "max_output_chars": max_output_chars,
            "max_concurrency": max_concurrency,
            "max_requests_per_second": max_requests_per_second,
        }
        problems += [
            f"{name} is {value}; it must be positive"
            for name, value in positive.items()
            if value is not None and not value > 0
        ]
        problems += [
            f"{name} is {value}; it must not be negative"
            for name, value in (("retries", retries), ("retry_delay_s", retry_delay_s))
            if value < 0
        ]
        if not request_timeout_s > run_timeout_s:
            problems.append(f"request_timeout_s is {request_timeout_s}; it must exceed run_timeout_s={run_timeout_s}")
        if problems:
            raise ValueError("bad SandboxFusion arguments: " + "; ".join(problems))
        self.max_concurrent = max_concurrency
        self._url = url.rstrip("/")
        self._run_timeout = run_timeout_s
        self._memory_limit = memory_limit_mb
        self._max_output_chars = max_output_chars
        self._request_options: dict[str, Any] = {
            "headers": dict(headers or {}),
            "timeout": request_timeout_s,
            "retries": retries,
            "retry_delay": retry_delay_s,
            "max_requests_per_second": max_requests_per_second,
            "max_concurrency": max_concurrency,
        }
        self._requests: FusionRequests | None = None
        self._driver = resources.files("spo_lightning.tools").joinpath("fusion_driver.py").read_text()

    def start(self) -> None:
        """Run a small program.

        Raises:
            ConfigError: the service does not answer, or does not run it as it should.
        """
        self._requests = FusionRequests(self._url, **self._request_options)
        execution = self.run(_PROBE)
        if execution.value != "42":
            self.close()
            problem = execution.detail or f"{_PROBE!r} gave {execution}"
            raise ConfigError(
                f"SandboxFusion at {self._url} runs no programs: {problem}; start the service "
                "(https://github.com/bytedance/SandboxFusion), correct url or headers, or use LocalSandbox"
            )

    def run(self, code: str) -> Execution:
        """Run one program on the service."""
        requests = self._requests
        if requests is None:
            raise RuntimeError("SandboxFusion is not started; call start() first")
        program = base64.b64encode(code.encode("utf-8", "surrogatepass")).decode("ascii")
        body = {
            "code": self._driver,
            "language": "python",
            "run_timeout": self._run_timeout,
            "memory_limit_MB": self._memory_limit,
            "files": {fusion_driver.PROGRAM_FILE: program},
            "fetch_files": [fusion_driver.REPORT_FILE],
        }
        try:
            answer = requests.post("/run_code", body, _problem)
        except FusionError as error:
            return Execution("", "", None, "unavailable", f"The program could not be run: {error}.")
        return self._execution(answer["run_result"], _report(answer))

    def close(self) -> None:
        """Drop connections; programs under way are given up."""
        if self._requests is not None:
            self._requests.close()
            self._requests = None

    def _execution(self, result: dict[str, Any], report: dict[str, Any]) -> Execution:
        ending, detail = self._ending(result, report)
        stdout, stderr = str(result.get("stdout") or ""), str(result.get("stderr") or "")
        value = report.get("value")
        most = self._max_output_chars
        texts = [text for text in (stdout, stderr, value) if isinstance(text, str)]
        if ending in ("ok", "error") and any(len(text) > most for text in texts):
            ending, detail = "output", f"The output was cut after {most} characters."
        return Execution(
            stdout=stdout[:most],
            stderr=stderr[:most],
            value=value[:most] if isinstance(value, str) else None,
            ending=ending,
            detail=detail,
            seconds=float(seconds) if isinstance(seconds := result.get("execution_time"), int | float) else 0.0,
        )

    def _ending(self, result: dict[str, Any], report: dict[str, Any]) -> tuple[Ending, str]:
        if result["status"] == "TimeLimitExceeded":
            return "timeout", f"The program was stopped after {self._run_timeout:g} s."
        if report.get("ending") == "memory":
            return "memory", f"The program needed more than {self._memory_limit} MiB of memory."
        status = result["return_code"]
        if report:
            return ("ok" if status == 0 else "error"), ""
        if status < 0 or status > _SIGNALS_FROM:
            number = -status if status < 0 else status - _SIGNALS_FROM
            return "crash", f"The program was ended by signal {number}."
        return ("ok" if status == 0 else "error"), ""


def _problem(answer: dict[str, Any]) -> str:
    """What makes an answer of no use."""
    if answer.get("status") not in ("Success", "Failed"):
        return f"{answer.get('status')}: {str(answer.get('message'))[:200]}"
    result = answer.get("run_result")
    if not isinstance(result, dict) or result.get("status") not in ("Finished", "TimeLimitExceeded"):
        return f"run_result is {str(result)[:200]}"
    if result["status"] == "Finished" and not isinstance(result.get("return_code"), int):
        return f"return_code is {result.get('return_code')!r}"
    return ""


def _report(answer: dict[str, Any]) -> dict[str, Any]:
    """What the driver has written; empty when the program did not let it, or has written something else there."""
    files = answer.get("files")
    encoded = files.get(fusion_driver.REPORT_FILE) if isinstance(files, dict) else None
    try:
        report = json.loads(base64.b64decode(encoded)) if isinstance(encoded, str) else None
    except (ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}
