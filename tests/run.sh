#!/usr/bin/env bash
# Everything that a push must pass: format, lint, types, tests. Makes the environment if it is missing.
#     bash tests/run.sh             all of it
#     bash tests/run.sh -k stream   only pytest, with these arguments
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh dev,kernels
source .venv/bin/activate
export DS_ACCELERATOR=cpu TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY=PASSIVE   # tests start more processes than there are cores: a thread that spins keeps another from running
if [ $# -eq 0 ]; then
    ruff format --check .
    ruff check .
    pyrefly check
fi
pytest "$@"
