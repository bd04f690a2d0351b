#!/usr/bin/env bash
# Make .venv with the package in it, at the versions of constraints.txt; reused while those and setup.py stay the same.
# Argument: extras to install too, such as dev or dev,kernels.
#
# Where there is no NVIDIA GPU it asks for torch's CPU build, which is gigabytes smaller. That build is not on PyPI: set
# TORCH_INDEX_URL to PyTorch's CPU index if pip does not find it. Without it the plain torch is installed, which also works.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}
want=$(cat setup.py constraints.txt | sha256sum | cut -d' ' -f1)
stamp=.venv/installed${extras:+-$extras}
[ "$(cat "$stamp" 2>/dev/null)" != "$want" ] || exit 0
echo "installing into .venv: some minutes the first time"
[ -x .venv/bin/python ] || python3 -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check -q "$@"; }
torch=$(grep '^torch==' constraints.txt)
if [ ! -e /dev/nvidiactl ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    if ! pip install -c constraints.txt "$torch+cpu" ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} 2>/dev/null; then
        echo "pip found no CPU build of torch; taking the plain one, which may bring gigabytes of CUDA (see TORCH_INDEX_URL)"
        pip install -c constraints.txt "$torch"
    fi
fi
pip install -c constraints.txt -e ".${extras:+[$extras]}"
echo "$want" > "$stamp"
