#!/usr/bin/env bash
# Prepare a small corpus, pretrain, export and fine-tune: at most ten minutes on two CPU cores after installing.
# Finished stages are reused; after an interruption the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh
source .venv/bin/activate
export TOKENIZERS_PARALLELISM=false
# On a busy machine a thread that spins while it waits takes the core from the thread it waits for: ten times slower.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
[ -e /dev/nvidiactl ] || export DS_ACCELERATOR=cpu
run=runs/quickstart
mkdir -p $run

# Run one stage, and write its time to times.tsv until there is a summary: reused stages take no time.
stage() {
    local name=$1 began=${EPOCHREALTIME/,/.} code=0
    shift
    echo "--- $name"
    "$@" || code=$?
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
    deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json
stage "export to Hugging Face" \
    python launch/convert_to_hf.py $run $run/hf
stage "fine-tuning data" \
    python data_prep/fetch_tasks.py
stage "fine-tuning" \
    python launch/finetune_glue.py --checkpoint $run/hf --task-file data_prep/tasks/movie-sentiment.yaml \
    --protocol quickstart --baselines --out $run/finetune
echo "--- summary"
python launch/quickstart/summarize.py
cat <<TEXT

Next: the paper's model, on your corpus:
    python data_prep/write_shards.py --source CORPUS --tokenizer TOKENIZER --out data/mine --heldout 0.001
    deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json --recipe mosaicbert-base --data.train data/mine
TEXT
