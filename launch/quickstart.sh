#!/usr/bin/env bash
# Prepare a small corpus, pretrain, export and fine-tune: some twelve minutes on two cores with AMX after
# installing. Finished stages are reused; after an interruption the same command continues.
set -euo pipefail
CDPATH= cd "$(dirname "$0")/.."
source launch/common.sh
source launch/shared/gpu.sh
# Processes of a stage that was asked to stop end within this time: the ranks save first.
GRACE_S=60
group=
trap 'stop 143' TERM
trap 'stop 129' HUP
trap 'stop 130' INT
stop() {
    # A second Ctrl-C.
    trap 'kill -KILL -- "-$group"' INT
    if [ -n "$group" ]; then
        kill -TERM -- "-$group" 2> /dev/null || true
        end_group $GRACE_S
    fi
    exit "$1"
}
# Run a command whose processes do not outlive this script.
run_stage() {
    start_group "$@"
    wait_for_group
    group=
    return "$code"
}

run_stage bash launch/install.sh
source .venv/bin/activate
export TOKENIZERS_PARALLELISM=false
# On a busy machine a thread that spins while it waits takes the core from the thread it waits for: ten times slower.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# The deepspeed launcher starts one rank per GPU, and would find none where torch sees none.
sees_gpu() { python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }
{ { has_nvidia_gpu || has_amd_driver; } && sees_gpu; } || export DS_ACCELERATOR=cpu
run=runs/quickstart
mkdir -p $run

# Run one named stage, and write its time to times.tsv until there is a summary: reused stages take no time.
stage() {
    local name=$1 began=${EPOCHREALTIME/,/.} code=0
    shift
    say "--- $name"
    run_stage "$@" || code=$?
    if [ ! -f $run/summary.json ]; then
        awk -v name="$name" -v a="$began" -v b="${EPOCHREALTIME/,/.}" \
            'BEGIN {printf "%s\t%.2f\n", name, b - a}' >> $run/times.tsv
    fi
    return $code
}

stage "corpus: docstrings of the installed packages" bash launch/quickstart/prepare.sh text
stage "tokenizer" bash launch/quickstart/prepare.sh tokenizer
stage "token shards" bash launch/quickstart/prepare.sh tokens
stage "pretraining" \
    deepspeed --master_port "$(free_port)" launch/pretrain.py --ds_config ds_configs/zero0.json \
    --run.keep_every_steps 500
stage "export to Hugging Face" \
    python launch/convert_to_hf.py $run $run/hf
stage "fine-tuning data" \
    python data_prep/fetch_tasks.py --text data/quickstart/text --movies false
stage "fine-tuning" \
    python launch/finetune_glue.py --checkpoint $run/hf --task-file data_prep/tasks/parameter-type.yaml \
    --protocol quickstart --baselines --out $run/finetune
stage "score against pretraining time" \
    python launch/pareto.py --runs $run --task-file data_prep/tasks/parameter-type.yaml \
    --protocol quickstart-one-seed --out $run/score
say "--- summary"
run_stage python launch/quickstart/summarize.py
cat 2> /dev/null <<TEXT || true

Next: the paper's model, on your corpus:
    python data_prep/write_shards.py --source CORPUS --tokenizer TOKENIZER --out data/mine --heldout 0.001
    deepspeed launch/pretrain.py --ds_config ds_configs/zero1.json --recipe mosaicbert-base --data.train data/mine
TEXT
