"""Fine-tune a checkpoint on GLUE, or on tasks of your own, and print the table. On all GPUs, or on the CPU.

python launch/finetune_glue.py --checkpoint runs/mosaicbert-base --tasks all --data glue_dir --out runs/glue
python launch/finetune_glue.py --checkpoint bert-base-uncased/ --tasks mnli,rte --protocol modernbert --submission
python launch/finetune_glue.py --checkpoint mosaicbert-base-hf --task-file my-task.yaml --data my-data --protocol quick --baselines

Interrupted, the same command goes on where it was; jobs that are done are reused. Ends with 0 if every job is done, with 1 if one failed or
something cannot work. megabert/finetune/README.md has the rest.
"""

from megabert.config import cli
from megabert.finetune.options import Request


def main() -> int:
    request = cli.read_flags(Request, "launch/finetune_glue.py", __doc__ or "")
    from megabert.finetune.main import run  # after the flags: torch takes seconds to load

    return run(request)


if __name__ == "__main__":
    cli.run(main, "launch/finetune_glue.py")
