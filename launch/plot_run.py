"""Plot the loss and the throughput of runs against tokens and hours.

python launch/plot_run.py runs/mosaicbert-base runs/bert-base --out runs.png
"""

import sys

try:
    from megabert.process.interrupts import end_at_ctrl_c
except ModuleNotFoundError as error:
    print(f"{error}: run bash launch/install.sh, then source .venv/bin/activate.", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    end_at_ctrl_c()

from dataclasses import dataclass
from pathlib import Path

from megabert.config import cli
from megabert.config.settings import setting


@dataclass(frozen=True)
class Options:
    runs: list[str]
    """output folders of pretraining runs (run.output_dir)"""
    out: str = setting("runs.png", is_output=True)
    """image file to write"""


def main() -> None:
    options = cli.read_flags(Options, "launch/plot_run.py", __doc__ or "")
    # Imported after the flags are checked: matplotlib takes a second to load.
    from megabert.plots.run_curves import plot_runs

    plot_runs([Path(run) for run in options.runs], Path(options.out))
    print(options.out)


if __name__ == "__main__":
    cli.run(main, "launch/plot_run.py", cli.exit_code)
