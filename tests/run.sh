#!/usr/bin/env bash
# Install what is missing, then run every check: bash tests/run.sh [pytest arguments]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash tools/install.sh cpu dev
export PATH=${VIRTUAL_ENV:-$root/.venv}/bin:$PATH
export OMP_NUM_THREADS=1

ruff check .
ruff format --check .
# pyright is a node program that its Python package fetches at the first start.
if pyright --version >/dev/null 2>&1; then
    pyright
else
    echo "tests: pyright could not be fetched (no network?): types are not checked"
fi
command -v chromium chromium-browser google-chrome >/dev/null ||
    echo "tests: there is no browser: the page of tools/show_rollout.py is not opened in one" \
        "(apt-get install chromium)"
# One worker a core and 6 GiB, at most 4: a worker's tests start whole jobs of several processes.
cores=$(env -u OMP_NUM_THREADS nproc) memory=$(($(awk '/MemAvailable/ {print $2}' /proc/meminfo) / 6291456))
workers=$((cores < memory ? cores : memory))
python -m pytest -n $((workers > 4 ? 4 : workers > 1 ? workers : 0)) --durations=30 "$@"
