#!/usr/bin/env bash
# Everything that a push must pass: format, lint, types, tests. Makes the environment if it is missing.
#     bash tests/run.sh             all of it
#     bash tests/run.sh --lint      without the tests
#     bash tests/run.sh -k stream   only pytest, with these arguments
set -euo pipefail
CDPATH= cd "$(dirname "$0")/.."
bash launch/install.sh dev,kernels
source .venv/bin/activate
export DS_ACCELERATOR=cpu TOKENIZERS_PARALLELISM=false
# The tests start more processes than there are cores; a thread that spins while it waits would keep others from
# running.
export OMP_WAIT_POLICY=PASSIVE
if [ $# -eq 0 ] || [ "$1" = --lint ]; then
    ruff format --check .
    ruff check .
    pyrefly check
    [ $# -eq 0 ] || exit 0
fi
# One test process per core; a file's tests stay together, so that its fixtures are made once. The order is
# conftest.py's.
pytest -n auto --dist loadfile --no-loadscope-reorder --durations=25 "$@"
