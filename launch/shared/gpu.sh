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

# Print the GB of free memory: the machine's, or the limit that SLURM or a container sets by cgroups, if that is lower.
free_memory_gb() {
    local root=${1:-} least folder controllers file limit
    least=$(awk '/^MemAvailable/ {printf "%.0f", $2 * 1024}' "$root/proc/meminfo")
    while IFS=: read -r _ controllers folder; do
        case $controllers in
            '') folder=$root/sys/fs/cgroup$folder file=memory.max ;;
            *memory*) folder=$root/sys/fs/cgroup/memory$folder file=memory.limit_in_bytes ;;
            *) continue ;;
        esac
        # A limit of a folder holds for those below it, too.
        while [[ $folder == $root/sys/fs/cgroup* ]]; do
            limit=$(cat "$folder/$file" 2> /dev/null) || limit=max
            if [[ $limit =~ ^[0-9]+$ ]] && ((limit < least)); then least=$limit; fi
            folder=${folder%/*}
        done
    done < "$root/proc/self/cgroup"
    echo $((least / 1073741824))
}
