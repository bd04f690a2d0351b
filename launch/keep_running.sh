#!/usr/bin/env bash
# Pretrain on one machine, and start again from the newest checkpoint after every crash:
#     OUT=runs/mosaicbert-base bash launch/keep_running.sh --recipe mosaicbert-base --data.train /data/shards
# The arguments are those of launch/pretrain.py, without --run.output_dir; DEEPSPEED holds the launcher's, such as
# "--num_gpus 4". Ctrl-C or SIGTERM stops it; the ranks save first. launch/restart_policy.sh says when it starts again.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:?folder of the run, as run.output_dir}
DEEPSPEED=${DEEPSPEED:-}
# Ranks whose launcher is gone save and end within 45 s (megabert/training/distributed/signals.py).
GRACE_S=60
[ ! -f .venv/bin/activate ] || source .venv/bin/activate
source launch/restart_policy.sh

stopping=
trap stop TERM INT
stop() {
    stopping=yes
    # Signal the ranks only. The launcher would signal them one after the other, and a save needs all of them; a loader
    # worker would die. $group is deepspeed, its child is this machine's launcher, whose children are the ranks.
    pkill -TERM -P "$(pgrep -d, -P "$group")" || true
}
alive() { pgrep -g "$group" > /dev/null; }

# If this folder cannot be written to, the ranks report it.
mkdir -p "$OUT" && touch "$OUT/.started" || true
while true; do
    set_flags "$OUT" "$OUT/.started" "$@"
    began=$SECONDS
    set -m   # a process group of its own, so that all processes of this attempt can be found
    # shellcheck disable=SC2086  # several words
    deepspeed $DEEPSPEED launch/pretrain.py --run.output_dir "$OUT" "${flags[@]}" &
    group=$!
    set +m
    while true; do   # a trapped signal ends wait early
        code=0
        wait "$group" || code=$?
        kill -0 "$group" 2> /dev/null || break
    done
    # A launcher that was killed leaves its ranks behind, and `deepspeed` then exits with 0.
    if alive; then
        [ "$code" -ne 0 ] || code=137
        for ((i = 0; i < GRACE_S; i++)); do alive || break; sleep 1; done
        kill -KILL -- "-$group" 2> /dev/null || true
    fi
    latest=$(newest_checkpoint "$OUT")
    decide "$code" $((SECONDS - began)) "$latest"
    [ -z "$stopping" ] || action=stop
    if [ $action = stop ]; then
        ((crashes <= MAX_CRASHES)) ||
            echo "keep_running: crash $crashes since checkpoint $latest, the last with exit code $code: giving up"
        exit "$code"
    fi
    echo "keep_running: ended with exit code $code, starting again from checkpoint $latest"
done
