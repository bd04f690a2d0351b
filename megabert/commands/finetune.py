"""Fine-tune a checkpoint on GLUE or on tasks of your own, and print the table of scores. Uses all GPUs, or the CPU.

{command} --checkpoint runs/mosaicbert-base --tasks all --data glue_dir --out runs/glue
{command} --checkpoint bert-base-uncased/ --tasks mnli,rte --protocol modernbert --submission
{command} --checkpoint mosaicbert-base-hf --task-file my-task.yaml --data my-data --protocol quick --baselines

After an interruption the same command continues; jobs that are done are reused. Exits with 0 if every job is done, and
with 1 if one failed or if something cannot work. megabert/finetune/README.md says more.
"""

from megabert.process.interrupts import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()

from typing import NoReturn

from megabert.config import cli
from megabert.finetune.options import FinetuneOptions


def main(prog: str) -> int:
    options = cli.read_flags(FinetuneOptions, prog, __doc__ or "")
    # Imported after the flags are read: torch takes seconds to load.
    from megabert.finetune.main import run_finetuning

    return run_finetuning(options)


def command(prog: str = "megabert-finetune") -> NoReturn:
    cli.run(lambda: main(prog), prog)


if __name__ == "__main__":
    command()
