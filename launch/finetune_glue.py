"""Fine-tune a checkpoint on GLUE, or on tasks of your own, and print the table; on all GPUs, or on the CPU.

python launch/finetune_glue.py --checkpoint runs/mosaicbert-base --tasks all --data glue_dir --out runs/glue
python launch/finetune_glue.py --checkpoint bert-base-uncased/ --tasks mnli,rte --protocol modernbert --submission
python launch/finetune_glue.py --checkpoint mosaicbert-base-hf --task-file my-task.yaml --data my-data --baselines

After an interruption the same command continues; jobs that are done are reused. Exits with 0 if every job is done, and
with 1 if a job failed or an input is wrong. For more, see megabert/finetune/README.md.
"""

import sys

from megabert.config import cli
from megabert.finetune.options import FinetuneOptions

SWITCHES = ("--allow_no_mnli", "--baselines", "--submission")  # these need no value


def main() -> int:
    argv = [f"{word}=true" if cli.with_underscores(word) in SWITCHES else word for word in sys.argv[1:]]
    options = cli.read_flags(FinetuneOptions, "launch/finetune_glue.py", __doc__ or "", argv)
    # Imported after the flags are checked: torch takes seconds to load.
    from megabert.finetune.main import run_finetuning

    return run_finetuning(options)


if __name__ == "__main__":
    cli.run(main, "launch/finetune_glue.py")
