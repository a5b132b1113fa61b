#!/usr/bin/env bash
# Makes .venv-trl: TRL on the CPU, for scripts/bench_against_trl.py; once for each state of this file.
# torch and transformers are those that .venv has, so that both sides run on the same ones.
# TORCH_INDEX: where the CPU build of torch comes from, a package index.
# usage: scripts/setup_trl.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/spo ]; then source scripts/setup_env.sh base; fi
version() { .venv/bin/python -c 'import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))' "$1"; }
torch="$(version torch)" transformers="$(version transformers)"
wanted=("torch==${torch%%+*}" "transformers==$transformers" trl==1.16.0 "math-verify==$(version math-verify)")
stamp=".venv-trl/.installed-$(echo "${wanted[@]}" | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "setting up .venv-trl (once, about two minutes, 1.5 GB): ${wanted[*]} ..."
    [ -x .venv-trl/bin/python ] || .venv/bin/python -m venv .venv-trl
    pip=(.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check)
    # PyPI's torch brings CUDA; the CPU build is installed first, so that only it is looked up there
    torch_index="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
    "${pip[@]}" --no-deps --extra-index-url "$torch_index" "torch==$torch"
    "${pip[@]}" "${wanted[@]}"
    touch "$stamp"
fi
