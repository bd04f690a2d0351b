"""Fine-tune the checkpoints of several runs, and draw score against hours, tokens and dollars: one line per run.

python launch/pareto.py --runs runs/mosaicbert-base,runs/bert-base --data glue_dir --out runs/pareto --dollars-per-gpu-hour 2.5

Interrupted, the same command goes on where it was.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megabert import flags


@dataclass(frozen=True)
class Options:
    runs: str = ""
    """output folders of pretraining runs, with commas between"""
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
    out: str = "runs/pareto"
    """folder for pareto.png, pareto.md, pareto.json and a folder per checkpoint"""
    dollars_per_gpu_hour: float = 0.0
    """price of one device for one hour; 0: no dollars"""
    ops: str = "auto"
    """as in launch/finetune_glue.py"""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("--runs is missing: output folders of pretraining runs, with commas between.")


def main() -> int:
    options = flags.read_flags(Options, "launch/pareto.py", __doc__ or "")
    from megabert.glue import pareto  # after the flags: torch takes seconds to load
    from megabert.glue.run import Request, run

    out, points = Path(options.out), []
    same = {name: getattr(options, name) for name in ("tasks", "task_file", "data", "protocol", "allow_no_mnli", "ops")}
    for folder in map(Path, options.runs.split(",")):
        for checkpoint in pareto.checkpoints_of(folder):
            place = out / folder.name / checkpoint.name
            if run(Request(checkpoint=str(checkpoint), out=str(place), **same)):
                raise ValueError(f"{checkpoint}: a fine-tuning failed, so that its score would be of something else.")
            score = json.loads((place / "results.json").read_text())["average"]
            points.append(pareto.measure(folder, checkpoint, score, options.dollars_per_gpu_hour))
    points = pareto.mark_front(points)
    pareto.draw(points, f"protocol {options.protocol}", out / "pareto.png")
    (out / "pareto.md").write_text(pareto.as_markdown(points))
    (out / "pareto.json").write_text(json.dumps(pareto.as_records(points), indent=1) + "\n")
    print(pareto.as_markdown(points))
    return 0


if __name__ == "__main__":
    flags.run(main, "launch/pareto.py")
