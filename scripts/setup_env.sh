# Sourced by the other scripts: enters the project root and makes its virtual environment, once for each state of pyproject.toml.
# usage: source setup_env.sh [extra]     extra: an optional-dependencies group, e.g. dev

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed, $python is $("$python" --version 2>&1); set PYTHON to a newer one" >&2
    exit 1
fi
stamp=".venv/.installed-${1:-base}-$(cksum < pyproject.toml | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "setting up .venv (once, about two minutes) ..."
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${1:+[$1]}"
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
