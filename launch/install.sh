#!/usr/bin/env bash
# Install the package into .venv, at the versions of constraints.txt; do nothing while those, setup.py and the kind of
# torch are unchanged. Argument: extras to install as well, such as dev or dev,kernels.
#
# TORCH_BUILD=gpu or cpu says which torch to install; without it, this machine's NVIDIA GPU or its absence does. On a
# login node without a GPU, for compute nodes that have them: TORCH_BUILD=gpu bash launch/install.sh.
#
# Without a GPU it asks for torch's CPU build, which is gigabytes smaller. That build is not on PyPI: set
# TORCH_INDEX_URL to PyTorch's CPU index if pip does not find it. Otherwise the plain torch is installed; it works too.
# For AMD's GPUs install PyTorch's ROCm build into .venv first: a torch that can use a GPU is kept.
set -euo pipefail
CDPATH= cd "$(dirname "$0")/.."
source launch/shared/gpu.sh
extras=${1:-}
build=$(torch_build) || exit 1
versions=$(cat setup.py constraints.txt | sha256sum | cut -d' ' -f1)
stamp=.venv/installed${extras:+-$extras}
case $(cat "$stamp" 2>/dev/null || true) in
    # A torch for GPUs works on CPUs too.
    "$versions $build" | "$versions gpu") exit 0 ;;
esac
echo "installing into .venv, torch for $build: takes some minutes the first time"
[ -x .venv/bin/python ] || python3 -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check -q "$@"; }
has_torch() { .venv/bin/python -c 'import torch' 2>/dev/null; }
can_use_gpus() {
    .venv/bin/python -c 'import torch, sys; sys.exit(not (torch.version.cuda or torch.version.hip))' 2>/dev/null
}
torch=$(grep '^torch==' constraints.txt)
index=(${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"})
if [ "$build" = cpu ] && ! has_torch; then
    if ! pip install -c constraints.txt "$torch+cpu" "${index[@]}" 2>/dev/null; then
        echo "pip found no CPU build of torch; installing the plain one, with gigabytes of CUDA (see TORCH_INDEX_URL)"
        pip install -c constraints.txt "$torch"
    fi
elif [ "$build" = gpu ] && ! can_use_gpus; then
    # pip would keep a CPU build: its version satisfies the constraint.
    ! has_torch || pip uninstall -y torch
    pip install -c constraints.txt "$torch" "${index[@]}"
    if ! can_use_gpus; then
        echo "install: pip found only a CPU build of $torch. Set TORCH_INDEX_URL to PyTorch's index of a CUDA release" \
            "and run this again, or set TORCH_BUILD=cpu." >&2
        exit 1
    fi
fi
pip install -c constraints.txt -e ".${extras:+[$extras]}"
! can_use_gpus || build=gpu
echo "$versions $build" > "$stamp"
