#!/usr/bin/env bash
# Builds the documentation into build/docs; fails on any warning, broken link or anchor. Sets up .venv when needed.
# usage: docs.sh [--links]     --links: fetch the external links too, which needs a network
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" docs
export OMP_NUM_THREADS=1
sphinx-build -E -q -W --keep-going -b html docs build/docs
if [ "${1:-}" = --links ]; then
    sphinx-build -E -q -W --keep-going -b linkcheck docs build/docs-links
fi
echo "documentation: build/docs/index.html"
