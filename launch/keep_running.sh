#!/usr/bin/env bash
# Pretrain on one machine, and start again from the newest checkpoint after every crash:
#     OUT=runs/mosaicbert-base bash launch/keep_running.sh --recipe mosaicbert-base --data.train /data/shards
# The arguments are those of launch/pretrain.py, without --run.output_dir; DEEPSPEED holds the launcher's, such as
# "--num_gpus 4". Ctrl-C, SIGTERM or a closed terminal stops it; the ranks save first. A second Ctrl-C ends them at
# once. launch/shared/restart_policy.sh says when it starts again.
set -euo pipefail
CDPATH= cd "$(dirname "$0")/.."
source launch/common.sh
OUT=${OUT:?folder of the run, as run.output_dir}
check_output "$OUT"
DEEPSPEED=${DEEPSPEED:-}
# Ranks whose launcher is gone save and end within 45 s (megabert/training/distributed/signals.py).
GRACE_S=60
enter_environment "$([ ! -f .venv/bin/activate ] || echo .venv)" deepspeed
source launch/shared/restart_policy.sh

stopping=
group=
trap stop TERM HUP USR1 USR2
trap interrupt INT
stop() {
    stopping=yes
    [ -n "$group" ] || exit 143
    # Signal the ranks only. The launcher would signal them one after the other, and a save needs all of them. $group is
    # deepspeed, its child is this machine's launcher, whose children are the ranks. Without ranks nothing is saved.
    pkill -TERM -P "$(pgrep -d, -P "$group")" 2> /dev/null || kill -TERM -- "-$group" 2> /dev/null || true
}
interrupt() {
    if [ -n "$stopping" ]; then kill -KILL -- "-$group" 2> /dev/null || true; else stop; fi
}

# If this folder cannot be written to, the ranks report it.
mkdir -p "$OUT" && touch "$OUT/.started" || true
while true; do
    set_flags "$OUT" "$OUT/.started" "$@"
    # Another run may have the launcher's usual port.
    port=()
    [[ $DEEPSPEED = *--master_port* ]] || port=(--master_port "$(free_port)")
    # DEEPSPEED may hold several words.
    # shellcheck disable=SC2086
    start_group deepspeed "${port[@]}" $DEEPSPEED launch/pretrain.py --run.output_dir "$OUT" "${flags[@]}"
    wait_for_group
    # A launcher that was killed leaves its ranks behind, and `deepspeed` then exits with 0.
    if alive; then
        [ "$code" -ne 0 ] || code=137
        end_group $GRACE_S
    fi
    latest=$(newest_checkpoint "$OUT")
    decide "$code" "$latest"
    [ -z "$stopping" ] || action=stop
    if [ $action = stop ]; then
        ((crashes <= MAX_CRASHES)) ||
            say "keep_running: crash $crashes since checkpoint $latest, the last with exit code $code: giving up"
        exit "$code"
    fi
    say "keep_running: ended with exit code $code, starting again from checkpoint $latest"
done
