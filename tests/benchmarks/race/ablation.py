"""The paper's ablation on CPU cores, at equal time by the race's clock: BERT, BERT with one change, and MosaicBERT.

    python tests/benchmarks/race/ablation.py [--quick] [--corpus NAME] [--json FILE]

It prints the table and writes OUT/ablation-CORPUS.md and .png: held-out loss and fine-tuning score against seconds.
Everything runs in MegaBERT's own code. Records, clock and --out as in run.py; README.md beside this file has the rules.
"""

import os
import sys
from pathlib import Path

# For the reason given in bench_train.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Not this folder itself, whose modules have names like those of other packages.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from race import variants  # noqa: E402

if __name__ == "__main__":
    variants.main(__doc__ or "")
