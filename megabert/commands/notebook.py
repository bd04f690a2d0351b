"""Pretrain a recipe in a process that continues afterwards, such as a notebook's."""

import contextlib
import gc
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megabert.commands.pretrain import prepare_quickstart_corpus
from megabert.config.ds_config import read_ds_config
from megabert.config.recipe import Recipe
from megabert.config.recipe_parser import ds_config_path
from megabert.files.checkpoint_format import find_checkpoint, list_tags, read_state
from megabert.files.run_format import RESULT, read_run_file
from megabert.training.distributed.signals import SIGNALS, StopSignals

FINISHED = "finished"


@dataclass(frozen=True)
class PretrainResult:
    """The results of a run."""

    output_dir: Path
    """folder with checkpoints, metrics.jsonl and run.json"""
    steps: int
    """optimizer steps, over all restarts"""
    heldout_loss: float | None
    """nats per masked token at the end; None if the run stopped early"""
    exit_reason: str
    """finished, or why the run stopped early; its steps are then saved, and the same call resumes it"""


def pretrain(recipe: Recipe, ds_config: str | Path = "zero2") -> PretrainResult:
    """Train a recipe in this process, on one device, from its newest checkpoint or its start.

    ds_config: a name or a file. Call it in the main thread: Ctrl-C (a notebook's stop button) and the other stop
    signals make it save and return early; a second Ctrl-C raises KeyboardInterrupt at once. It restores signal
    handlers, environment variables and the number of threads. Raises ValueError for a recipe, corpus, ds_config or
    checkpoint that the user must change.
    """
    settings = read_ds_config(ds_config_path(str(ds_config)))
    prepare_quickstart_corpus(recipe.data.train)
    stop_signals = StopSignals(embedded=True)
    output_dir = Path(recipe.run.output_dir)
    with restored_process():
        stop_signals.install_handlers()
        from megabert.training.distributed.accelerator import choose_accelerator

        choose_accelerator()
        from megabert.training import loop
        from megabert.training.distributed.sync import unlock_output_dir

        try:
            code = loop.pretrain(recipe, settings, stop_signals)
        finally:
            unlock_output_dir(output_dir)
    if code == 0:
        result = read_run_file(output_dir / RESULT)
        return PretrainResult(output_dir, result["steps"], result["heldout_loss"], FINISHED)
    checkpoints = output_dir / "checkpoints"
    steps = read_state(find_checkpoint(checkpoints)).step if list_tags(checkpoints) else 0
    return PretrainResult(output_dir, steps, None, stop_signals.reason or "stopped")


@contextlib.contextmanager
def restored_process() -> Iterator[None]:
    """End the process group after the block, and restore what training changes in a process.

    Raises ValueError where a launcher started this process as one of several ranks, or a process group exists.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "WORLD_SIZE is more than 1, but megabert.pretrain() trains in one process. For several ranks, run "
            "torchrun --nproc-per-node N -m megabert.commands.pretrain. If no launcher started this process, unset "
            "WORLD_SIZE."
        )
    import torch

    if torch.distributed.is_initialized():
        raise ValueError(
            "this process has a process group already. Call torch.distributed.destroy_process_group() first."
        )
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    environment, threads, excepthook = dict(os.environ), torch.get_num_threads(), sys.excepthook
    try:
        with warnings.catch_warnings():
            yield
    finally:
        # Free the model, the optimizer and the loader.
        gc.collect()
        if torch.distributed.is_initialized():
            from deepspeed import comm

            # DeepSpeed's function also removes the groups that DeepSpeed keeps for the next engine.
            (comm if comm.is_initialized() else torch.distributed).destroy_process_group()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        # torch.distributed replaces the hook to add the rank to every traceback.
        sys.excepthook = excepthook
        os.environ.clear()
        os.environ.update(environment)
