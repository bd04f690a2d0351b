"""Find the checkpoint that a run starts from; imports no torch."""

import logging
from collections.abc import Callable
from pathlib import Path

from megabert.config.recipe import RunConfig
from megabert.files import checkpoint_format
from megabert.training.checkpointing.initial_folder import CONFIG

log = logging.getLogger(__name__)

# Returns what is wrong with a checkpoint's files, or None.
Check = Callable[[Path], str | None]


def find(resume: str, folder: Path, check: Check) -> Path | None:
    """Choose the checkpoint to resume from.

    resume: the setting run.resume; auto falls back to an older checkpoint if the newest is damaged, and logs that.
    Raises ValueError if a named checkpoint is missing or damaged, and if there are checkpoints but all are damaged.
    """
    if resume == "none":
        return None
    if resume != "auto":
        named = find_named(Path(resume))
        if problem := check(named):
            raise ValueError(f"{named}: cannot resume from it: {problem}. Name another one, or use --run.resume auto.")
        return named
    found = newest(folder, check)
    if found is None and (tags := checkpoint_format.list_tags(folder)):
        raise ValueError(
            f"{folder}: all {len(tags)} checkpoints are damaged. Remove them, or use --run.resume none, to start anew."
        )
    return found


def find_named(path: Path) -> Path:
    """Find the checkpoint that a setting names. Raises ValueError if there is none, also for the folder of a model."""
    if (path / CONFIG).is_file():
        raise ValueError(
            f"{path}: is the folder of a model and no checkpoint. --model.init_from starts a run with its weights."
        )
    return checkpoint_format.find_checkpoint(path)


def newest(folder: Path, check: Check, up_to: int | None = None) -> Path | None:
    """Return the newest undamaged checkpoint, of step `up_to` at most. Logs the damaged ones."""
    for tag in checkpoint_format.list_tags(folder):
        if up_to is not None and checkpoint_format.step_of(tag) > up_to:
            continue
        problem = check(folder / tag)
        if problem is None:
            return folder / tag
        log.warning("checkpoint %s is damaged and not used: %s", tag, problem)
    return None


def saved_state(run: RunConfig) -> checkpoint_format.State | None:
    """Return the state of the checkpoint that the run starts from, or None; all of a run have the same micro-batch.

    Only state.json is read. `find` checks the files later; here a checkpoint with a damaged state is passed over.
    """
    path = None
    if run.resume == "auto":
        path = newest(Path(run.output_dir, "checkpoints"), _state_problem)
    elif run.resume != "none":
        path = find_named(Path(run.resume))
    if path is None and run.branch_from is not None:
        path = find_named(Path(run.branch_from))
    return None if path is None else checkpoint_format.read_state(path)


def _state_problem(path: Path) -> str | None:
    try:
        checkpoint_format.read_state(path)
    except (ValueError, OSError) as error:
        return str(error)
    return None
