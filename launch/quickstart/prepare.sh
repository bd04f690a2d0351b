#!/usr/bin/env bash
# Prepare the quickstart's data: docstrings -> text shards -> tokenizer -> token shards. Finished stages are reused.
# With an argument, run only one stage: text, tokenizer or tokens.
set -euo pipefail
CDPATH= cd "$(dirname "$0")/../.."
source launch/common.sh
enter_environment "" python
# A signal that ends this script ends the command that it runs, too.
command=
trap '[ -z "$command" ] || kill -TERM "$command" 2> /dev/null; exit 143' TERM HUP INT
run() {
    "$@" &
    command=$!
    wait "$command"
    command=
}

data=data/quickstart
stage=${1:-all}
# The fine-tuning task is made from held-out documents. The run reads less than a third of the others.
heldout=0.3

if [[ $stage != @(text|tokenizer|tokens|all) ]]; then
    echo "launch/quickstart/prepare.sh: unknown stage $stage, expected text, tokenizer or tokens" >&2
    exit 2
fi
if [[ $stage = @(text|all) ]]; then
    run python data_prep/write_shards.py --source docstrings --min-chars 200 --out $data/text \
        --heldout $heldout --replace
fi
if [[ $stage = @(tokenizer|all) ]]; then
    run python data_prep/train_tokenizer.py --source $data/text --out $data/tokenizer --vocab-size 8192
fi
if [[ $stage = @(tokens|all) ]]; then
    run python data_prep/write_shards.py --source $data/text --tokenizer $data/tokenizer --out $data/tokens \
        --heldout $heldout --replace
fi
