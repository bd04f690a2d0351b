#!/usr/bin/env bash
# Repeat the export check, and use exported folders in every way, under several versions of transformers, each in its
# own environment without megabert.
#     bash tests/convert/check_transformers_versions.sh                # 4.50.3, 4.57.6 and that of constraints.txt
#     bash tests/convert/check_transformers_versions.sh 4.53.3 5.0.0   # these
# The first run takes some minutes: it installs transformers, accelerate (for Trainer) and sentence-transformers. torch
# is linked from .venv. The environments are kept in the folder that the variable ENVIRONMENTS names.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
versions=("$@")
[ $# -gt 0 ] || versions=(4.50.3 4.57.6 "$(sed -n 's/^transformers==//p' constraints.txt)")
environments=${ENVIRONMENTS:-build/transformers-versions}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
.venv/bin/python -m tests.convert.helpers.write_exports "$scratch"
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for version in "${versions[@]}"; do
    environment=$environments/$version
    if [ ! -e "$environment/complete" ]; then
        rm -rf "$environment"
        python3 -m venv "$environment"
        own=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        ln -s "$site"/torch "$site"/torchgen "$site"/functorch "$site"/torch-*.dist-info "$own"
        "$environment/bin/pip" install -q --disable-pip-version-check \
            "transformers==$version" accelerate sentence-transformers
        touch "$environment/complete"
    fi
    for folder in mosaicbert bert; do
        mkdir -p "$scratch/$version-$folder"
        every_use="tests/convert/helpers/use_folder.py --all --scratch=$scratch/$version-$folder"
        for program in megabert/convert/check/subprocess_check.py "$every_use"; do
            # shellcheck disable=SC2086  # a program and its arguments
            HF_MODULES_CACHE="$scratch/modules-$version" "$environment/bin/python" -P $program "$scratch/$folder" \
                > "$scratch/log" 2>&1 || { cat "$scratch/log"; exit 1; }
            tail -1 "$scratch/log"
        done
    done
done
