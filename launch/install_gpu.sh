#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and nvcc: install flash-attn and apex, test the kernels, and time them.
#     bash launch/install_gpu.sh            everything: half an hour or more, nearly all of it compiling
#     bash launch/install_gpu.sh --no-apex  without apex; PyTorch's AdamW is then used
#
# At the end it prints the table for megabert/kernels/README.md, and training speed beside transformers' models. Not run
# on a GPU yet. nvcc must be of the CUDA release that torch was built with. MAX_JOBS limits the number of compilers that
# run at once (default 4: each takes gigabytes).
set -euo pipefail
cd "$(dirname "$0")/.."
flash_attn=2.8.3.post2 # the newest with alibi_slopes and a deterministic backward; FlashAttention 3 and 4 have no ALiBi
apex=6424da3 # of github.com/NVIDIA/apex; PyPI's apex is an unrelated package
export MAX_JOBS=${MAX_JOBS:-4}

fail() { echo "install_gpu: $1" >&2; exit 1; }
for argument; do
    [ "$argument" = --no-apex ] || fail "unknown argument $argument; expected --no-apex or nothing."
done
[ -e /dev/nvidiactl ] || fail "no NVIDIA GPU here (/dev/nvidiactl is missing). On a CPU: bash launch/install.sh"
command -v nvcc >/dev/null || fail "no nvcc. Install the CUDA toolkit of torch's CUDA release, and add it to PATH."

bash launch/install.sh dev,kernels
python=.venv/bin/python
pip() { "$python" -m pip --disable-pip-version-check "$@"; }
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail ".venv has a torch that sees no GPU. Remove .venv and run this again; TORCH_INDEX_URL names another index."

echo "--- flash-attn $flash_attn"
pip install -q ninja packaging wheel setuptools
pip install --no-build-isolation "flash-attn==$flash_attn"

if [ "${1:-}" != --no-apex ]; then
    echo "--- apex $apex"
    mkdir -p build
    [ -d build/apex ] || git clone -q https://github.com/NVIDIA/apex build/apex
    git -C build/apex checkout -q "$apex" # fails if seven digits become ambiguous
    git -C build/apex rev-parse HEAD
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ./build/apex
    "$python" -c 'import torch, amp_C'
fi

echo "--- tests on the GPU"
"$python" -m pytest -m gpu -q
echo "--- benchmark: paste this into megabert/kernels/README.md"
"$python" tests/benchmarks/bench_kernels.py --json build/bench_kernels.json
echo "--- benchmark: training"
"$python" tests/benchmarks/bench_train.py --json build/bench_train.json
