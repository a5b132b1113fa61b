# Sourced by the other scripts: enters the project root and makes its virtual environment, once for each state of pyproject.toml.
# usage: source setup_env.sh EXTRAS     EXTRAS: base, or optional-dependencies groups, e.g. dev or dev,docs

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed, $python is $("$python" --version 2>&1); set PYTHON to a newer one" >&2
    exit 1
fi
stamps=()
for extra in $(tr , ' ' <<< "$1"); do
    stamps+=(".venv/.installed-$extra-$(cksum < pyproject.toml | cut -d' ' -f1)")
done
if ! ls "${stamps[@]}" > /dev/null 2>&1; then
    echo "setting up .venv (once, about two minutes) ..."
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$([ "$1" = base ] || echo "[$1]")"
    touch "${stamps[@]}"
fi
export PATH="$PWD/.venv/bin:$PATH"
