"""Plot the loss and the throughput of runs against tokens and hours.

python launch/plot_run.py runs/mosaicbert-base runs/bert-base --out runs.png
"""

try:
    from megabert.process.interrupts import end_at_ctrl_c
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run bash launch/install.sh, then source .venv/bin/activate.") from None

if __name__ == "__main__":
    end_at_ctrl_c()

from pathlib import Path

from megabert.config import cli


def main() -> None:
    parser = cli.Parser("launch/plot_run.py", __doc__ or "")
    parser.add_argument("runs", nargs="+", help="output folders of pretraining runs (run.output_dir)")
    parser.add_argument("--out", default="runs.png", help="image file to write")
    options = parser.parse_args()
    # Imported after the flags are checked: matplotlib takes a second to load.
    from megabert.plots.run_curves import plot_runs

    plot_runs([Path(run) for run in options.runs], Path(options.out))
    print(options.out)


if __name__ == "__main__":
    cli.run(main, "launch/plot_run.py")
