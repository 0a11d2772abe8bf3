#!/usr/bin/env bash
# All the tests, from nothing. Arguments go to pytest: scripts/test.sh -k scheduler.
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH" XDG_CACHE_HOME="$PWD/.cache"
python scripts/make_smollm2.py .demo/smollm2
python scripts/fetch_old_sources.py .cache/old-sources || echo "tests that read old modeling files will be skipped" >&2
# One process for each processor; worksteal, because a few tests take as long as a hundred others.
exec pytest -n auto --dist worksteal "$@"
