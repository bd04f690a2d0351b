#!/usr/bin/env bash
# Repeat the export check of every architecture, and use MosaicBERT and BERT in every way, under several versions of
# transformers, each in its own environment without megabert. GTE, as which MosaicBERT with RoPE is exported, needs
# transformers 5. At the end, optimum opens ONNX graphs, with the version of transformers that it takes.
#     bash tests/convert/check_transformers_versions.sh                # 4.50.3, 4.57.6 and that of constraints.txt
#     bash tests/convert/check_transformers_versions.sh 4.53.3 5.0.0   # these
# The first run takes some minutes: it installs transformers, accelerate (for Trainer), sentence-transformers and
# optimum. torch is linked from .venv. The environments are kept in the folder that the variable ENVIRONMENTS names.
set -euo pipefail
CDPATH= cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
versions=("$@")
[ $# -gt 0 ] || versions=(4.50.3 4.57.6 "$(sed -n 's/^transformers==//p' constraints.txt)")
environments=${ENVIRONMENTS:-build/transformers-versions}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
.venv/bin/python -m tests.convert.helpers.write_exports "$scratch"
# run FOLDER PROGRAM [ARGUMENTS]: print the program's last line, or all lines if it fails.
run() {
    local folder=$1
    shift
    echo -n "$folder: "
    HF_MODULES_CACHE="$scratch/modules-$version" "$environment/bin/python" -P "$1" "$scratch/exports/$folder" "${@:2}" \
        > "$scratch/log" 2>&1 || { cat "$scratch/log"; exit 1; }
    tail -1 "$scratch/log"
}
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# make_environment NAME PACKAGE...: a Python environment with torch and these packages.
make_environment() {
    environment=$environments/$1
    [ ! -e "$environment/complete" ] || return 0
    rm -rf "$environment"
    python3 -m venv "$environment"
    own=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    ln -s "$site"/torch "$site"/torchgen "$site"/functorch "$site"/torch-*.dist-info "$own"
    "$environment/bin/pip" install -q --disable-pip-version-check "${@:2}"
    touch "$environment/complete"
}
for version in "${versions[@]}"; do
    make_environment "$version" "transformers==$version" accelerate sentence-transformers
    mkdir -p "$scratch/$version"
    for path in "$scratch"/exports/*; do
        folder=${path##*/}
        if [ "$folder" = rope-mosaicbert ] && ! "$environment/bin/python" -c 'from transformers import GteConfig' \
            2> "$scratch/log"; then
            grep -q "cannot import name 'GteConfig'" "$scratch/log" || { cat "$scratch/log"; exit 1; }
            echo "transformers $version has no GTE: $folder is left out"
            continue
        fi
        run "$folder" megabert/convert/check/subprocess_check.py
        case $folder in
        mosaicbert | bert)
            mkdir "$scratch/$version/$folder"
            run "$folder" tests/convert/helpers/use_folder.py --all --scratch="$scratch/$version/$folder"
            ;;
        esac
    done
done

version=optimum
make_environment $version optimum-onnx==0.1.0 onnxruntime
for path in "$scratch"/exports/*/onnx; do
    folder=$(basename "$(dirname "$path")")
    run "$folder" tests/convert/helpers/use_ort_model.py
done
