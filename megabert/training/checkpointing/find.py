"""Find the checkpoint that a run starts from; imports no torch."""

import logging
from collections.abc import Callable
from pathlib import Path

from megabert.config.recipe import RunConfig
from megabert.files import checkpoint_format as layout

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
        named = layout.find_checkpoint(Path(resume))
        if problem := check(named):
            raise ValueError(f"{named}: cannot resume from it: {problem}. Name another one, or use --run.resume auto.")
        return named
    found = newest(folder, check)
    if found is None and (tags := layout.list_tags(folder)):
        raise ValueError(
            f"{folder}: all {len(tags)} checkpoints are damaged. Remove them, or use --run.resume none, to start anew."
        )
    return found


def newest(folder: Path, check: Check, up_to: int | None = None) -> Path | None:
    """Return the newest undamaged checkpoint, of step `up_to` at most. Logs the damaged ones."""
    for tag in layout.list_tags(folder):
        if up_to is not None and layout.step_of(tag) > up_to:
            continue
        problem = check(folder / tag)
        if problem is None:
            return folder / tag
        log.warning("checkpoint %s is damaged and not used: %s", tag, problem)
    return None


def saved_state(run: RunConfig) -> layout.State | None:
    """Return the state of a checkpoint that the run starts from; all of a run have the same micro-batch.

    `find` checks their files; here a damaged state is only passed over.
    """
    if run.resume not in ("auto", "none"):
        return layout.read_state(layout.find_checkpoint(Path(run.resume)))
    checkpoints = Path(run.output_dir, "checkpoints")
    for tag in layout.list_tags(checkpoints) if run.resume == "auto" else []:
        try:
            return layout.read_state(checkpoints / tag)
        except (ValueError, OSError) as error:
            log.warning("checkpoint %s is damaged and not used: %s", tag, error)
    return None if run.branch_from is None else layout.read_state(layout.find_checkpoint(Path(run.branch_from)))
