# Decides what follows an attempt to train; launch/keep_running.sh and launch/slurm/pretrain.sbatch source this file.

MAX_CRASHES=${MAX_CRASHES:-3}   # restarts after crashes without a new checkpoint between them
QUICK_S=60                      # an attempt that fails with exit code 1 before this is an error of the user
crashed_at=()                   # the newest checkpoint at each crash so far

# Print the name of the newest checkpoint of the output folder $1, or none.
newest_checkpoint() { cat "$1/checkpoints/latest" 2> /dev/null || echo none; }

# Set `action` to stop or again for an attempt that ended with exit code $1 after $2 seconds, when $3 is the newest
# checkpoint. For a crash, add $3 to `crashed_at` and set `crashes` to their number at this checkpoint.
#     0: done   2, or 1 at once: an error of the user   85: stopped on request, and saved   anything else: a crash
decide() {
    local code=$1 seconds=$2 latest=$3 checkpoint
    action=again crashes=0
    if ((code == 0 || code == 2 || (code == 1 && seconds < QUICK_S))); then
        action=stop
    elif ((code != 85)); then
        crashed_at+=("$latest")
        for checkpoint in "${crashed_at[@]}"; do
            [ "$checkpoint" != "$latest" ] || crashes=$((crashes + 1))
        done
        ((crashes <= MAX_CRASHES)) || action=stop
    fi
}

# Set `flags` to the user's flags ($3 and on) for the next attempt in the output folder $1. Once a checkpoint is newer
# than the file $2, which the first attempt touched, the run resumes from it, whatever --run.resume the user gave.
set_flags() {
    local out=$1 started=$2
    shift 2
    flags=("$@")
    [ "$out/checkpoints/latest" -nt "$started" ] || return 0
    flags=()
    while (($#)); do
        case ${1//-/_} in
            __run.resume=* | __resume=*) ;;
            __run.resume | __resume) [ $# -eq 1 ] || shift ;;
            *) flags+=("$1") ;;
        esac
        shift
    done
    flags+=(--run.resume auto)
}
