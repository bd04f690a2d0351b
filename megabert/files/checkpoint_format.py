"""A checkpoint folder: its layout, its hashes, and whether it is whole. Needs no DeepSpeed.

checkpoints/latest                      the tag of the newest complete checkpoint
checkpoints/step-00000250/              complete, or not there at all
    mp_rank_00_model_states.pt ...      DeepSpeed's files
    streams.json                        every data stream's position, with a format version
    state.json                          counters, recipe, tokenizer, how many ranks wrote it
    tokenizer.json  tokenizer_config.json
    MANIFEST.json                       size and sha256 of every file above
"""

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LATEST = "latest"
MANIFEST = "MANIFEST.json"
STATE = "state.json"
STREAMS = "streams.json"
TAG = re.compile(r"step-(\d{8,})")
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class State:
    """step: optimizer steps done; next_index: the first bin not yet used; recipe: as plain containers.

    step_batches: micro-batches of one step over all ranks; total_steps: of the whole run.
    tokens: real tokens seen; seconds: training time so far; ds_config: as DeepSpeed got it. adamw: whose it was;
    guard: what it remembers;
    left_behind: [first, last) bins that rollbacks went past. heldout_loss: nats per masked token, if measured at this step.
    used: wall-clock seconds so far; slowest: as training/telemetry/clock.py estimates the next step.
    """

    step: int
    next_index: int
    tokens: int
    seconds: float
    world_size: int
    num_streams: int
    step_batches: int
    total_steps: int
    corpus: str
    recipe: dict[str, Any]
    ds_config: dict[str, Any]
    model: dict[str, Any]
    adamw: str
    guard: dict[str, Any]
    left_behind: list[tuple[int, int]]
    heldout_loss: float | None = None
    used: float = 0.0
    slowest: float = 0.0

    @property
    def zero_stage(self) -> int:
        return self.ds_config.get("zero_optimization", {}).get("stage", 0)

    @property
    def max_seq_len(self) -> int:
        """The longest piece of a document in any phase, tokens."""
        lengths = self.recipe["data"]["max_seq_len"]
        return lengths if isinstance(lengths, int) else max(phase["max_seq_len"] for phase in lengths)


def tag_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(tag: str) -> int:
    return int(tag.removeprefix("step-"))


def list_tags(folder: Path) -> list[str]:
    """The complete checkpoints of a run, newest first."""
    if not folder.is_dir():
        return []
    tags = (item.name for item in folder.iterdir() if TAG.fullmatch(item.name) and item.is_dir())
    return sorted(tags, key=step_of, reverse=True)


def find_checkpoint(path: Path) -> Path:
    """Find one checkpoint: a tag's folder itself, or the newest of a checkpoints folder or of a run's output folder.

    Raises ValueError if there is none.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / STATE).is_file():
            return folder
        if tags := list_tags(folder):
            return folder / tags[0]
    raise ValueError(
        f"{path}: no checkpoint here; expected a run's folder, or one of its checkpoints/step-... folders."
    )


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_and_sync(path: Path) -> tuple[int, str]:
    """Size and hash of a file that is on disk when this returns."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, digest


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk: after this a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_of(folder: Path) -> list[str]:
    """Every file of a checkpoint but its manifest, as sorted relative names."""
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST)


def read_state(folder: Path) -> State:
    """Raises ValueError for one that is damaged, or of another version."""
    try:
        return State(**json.loads((folder / STATE).read_text()))
    except (ValueError, TypeError) as mistake:
        raise ValueError(f"{folder / STATE}: damaged, or written by another version: {mistake}") from mistake


def heldout_losses(folder: Path) -> dict[str, float | None]:
    """Tag -> held-out loss, if it was measured and can be read, of every checkpoint of a run."""
    losses: dict[str, float | None] = dict.fromkeys(list_tags(folder))
    for tag in losses:
        with contextlib.suppress(OSError, ValueError):  # a damaged one must not keep newer ones from being saved
            losses[tag] = read_state(folder / tag).heldout_loss
    return losses


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, sha256). Raises ValueError if the checkpoint has no manifest: it is not complete."""
    try:
        raw = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as missing:
        raise ValueError(f"{folder}: has no {MANIFEST}: not a complete checkpoint.") from missing
    except json.JSONDecodeError as mistake:
        raise ValueError(f"{folder / MANIFEST}: damaged: {mistake}") from mistake
    try:
        found = {str(name): (int(size), str(digest)) for name, (size, digest) in raw.items()}
    except (AttributeError, TypeError, ValueError) as mistake:
        raise ValueError(f"{folder / MANIFEST}: damaged: it does not list files.") from mistake
    if STATE not in found or not any(name.endswith(".pt") for name in found):
        raise ValueError(f"{folder / MANIFEST}: damaged: it does not list a whole checkpoint.")
    return found


def check_files(folder: Path, names: list[str] | None = None) -> str | None:
    """Compare files with the manifest. Returns what is wrong with the first bad one, or None. names: only these."""
    manifest = read_manifest(folder)
    for name in sorted(manifest) if names is None else names:
        size, digest = manifest[name]
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, expected {size}"
        if file_hash(path) != digest:
            return f"{path} is damaged: its hash is not the one in {MANIFEST}"
    return None
