"""Race MegaBERT against transformers' Trainer to the same held-out loss and the same fine-tuning score, on CPU cores.

    python tests/benchmarks/race/run.py [--quick] [--class same-size|open] [--corpus NAME] [--json FILE]

Rules, results and what has been measured so far: README.md beside this file. Every finished measurement is a line of
OUT/records.jsonl, so after an interruption the same command continues. All of it takes hours; --quick at most ten
minutes on two quiet cores, with one seed and a budget too small for a result. Trainer needs one more package: pip
install accelerate.
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

from race import command  # noqa: E402

if __name__ == "__main__":
    command.main(__doc__ or "")
