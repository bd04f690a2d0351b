#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and nvcc: install flash-attn and apex, test the kernels, and time them.
#     bash launch/install_gpu.sh            everything: nearly all of the time is compiling: an hour on few cores
#     bash launch/install_gpu.sh --no-apex  without apex; PyTorch's AdamW is then used
#
# At the end it prints the table for megabert/kernels/README.md, and training speed beside transformers' models. Not run
# on a GPU yet. nvcc must be of the CUDA release that torch was built with. It compiles for the card that is there, on
# as many cores as memory allows; MAX_JOBS, FLASH_ATTN_CUDA_ARCHS and TORCH_CUDA_ARCH_LIST replace its choice.
set -euo pipefail
CDPATH= cd "$(dirname "$0")/.."
source launch/shared/gpu.sh
flash_attn=2.8.3.post2 # the newest with alibi_slopes and a deterministic backward; FlashAttention 3 and 4 have no ALiBi
apex=6424da3 # of github.com/NVIDIA/apex; PyPI's apex is an unrelated package

fail() { echo "install_gpu: $*" >&2; exit 1; }
for argument; do
    [ "$argument" = --no-apex ] || fail "unknown argument $argument; expected --no-apex or nothing."
done
has_nvidia_gpu || fail "no NVIDIA GPU here (${nvidia_files[0]} is missing). On a CPU: bash launch/install.sh"
command -v nvcc >/dev/null || fail "no nvcc. Install the CUDA toolkit of torch's CUDA release, and add it to PATH."
command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler. Install g++, or set CXX."

TORCH_BUILD=gpu bash launch/install.sh dev,kernels
python=.venv/bin/python
pip() { "$python" -m pip --disable-pip-version-check "$@"; }
capability=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') ||
    fail "torch sees no GPU, see above. If nvidia-smi lists one, its driver is older than torch's CUDA: update it."
arch=$(flash_attn_arch "$capability") ||
    fail "this GPU has compute capability $capability; flash-attn and the Triton kernels need 8.0. Train without" \
        "them: launch/install.sh is enough."
export FLASH_ATTN_CUDA_ARCHS=${FLASH_ATTN_CUDA_ARCHS:-$arch} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
export MAX_JOBS=${MAX_JOBS:-$(compiler_jobs "$(nproc)" "$(free_memory_gb)")} NVCC_THREADS=${NVCC_THREADS:-1}
echo "compiling for $FLASH_ATTN_CUDA_ARCHS and $TORCH_CUDA_ARCH_LIST, $MAX_JOBS compilers at once"

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
