"""Draw the loss and the throughput of runs, against tokens and hours.

python launch/plot_run.py runs/mosaicbert-base runs/bert-base --out runs.png
"""

from dataclasses import dataclass
from pathlib import Path

from megabert import flags


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to draw."""

    runs: list[str]
    """folders of runs"""
    out: str = "runs.png"
    """picture to write"""


def main() -> None:
    options = flags.read_flags(Options, "launch/plot_run.py", __doc__ or "")
    # Imported here: flags are checked before these take their seconds to load.
    from megabert.training.pictures import plot_runs

    plot_runs([Path(run) for run in options.runs], Path(options.out))
    print(options.out)


if __name__ == "__main__":
    flags.run(main, "launch/plot_run.py")
