"""Print the summary of the quickstart, and write summary.json and loss.png."""

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
from megabert.files.json_file import write_json


@dataclass(frozen=True)
class Options:
    run: str = "runs/quickstart"
    """folder of the pretraining run"""
    times: str = "runs/quickstart/times.tsv"
    """tab-separated name and seconds of every stage that ran, one stage per line"""


def main() -> None:
    options = cli.read_flags(Options, "launch/quickstart/summarize.py", __doc__ or "")
    # Imported after the flags are checked: torch takes seconds to load.
    import transformers

    from megabert.finetune.results.report import read_results
    from megabert.plots.quickstart_summary import as_text, fill_masks, plot_loss, summarize

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run = Path(options.run)
    lines = [line.split("\t") for line in Path(options.times).read_text().splitlines()]
    pretraining = sum(float(seconds) for stage, seconds in lines if stage == "pretraining")
    total = sum(float(seconds) for _, seconds in lines)
    finetuning = read_results(run / "finetune/results.json")
    summary = summarize(run, run / "hf", finetuning, pretraining, total)
    plot_loss(run, summary["unigram_loss"], run / "loss.png")
    masks = fill_masks(run / "hf")
    write_json(run / "summary.json", summary)
    print(as_text(summary, run, masks))


if __name__ == "__main__":
    cli.run(main, "launch/quickstart/summarize.py")
