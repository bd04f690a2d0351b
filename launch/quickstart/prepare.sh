#!/usr/bin/env bash
# Prepare the quickstart's corpus: docstrings -> text shards -> tokenizer -> token shards. Finished parts are reused.
# Argument: only one stage: text, tokenizer or tokens.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=data/quickstart
stage=${1:-all}
case $stage in text | all)
    python data_prep/write_shards.py --source docstrings --min-chars 200 --out $data/text --replace ;;
esac
case $stage in tokenizer | all)
    python data_prep/train_tokenizer.py --source $data/text --out $data/tokenizer --vocab-size 8192 ;;
esac
case $stage in tokens | all)
    python data_prep/write_shards.py --source $data/text --tokenizer $data/tokenizer --out $data/tokens \
        --heldout 0.02 --replace ;;
esac
