"""Define the layout of a checkpoint folder, and find, read and check checkpoints; imports no DeepSpeed.

checkpoints/latest                      the tag of the newest complete checkpoint
checkpoints/step-00000250/              exists only when complete
    mp_rank_00_model_states.pt ...      DeepSpeed's files
    streams.json                        position of every data stream, with a format version of its own
    state.json                          State: counters, recipe, ds_config, number of ranks; its format_version
    tokenizer.json  tokenizer_config.json
    MANIFEST.json                       size and sha256 of every file above

format_version of state.json counts changes of all files but streams.json. 1: files without this key, see
`_from_version_1`. 2: without max_documents. 3: without time_table. 4: batches_per_step was step_batches, and no
schedule_start_seconds. 5: AdamW trained the map before the decoder in a run with Muon. 6: Muon at ZeRO 0 was
DeepSpeed's.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megabert.files.hashing import file_sha256
from megabert.files.json_file import check_format_version, read_json

LATEST = "latest"
MANIFEST = "MANIFEST.json"
STATE = "state.json"
STREAMS = "streams.json"
TAG = re.compile(r"step-(\d{8,})")
TEMPORARY = ".tmp-"
FORMAT_VERSION = 7
# Before this version Muon had other parameter groups, and at ZeRO 0 another implementation.
FIRST_MUON_VERSION = 7
# The format of streams.json, {"format": 5, "streams": {NUMBER: POSITION}}. Formats 1, without the key "format", to 4
# are of other orders of the documents.
STREAMS_FORMAT = 5
# Settings of the recipe that readers of a checkpoint use.
NEEDED_SETTINGS = (("data", "max_seq_len"), ("optimizer", "name"))
# Keys of version 1 that have other names now.
RENAMED = {
    "adamw": "optimizer_source",
    "left_behind": "rolled_back_bins",
    "used": "wall_seconds",
    "slowest": "max_step_seconds",
}


@dataclass(frozen=True, kw_only=True)
class State:
    """The contents of state.json."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    step: int
    """optimizer steps done"""
    next_index: int
    """the first bin not used yet"""
    tokens: int
    """real tokens seen"""
    seconds: float
    """training time, without evaluation and saving"""
    wall_seconds: float
    """wall-clock time, summed over all restarts"""
    max_step_seconds: float
    """estimate of how long the next step takes at most"""
    world_size: int
    num_streams: int
    batches_per_step: int
    """micro-batches of one step over all ranks"""
    total_steps: int
    """steps of the whole run"""
    corpus: str
    """fingerprint of the training corpus"""
    recipe: dict[str, dict[str, Any]]
    ds_config: dict[str, object]
    """as passed to DeepSpeed"""
    zero_stage: int
    model: dict[str, Any]
    """the model's configuration"""
    optimizer_source: str
    """the library that implements the optimizer"""
    guard: dict[str, Any]
    """state of the guard against bad updates"""
    rolled_back_bins: list[tuple[int, int]]
    """[first, last) ranges of bins that rollbacks skipped"""
    heldout_loss: float | None = None
    """nats per masked token, if measured at this step"""
    max_documents: dict[int, int] | None = None
    """most pieces in one bin, by max_seq_len; None before version 3"""
    time_table: list[int] | None = None
    """of a run whose length is given in hours: the first bin of each thousandth of its time that has begun, and at the
    end the number of bins whose thousandth is known; None for other runs and before version 4"""
    schedule_start_seconds: float = 0.0
    """wall_seconds when the first step was done, from which schedules by time count; 0 before version 5"""
    format_version: int = FORMAT_VERSION

    @property
    def max_seq_len(self) -> int:
        """The longest piece of a document in any phase, tokens."""
        lengths = self.recipe["data"]["max_seq_len"]
        if isinstance(lengths, int):
            phases = self.recipe["data"].get("phases") or [{}]
            return max(phase.get("max_seq_len") or lengths for phase in phases)
        return max(phase["max_seq_len"] for phase in lengths)


STATE_TYPES = TypeAdapter(State)


def tag_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(tag: str) -> int:
    return int(tag.removeprefix("step-"))


def list_tags(folder: Path) -> list[str]:
    """List the complete checkpoints of a run, newest first."""
    if not folder.is_dir():
        return []
    tags = (item.name for item in folder.iterdir() if TAG.fullmatch(item.name) and item.is_dir())
    return sorted(tags, key=step_of, reverse=True)


def has_checkpoint(path: Path) -> bool:
    """Whether find_checkpoint() finds one there."""
    return _look_for_checkpoint(path) is not None


def find_checkpoint(path: Path, or_else: str = "") -> Path:
    """Find a checkpoint by the path of its own folder, of a checkpoints folder, or of a run's output folder.

    The last two give the newest checkpoint. or_else: what else the caller reads, for the message. Raises ValueError if
    there is none.
    """
    if found := _look_for_checkpoint(path):
        return found
    expected = ["a run's output folder", "one of its checkpoints/step-... folders", *([or_else] if or_else else [])]
    what = "no checkpoint here" if path.is_dir() else "no such folder, and so no checkpoint here"
    raise ValueError(f"{path}: {what}; expected {', '.join(expected[:-1])}, or {expected[-1]}.")


def _look_for_checkpoint(path: Path) -> Path | None:
    for folder in (path, path / "checkpoints"):
        if (folder / STATE).is_file():
            return folder
        if tags := list_tags(folder):
            return folder / tags[0]
    return None


def files_of(folder: Path) -> list[str]:
    """List every file of a checkpoint except its manifest, as sorted relative names."""
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST)


def read_state(folder: Path) -> State:
    """Read state.json of any known version. Raises ValueError if it is damaged or its version is unknown."""
    path = folder / STATE
    raw = read_json(path)
    remedy = "Use the MegaBERT that wrote this checkpoint, or a newer one."
    version = check_format_version(path, raw, FORMAT_VERSION, remedy)
    try:
        state = STATE_TYPES.validate_python(_from_older_version(raw, version))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: damaged: {name}: {first['msg']}.") from error
    for section, setting in NEEDED_SETTINGS:
        if setting not in state.recipe.get(section, {}):
            raise ValueError(f"{path}: damaged: recipe: has no {section}.{setting}.")
    return state


def _from_older_version(raw: dict[str, Any], version: int) -> dict[str, Any]:
    """Convert the content of a state.json to the keys of today; what older versions lack has a default."""
    state = _from_version_1(raw) if version == 1 else raw
    if version < 5 and "step_batches" in state:
        state = {"batches_per_step" if key == "step_batches" else key: value for key, value in state.items()}
    return state


def _from_version_1(raw: dict[str, Any]) -> dict[str, Any]:
    """Convert a state.json without format_version."""
    state = {"used": 0.0, "slowest": 0.0} | raw
    state = {RENAMED.get(key, key): value for key, value in state.items()}
    ds_config = raw.get("ds_config")
    zero = ds_config.get("zero_optimization") if isinstance(ds_config, dict) else None
    return state | {"zero_stage": zero.get("stage", 0) if isinstance(zero, dict) else 0, "format_version": 1}


def check_streams_format(raw: dict[str, Any], where: str, new_pass: bool = False) -> int:
    """Return the format of a streams.json. Raises ValueError for one of a version that cannot be resumed from.

    where: names the file in errors. new_pass: allow earlier formats, of which only the counts of bins are used.
    """
    remedy = "Upgrade megabert to resume from this checkpoint, or name another one with --run.resume FOLDER."
    found = check_format_version(where, raw, STREAMS_FORMAT, remedy, key="format")
    if found < STREAMS_FORMAT and not new_pass:
        checkpoint = os.path.dirname(where) or where
        raise ValueError(
            f"{where}: format {found}: written by an earlier version of megabert, which read documents in another "
            "order and could put copies of one into a batch. To keep weights, optimizer and step and begin a new pass "
            f"over the data, start a branch: --run.branch_from {checkpoint} --run.output_dir FOLDER. To finish the run "
            "in the old order, use the version that began it."
        )
    return found


def bytes_of(num_parameters: int, zero_stage: int) -> int:
    """Return the size of a checkpoint of AdamW: fp32 weights and two moments. ZeRO 1 and 2 store the weights twice."""
    return num_parameters * (16 if zero_stage in (1, 2) else 12)


def heldout_losses(folder: Path) -> dict[str, float | None]:
    """Map the tag of every checkpoint of a run to its held-out loss; None if not measured or not readable."""
    losses: dict[str, float | None] = dict.fromkeys(list_tags(folder))
    for tag in losses:
        # A damaged checkpoint must not prevent newer ones from being saved.
        with contextlib.suppress(OSError, ValueError):
            losses[tag] = read_state(folder / tag).heldout_loss
    return losses


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Map each file name to (bytes, sha256). Raises ValueError if the manifest is missing or damaged."""
    try:
        raw = read_json(folder / MANIFEST)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: has no {MANIFEST}, so it is not a complete checkpoint.") from error
    try:
        found = {str(name): (int(size), str(digest)) for name, (size, digest) in raw.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / MANIFEST}: damaged: it does not list files.") from error
    if STATE not in found or not any(name.endswith(".pt") for name in found):
        raise ValueError(f"{folder / MANIFEST}: damaged: it does not list a whole checkpoint.")
    return found


def check_files(folder: Path, names: list[str] | None = None, hashes: bool = True) -> str | None:
    """Compare files with the manifest. Returns the first problem, or None.

    names: check only these files. hashes: whether to read them, and not only compare their sizes.
    """
    manifest = read_manifest(folder)
    for name in sorted(manifest) if names is None else names:
        size, digest = manifest[name]
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, expected {size}"
        if hashes and file_sha256(path) != digest:
            return f"{path} is damaged: its hash differs from the one in {MANIFEST}"
    return None
