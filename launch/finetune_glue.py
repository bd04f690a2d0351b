"""Fine-tune a checkpoint on GLUE, or on tasks of your own, and print the table. On all GPUs, or on the CPU.

python launch/finetune_glue.py --checkpoint runs/mosaicbert-base --tasks all --data glue_dir --out runs/glue
python launch/finetune_glue.py --checkpoint bert-base-uncased/ --tasks mnli,rte --protocol modernbert --submission
python launch/finetune_glue.py --checkpoint mosaicbert-base-hf --task-file my-task.yaml --data my-data --protocol quick --baselines

Interrupted, the same command goes on where it was; jobs that are done are reused. megabert/glue/README.md has the rest.
"""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

from megabert import flags


@dataclass(frozen=True)
class Options:
    checkpoint: str = ""
    """a pretraining run or one of its checkpoints, an exported folder, or any BERT-like Hugging Face folder"""
    tasks: str = ""
    """all (GLUE's eight), or names: cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte,wnli,ax; the default is all without a --task-file"""
    task_file: str = ""
    """tasks of your own: YAML files, with commas between"""
    data: str = "data/glue"
    """folder with the tasks' data, in GLUE's TSV layout or the hub's parquet layout; or a hub data set, nyu-mll/glue"""
    out: str = "runs/glue"
    """folder for results.json, results.md, results.png, and each job's result and log"""
    protocol: str = "mosaicbert"
    """mosaicbert, modernbert, quick, quickstart, or a YAML file"""
    allow_no_mnli: bool = False
    """fine-tune RTE, MRPC and STS-B from the checkpoint itself where mnli is not among the tasks"""
    baselines: bool = False
    """show the same architecture from random weights, and TF-IDF, too"""
    submission: bool = False
    """label the test sets, and write the zip that GLUE's server takes"""
    workers: int = 0
    """jobs at a time; 0: one per GPU, or one per CPU core"""
    shard: str = ""
    """run only part I of N of the jobs, as I/N: for a SLURM array (launch/slurm/finetune_glue.sbatch)"""
    ops: Literal["auto", "torch", "fused"] = "auto"
    """the model's operations, as run.ops in pretraining"""

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError(
                "--checkpoint is missing: a pretraining run, an exported folder, or a Hugging Face folder."
            )


SWITCHES = ("--allow_no_mnli", "--baselines", "--submission")  # these need no value


def main() -> int:
    argv = [f"{word}=true" if flags.with_underscores(word) in SWITCHES else word for word in sys.argv[1:]]
    options = flags.read_flags(Options, "launch/finetune_glue.py", __doc__ or "", argv)
    from megabert.glue.run import Request, run  # after the flags: torch takes seconds to load

    return run(Request(**dataclasses.asdict(options)))


if __name__ == "__main__":
    flags.run(main, "launch/finetune_glue.py")
