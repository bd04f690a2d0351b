# Decides what follows an attempt to train; launch/keep_running.sh and launch/slurm/pretrain.sbatch source this file.

# Restarts after crashes without a new checkpoint between them.
MAX_CRASHES=${MAX_CRASHES:-3}
# The newest checkpoint at each crash so far.
crashed_at=()

# Print the name of the newest checkpoint of the output folder $1, or none.
newest_checkpoint() { cat "$1/checkpoints/latest" 2> /dev/null || echo none; }

# Set `action` to stop or again for an attempt that ended with exit code $1, when $2 is the newest checkpoint. For a
# crash, add $2 to `crashed_at` and set `crashes` to their number at this checkpoint. launch/README.md lists the codes:
#     0: done   2: an error of the user   130: a second Ctrl-C   85: stopped on request, and saved
#     any other: a crash, or a full disk
decide() {
    local code=$1 latest=$2 checkpoint
    action=again crashes=0
    if ((code == 0 || code == 2 || code == 130)); then
        action=stop
    elif ((code != 85)); then
        crashed_at+=("$latest")
        for checkpoint in "${crashed_at[@]}"; do
            [ "$checkpoint" != "$latest" ] || crashes=$((crashes + 1))
        done
        ((crashes <= MAX_CRASHES)) || action=stop
    fi
}

# Print the host of the ranks that the last line of a log among $@ names as the cause of a crash, if it is one host.
crashed_host() {
    local log last named hosts
    for log; do
        last=$(tail -n 1 -- "$log" 2> /dev/null || true)
        # Ranks that stand still together are named together, such as all of a host. Of several hosts, or if some ranks
        # are not named, none is known to be the cause.
        named=${last%%:*}
        mapfile -t hosts < <(grep -oE 'rank [0-9]+ on [^ :,]+ \(' <<< "$named" | cut -d ' ' -f 4 | sort -u)
        ((${#hosts[@]} < 2)) && [[ $named != *" more have "* ]] || continue
        if [[ $last =~ ^rank\ [0-9]+\ on\ ([^\ :,]+)\ .*\;\ ending\ rank ]]; then
            echo "${BASH_REMATCH[1]}"
            return
        fi
    done
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
