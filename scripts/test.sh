#!/usr/bin/env bash
# Sets up a virtual environment, then runs lint, types and tests with coverage. Further arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" dev
export OMP_NUM_THREADS=1          # tests run in parallel processes; more threads would only fight
ruff check .
ruff format --check .
mypy
exec pytest "$@"
