# Functions of the install scripts: which build of torch this machine needs, and how to compile CUDA code for its card.

# Where an NVIDIA driver shows itself: a file of its own, or under WSL2 the library that Windows lends.
nvidia_files=(/dev/nvidiactl /usr/lib/wsl/lib/libcuda.so.1)

has_nvidia_gpu() {
    local file
    for file in "${nvidia_files[@]}"; do [ ! -e "$file" ] || return 0; done
    return 1
}

# AMD's driver, which shows itself for graphics inside a CPU, too.
has_amd_driver() { [ -e /dev/kfd ]; }

# Print the build of torch to install, cpu or gpu: TORCH_BUILD, or else what this machine has.
torch_build() {
    case ${TORCH_BUILD:-} in
        cpu | gpu) echo "$TORCH_BUILD" ;;
        '') if has_nvidia_gpu; then echo gpu; else echo cpu; fi ;;
        *) echo "TORCH_BUILD is $TORCH_BUILD, expected cpu or gpu." >&2; return 1 ;;
    esac
}

# Print the FLASH_ATTN_CUDA_ARCHS for a card's compute capability, such as 8.6: flash-attn builds for few, and code for
# 8.0 runs on all cards 8.x. Fails below 8.0.
flash_attn_arch() {
    local major=${1%%.*}
    ((major >= 8)) || return 1
    echo "$((major * 10))"
}

# Print how many compilers to run at once, for a number of cores and the GB of free memory: one of flash-attn's takes 5.
compiler_jobs() {
    local cores=$1 most=$(($2 / 5))
    echo "$((most < 1 ? 1 : most < cores ? most : cores))"
}

free_memory_gb() { awk '/^MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo; }
