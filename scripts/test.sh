#!/usr/bin/env bash
# Lint, types, documentation and tests in .venv, then the tests on real vLLM engines in .venv-vllm; sets both
# up when needed. Further arguments go to the first pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" dev,docs
export OMP_NUM_THREADS=1          # tests run in parallel processes; more threads would only fight
if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    vllm_log="$(mktemp)"
    set -m                        # a process group of its own, to be ended with all that it started
    bash scripts/setup_vllm_cpu.sh > "$vllm_log" 2>&1 &    # while what follows keeps one processor busy
    vllm_setup=$!
    set +m
    trap 'kill -- "-$vllm_setup" 2> /dev/null || true; rm -f "$vllm_log"' EXIT
fi
ruff check .
ruff format --check .
mypy
bash scripts/docs.sh
pytest --ignore tests/vllm "$@"
if [ -n "${vllm_setup:-}" ]; then
    wait "$vllm_setup" || { cat "$vllm_log" >&2; exit 1; }
    .venv-vllm/bin/python -m pytest tests/vllm -n 0
else
    echo "tests/vllm: not run, vLLM for the CPU is pinned for Python 3.11"
fi
