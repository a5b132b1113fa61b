#!/usr/bin/env bash
# Sets up a virtual environment and trains the quickstart policy. Further arguments go to spo fit.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" base
exec spo fit --config configs/quickstart.yaml "$@"
