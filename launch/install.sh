#!/usr/bin/env bash
# Install the package into .venv, at the versions of constraints.txt; do nothing while those and setup.py are unchanged.
# Argument: extras to install as well, such as dev or dev,kernels.
#
# Without an NVIDIA GPU it asks for torch's CPU build, which is gigabytes smaller. That build is not on PyPI: set
# TORCH_INDEX_URL to PyTorch's CPU index if pip does not find it. Otherwise the plain torch is installed; it works too.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}
want=$(cat setup.py constraints.txt | sha256sum | cut -d' ' -f1)
stamp=.venv/installed${extras:+-$extras}
[ "$(cat "$stamp" 2>/dev/null)" != "$want" ] || exit 0
echo "installing into .venv: takes some minutes the first time"
[ -x .venv/bin/python ] || python3 -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check -q "$@"; }
torch=$(grep '^torch==' constraints.txt)
if [ ! -e /dev/nvidiactl ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    index=(${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"})
    if ! pip install -c constraints.txt "$torch+cpu" "${index[@]}" 2>/dev/null; then
        echo "pip found no CPU build of torch; installing the plain one, with gigabytes of CUDA (see TORCH_INDEX_URL)"
        pip install -c constraints.txt "$torch"
    fi
fi
pip install -c constraints.txt -e ".${extras:+[$extras]}"
echo "$want" > "$stamp"
