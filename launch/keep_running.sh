#!/usr/bin/env bash
# Pretrain on one machine, starting again from the newest checkpoint after every crash:
#     OUT=runs/mosaicbert-base bash launch/keep_running.sh --recipe mosaicbert-base --data.train /data/shards
# Arguments are launch/pretrain.py's; DEEPSPEED holds the launcher's, such as "--num_gpus 4". Ctrl-C or SIGTERM ends it for good;
# the ranks save first. On SLURM, slurm/pretrain.sbatch does the same.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:?folder of the run, as run.output_dir}
DEEPSPEED=${DEEPSPEED:-}
MAX_CRASHES=${MAX_CRASHES:-3}   # start again so often after crashes without a new checkpoint between them
GRACE_S=60                      # ranks whose launcher is gone save and end within 45 s (megabert/training/distributed/signals.py)
[ ! -f .venv/bin/activate ] || source .venv/bin/activate
source launch/restart_policy.sh

stopping=
trap stop TERM INT
stop() {
    stopping=yes
    # To the ranks alone: the launcher would signal them one after the other, and a save needs them all; a loader worker dies of it.
    # $group is deepspeed, its child the launcher of this machine, and the children of that are the ranks.
    pkill -TERM -P "$(pgrep -d, -P "$group")" || true
}
alive() { pgrep -g "$group" > /dev/null; }

# --run.resume says where the first attempt begins; once this command has written a checkpoint, the others go on from that.
mkdir -p "$OUT" && touch "$OUT/.started" || true   # where nothing can be written, the ranks say so
crashes=0 before= flags=("$@")
while true; do
    if [ "$OUT/checkpoints/latest" -nt "$OUT/.started" ]; then
        keep_all_but_resume "$@"
        flags=("${kept[@]}" --run.resume auto)
    fi
    began=$SECONDS
    set -m   # a process group of its own, so that all that belongs to this attempt can be found
    # shellcheck disable=SC2086  # several words
    deepspeed $DEEPSPEED launch/pretrain.py --run.output_dir "$OUT" "${flags[@]}" &
    group=$!
    set +m
    while true; do   # a trapped signal ends wait early
        code=0
        wait "$group" || code=$?
        kill -0 "$group" 2> /dev/null || break
    done
    # The launcher says 0 where it was itself killed; then its ranks are still there.
    if alive; then
        [ "$code" -ne 0 ] || code=137
        for ((i = 0; i < GRACE_S; i++)); do alive || break; sleep 1; done
        kill -KILL -- "-$group" 2> /dev/null || true
    fi
    if [ -n "$stopping" ] || ((code == 0 || code == 2 || (code == 1 && SECONDS - began < 60))); then
        exit "$code"   # done, told to stop, or a mistake in the command
    fi
    latest=$(cat "$OUT/checkpoints/latest" 2> /dev/null || echo none)
    [ "$latest" = "$before" ] || crashes=0
    before=$latest
    if ((code != 85)) && ((++crashes > MAX_CRASHES)); then
        echo "keep_running: crash $crashes since checkpoint $latest, the last with exit code $code: giving up"
        exit "$code"
    fi
    echo "keep_running: ended with exit code $code, starting again from checkpoint $latest"
done
