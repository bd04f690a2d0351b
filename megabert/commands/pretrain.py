"""Pretrain an encoder.

{command} --ds_config {zero2}
{command} --ds_config {zero2} --recipe mosaicbert-base --data.train '/data/c4/train-{00000..01023}.tar'
{command} --dry-run 64 --recipe mosaicbert-base --data.train /data/c4
"""

from megabert.process.interrupts import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()

import logging
import subprocess
from pathlib import Path
from typing import NoReturn

from megabert.config import cli
from megabert.config.data_section import CorpusPart
from megabert.config.ds_config import DsConfig, read_ds_config
from megabert.config.recipe import Recipe
from megabert.config.recipe_parser import RecipeParser, ds_config_names, ds_config_path
from megabert.config.settings import check_output
from megabert.process.subprocesses import end_with_parent
from megabert.training.distributed.rank_env import rank_of_this_process
from megabert.training.distributed.signals import StopSignals
from megabert.training.roofline.dry_run import dry_run

QUICKSTART_SHARDS = "data/quickstart/tokens"


class PreparationError(ValueError):
    """The quickstart's corpus could not be prepared, for a reason that the scripts have printed."""

    exit_code = 1


def prepare_quickstart_corpus(train: str | list[CorpusPart]) -> None:
    """Write the quickstart's shards if they are missing: rank 0 writes them while the other ranks wait for it."""
    if train != QUICKSTART_SHARDS or Path(QUICKSTART_SHARDS, "manifest.json").is_file():
        return
    script = cli.CHECKOUT / "launch/quickstart/prepare.sh"
    if not script.is_file():
        raise ValueError(
            f"{QUICKSTART_SHARDS} is missing. Write shards with megabert-shards; --data.train takes their folder."
        )
    if Path.cwd() != cli.CHECKOUT:
        raise ValueError(f"{QUICKSTART_SHARDS} is missing. Run this command in {cli.CHECKOUT}, which prepares it.")
    if rank_of_this_process() == 0:
        print(f"{QUICKSTART_SHARDS} is missing: preparing the quickstart's corpus, a minute or two", flush=True)
        done = subprocess.run(["bash", str(script)], check=False, preexec_fn=end_with_parent)
        if done.returncode:
            raise PreparationError(f"preparing {QUICKSTART_SHARDS} failed with exit code {done.returncode}; see above.")


def make_parser(prog: str) -> RecipeParser:
    in_checkout = prog.endswith(".py")
    shown = {"{command}": f"deepspeed {prog}" if in_checkout else prog}
    shown["{zero2}"] = "ds_configs/zero2.json" if in_checkout else "zero2"
    description = __doc__ or ""
    for placeholder, text in shown.items():
        description = description.replace(placeholder, text)
    parser = RecipeParser(prog, description)
    parser.add_argument(
        "--ds_config",
        default="zero2",
        help=f"ZeRO stage, precision and offload for DeepSpeed: one of {', '.join(ds_config_names())}, or a JSON file. "
        "Between GPUs zero1 sends less than zero2, once a step",
    )
    parser.add_argument("--plot_schedule", default=None, help="only draw the recipe's schedules, to this .png")
    parser.add_argument(
        "--dry_run",
        type=int,
        default=None,
        help="train nothing: check settings, corpus, checkpoint, disk and memory for this number of ranks, in seconds",
    )
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher; leave it alone")
    return parser


def print_dry_run(recipe: Recipe, ds_config: DsConfig, ranks: int) -> int:
    """Print what a dry run finds. Returns the exit code of the first reason to refuse the run, or 0."""
    codes = []
    for finding in dry_run(recipe, ds_config, ranks):
        print(cli.name_commands(str(finding)), flush=True)
        codes.append(finding.code)
    return next((code for code in codes if code), 0)


def main(prog: str) -> int:
    stop_signals = StopSignals()
    stop_signals.install_handlers()
    stop_signals.watch_launcher()
    recipe, options = make_parser(prog).read()
    if options.plot_schedule:
        check_output("--plot_schedule", options.plot_schedule)
        from megabert.plots.schedule import plot_schedule

        if rank_of_this_process() == 0:
            plot_schedule(recipe, Path(options.plot_schedule))
            print(options.plot_schedule, flush=True)
        return 0
    ds_config = read_ds_config(ds_config_path(options.ds_config))
    if options.dry_run is not None:
        return print_dry_run(recipe, ds_config, options.dry_run) if rank_of_this_process() == 0 else 0
    prepare_quickstart_corpus(recipe.data.train)
    logging.basicConfig(level=logging.INFO if rank_of_this_process() == 0 else logging.WARNING, format="%(message)s")
    # Imported after recipe and ds_config are checked: torch and DeepSpeed take seconds to load.
    from megabert.training.distributed.accelerator import choose_accelerator

    choose_accelerator()
    from megabert.training.loop import pretrain

    return pretrain(recipe, ds_config, stop_signals)


def command(prog: str = "megabert-pretrain") -> NoReturn:
    # Gloo's threads can outlive Python's own shutdown and abort: a finished run would exit with -6.
    cli.run_and_leave(lambda: main(prog), prog)


if __name__ == "__main__":
    command()
