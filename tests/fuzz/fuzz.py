"""Feed hostile inputs to every reader, in one process, and count what a user would see.

    python tests/fuzz/fuzz.py [--quick] [--seed N] [--cases N] [--kind KIND ...] [--json FILE]

Prints one line per kind: inputs tried, accepted with the right value, refused with one clear line, tracebacks, hangs,
accepted with a wrong value (silent), and errors that name neither file nor setting. The exit code is 1 if any of the
last four is not 0; the inputs follow, and `--seed` makes them again.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from tests.fuzz.damaged_folders import checkpoint_cases, hf_folder_cases, resealed_checkpoint_cases, shard_cases
from tests.fuzz.ds_configs import ds_config_cases
from tests.fuzz.outcome import HANG, SILENT, TRACEBACK, UNNAMED, Case, Tally
from tests.fuzz.recipes import flag_cases, recipe_cases
from tests.fuzz.texts import task_cases, text_cases

KINDS: dict[str, Callable[[Path, Random], Iterator[Case]]] = {
    "recipes": recipe_cases,
    "flags": flag_cases,
    "ds_configs": ds_config_cases,
    "shards": shard_cases,
    "checkpoints": checkpoint_cases,
    "resealed": resealed_checkpoint_cases,
    "hf_folders": hf_folder_cases,
    "texts": text_cases,
    "tasks": task_cases,
}
QUICK_CASES, FULL_CASES = 100, 10_000
# A bomb must fail, not fill the machine.
MAX_MEMORY = 12 << 30


def fuzz(kind: str, cases: int, seed: int) -> Tally:
    """Try this number of inputs of one kind."""
    tally = Tally(kind)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        made = KINDS[kind](Path(folder), Random(f"{kind} {seed}"))
        for _ in range(cases):
            tally.add(next(made))
    return tally


def main() -> int:
    """Fuzz the kinds of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CASES} inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help=f"inputs of each kind; default {FULL_CASES}")
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="default: all")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    cases = options.cases or (QUICK_CASES if options.quick else FULL_CASES)
    figures, bad = {}, []
    for kind in options.kind or KINDS:
        tally = fuzz(kind, cases, options.seed)
        if not figures:
            print(" ".join(f"{name:>14}" for name in ("kind", *tally.figures)))
        print(" ".join(f"{value:>14}" for value in (kind, *tally.figures.values())), flush=True)
        figures |= {f"{kind}_{name}": count for name, count in tally.figures.items()}
        for outcome in (TRACEBACK, HANG, SILENT, UNNAMED):
            bad += [f"{outcome}: {example}" for example in tally.bad.get(outcome, [])[:10]]
    print("\n".join(bad))
    if options.json:
        options.json.write_text(json.dumps({"figures": figures}, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
