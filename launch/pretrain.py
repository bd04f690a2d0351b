"""Pretrain an encoder.

deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json
deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json --recipe mosaicbert-base --data.train '/data/c4/train-{00000..01023}.tar'
"""

import logging
import os
import subprocess
from pathlib import Path

from megabert.config import cli
from megabert.config.ds_config import read_ds_config
from megabert.config.parser import RecipeParser
from megabert.config.recipe import Recipe
from megabert.training.distributed.rank_env import rank_of_this_process
from megabert.training.distributed.signals import StopSignals

REPOSITORY = Path(__file__).resolve().parents[1]


def prepare_quickstart_corpus(recipe: Recipe) -> None:
    """Write the quickstart's shards if they are missing: rank 0 of the first node does, the others wait for it."""
    if recipe.data.train != "data/quickstart/tokens" or Path(recipe.data.train, "manifest.json").is_file():
        return
    if Path.cwd() != REPOSITORY:
        raise ValueError(
            f"{recipe.data.train} is not here; run from {REPOSITORY} to have the quickstart's corpus prepared."
        )
    if rank_of_this_process() == 0:
        print(f"{recipe.data.train} is missing: preparing the quickstart's corpus, a minute or two", flush=True)
        done = subprocess.run(["bash", str(REPOSITORY / "launch/quickstart/prepare.sh")], check=False)
        if done.returncode:
            raise ValueError(f"preparing {recipe.data.train} failed with exit code {done.returncode}; see above.")


def main() -> int:
    interrupts = StopSignals()
    interrupts.watch_launcher()
    parser = RecipeParser("launch/pretrain.py", __doc__ or "")
    parser.add_argument(
        "--ds_config",
        default=str(REPOSITORY / "ds_configs" / "zero2.json"),
        help="DeepSpeed's JSON: ZeRO stage, precision, offload",
    )
    parser.add_argument("--plot_schedule", default=None, help="draw the recipe's schedules to this .png, and stop")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher; not for you")
    recipe, options = parser.read()
    if options.plot_schedule:
        from megabert.plots.schedule import plot_schedule

        plot_schedule(recipe, Path(options.plot_schedule))
        return 0
    ds_config = read_ds_config(options.ds_config)
    prepare_quickstart_corpus(recipe)
    os.environ.setdefault(
        "DS_ACCELERATOR", "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    )  # else DeepSpeed probes and warns
    logging.basicConfig(level=logging.INFO if rank_of_this_process() == 0 else logging.WARNING, format="%(message)s")
    # Imported here: flags and ds_config are checked before torch and DeepSpeed take their seconds to load.
    from megabert.training.loop import pretrain

    return pretrain(recipe, ds_config, interrupts)


if __name__ == "__main__":
    # Gloo's threads can outlive Python's own end and abort: a finished run would exit with -6.
    cli.run_and_leave(main, "launch/pretrain.py")
