#!/usr/bin/env bash
# Set up .venv with the extras test and browser (whose chromium is the system's), then lint, check types and run the tests.
#
#   bash tests/run.sh                  everything but the soak and gpu tests, in one worker more than cores
#   bash tests/run.sh -m soak          arguments go to pytest, in one worker; lint and types are then left out
set -euo pipefail

root="$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
cd -- "$root"
bash launch/setup.sh test browser

python="$root/.venv/bin/python"
if (($# == 0)); then
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
    # One thread a worker: threads of several workers that spin while they wait would take each other's cores.
    export OMP_NUM_THREADS=1
    set -- -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
fi

# A marker expression among the arguments comes later and wins.
exec "$python" -m pytest -m "not soak and not gpu" "$@"
