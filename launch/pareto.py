"""Fine-tune the checkpoints of several runs, and plot score against hours, tokens and dollars, a line per run.

python launch/pareto.py --runs runs/mosaicbert-base,runs/bert-base --data glue_dir --dollars-per-gpu-hour 2.5
After an interruption the same command continues.
"""

import sys

try:
    from megabert.process.interrupts import end_at_ctrl_c
except ModuleNotFoundError as error:
    print(f"{error}: run bash launch/install.sh, then source .venv/bin/activate.", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    end_at_ctrl_c()

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megabert.config import cli
from megabert.config.settings import setting
from megabert.files.atomic import write_atomically


@dataclass(frozen=True)
class Options:
    runs: str = ""
    """output folders of pretraining runs, separated by commas"""
    tasks: str = ""
    """as in launch/finetune_glue.py"""
    task_file: str = ""
    """as in launch/finetune_glue.py"""
    data: str = "data/glue"
    """as in launch/finetune_glue.py"""
    protocol: str = "quick"
    """as in launch/finetune_glue.py"""
    allow_no_mnli: bool = False
    """as in launch/finetune_glue.py"""
    out: str = setting("runs/pareto", is_output=True)
    """folder for pareto.png, pareto.md, pareto.json and a folder per checkpoint"""
    dollars_per_gpu_hour: float = setting(0.0, "[0, 1e6]")
    """price of one device for one hour; 0: no dollars"""
    ops: Literal["auto", "torch", "fused"] = "auto"
    """as in launch/finetune_glue.py"""

    def __post_init__(self):
        if not self.folders:
            raise ValueError("--runs is missing: output folders of pretraining runs, separated by commas.")

    @property
    def folders(self) -> list[Path]:
        return [Path(name.strip()) for name in self.runs.split(",") if name.strip()]


def main() -> int:
    options = cli.read_flags(Options, "launch/pareto.py", __doc__ or "")
    # Imported after the flags are checked: torch takes seconds to load.
    from megabert.finetune.main import lock_output, run_finetuning, selected_tasks
    from megabert.finetune.options import FinetuneOptions
    from megabert.finetune.results import pareto
    from megabert.plots.pareto import plot_pareto

    out, points = Path(options.out), []
    names = ("tasks", "task_file", "data", "protocol", "allow_no_mnli", "ops")
    shared = {name: getattr(options, name) for name in names}
    if {task.name for task in selected_tasks(FinetuneOptions(checkpoint="any", **shared))} == {"wnli"}:
        raise ValueError("--tasks wnli: it counts in no average. Add another.")
    runs = pareto.name_runs(options.folders)
    checkpoints = [(name, checkpoint) for name, folder in runs.items() for checkpoint in pareto.checkpoints_of(folder)]
    out.mkdir(parents=True, exist_ok=True)
    # Its files have one writer; another command on other runs would also replace this one's table.
    with lock_output(out, None):
        for name, checkpoint in checkpoints:
            folder = out / name / checkpoint.name
            if run_finetuning(FinetuneOptions(checkpoint=str(checkpoint), out=str(folder), **shared)):
                raise ValueError(f"{checkpoint}: a fine-tuning failed, so its average would be over fewer tasks.")
            points.append(pareto.measure(name, checkpoint, folder / "results.json", options.dollars_per_gpu_hour))
        points = pareto.mark_fronts(points)
        plot_pareto(pareto.panels(points), f"protocol {options.protocol}", out / "pareto.png")
        write_atomically(out / "pareto.md", pareto.as_markdown(points).encode())
        write_atomically(out / "pareto.json", json.dumps(pareto.as_records(points), indent=1).encode() + b"\n")
    print(pareto.as_markdown(points))
    return 0


if __name__ == "__main__":
    cli.run(main, "launch/pareto.py")
