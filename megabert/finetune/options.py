"""Define the command-line options of launch/finetune_glue.py, in a module that imports nothing slow."""

from dataclasses import dataclass
from typing import Literal

from megabert.config.settings import check_limits, setting


@dataclass(frozen=True)
class FinetuneOptions:
    checkpoint: str = ""
    """a pretraining run or one of its checkpoints, an exported folder, or any BERT-like Hugging Face folder"""
    tasks: str = ""
    """all (GLUE's eight), or some of cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte,wnli,ax; default: all without task_file"""
    task_file: str = ""
    """tasks of your own: YAML files, separated by commas"""
    data: str = "data/glue"
    """folder with the tasks' data, in GLUE's TSV layout or the hub's parquet layout; or a hub data set, nyu-mll/glue"""
    out: str = setting("runs/glue", is_output=True)
    """folder for results.json, results.md, results.png, and each job's result and log"""
    protocol: str = "mosaicbert"
    """mosaicbert, modernbert, quick, quickstart, or a YAML file"""
    allow_no_mnli: bool = False
    """if mnli is not among the tasks, fine-tune RTE, MRPC and STS-B from the checkpoint itself"""
    baselines: bool = False
    """also fine-tune the same architecture from random weights, and train TF-IDF with a linear model"""
    submission: bool = False
    """label the test sets, and write the zip file for GLUE's server"""
    keep_models: bool = False
    """export the model of each task's best run, by its score on the evaluation sets, to OUT/models/TASK"""
    workers: int = setting(0, "[0, 1024]")
    """jobs at a time; 0: one per GPU, or one per CPU core"""
    shard: str = ""
    """run only part I of N of the jobs, as I/N: for a SLURM array (launch/slurm/finetune_glue.sbatch)"""
    ops: Literal["auto", "torch", "fused"] = "auto"
    """implementation of the model's operations, as run.ops in pretraining"""

    def __post_init__(self):
        check_limits(self, "--")
        if not self.checkpoint:
            raise ValueError(
                "--checkpoint is missing: a pretraining run, an exported folder, or a Hugging Face folder."
            )
