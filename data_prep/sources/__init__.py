"""List the input splits of a corpus and read the documents of each."""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from data_prep.sources import docstrings, hub, jsonl, text_shards, txt
from data_prep.sources.base import (
    EMPTY_FILE,
    OTHER_KIND,
    TOKEN_KINDS,
    DamagedError,
    InputSplit,
    LeftOut,
    ReadOptions,
    texts_only,
)
from data_prep.sources.columns import arrow, parquet
from data_prep.sources.folders import files_below, kind_of
from data_prep.sources.lines import list_line_splits
from data_prep.sources.remote import RemotePath, describe, is_remote, remote_files, size_of
from data_prep.sources.tokens import datatrove, mds, megatron
from data_prep.sources.tokens.mds_index import is_mds
from megabert.data.shards.manifest import MANIFEST

READERS: dict[str, Callable[[InputSplit, ReadOptions, LeftOut], Iterator[str]]] = {
    "arrow": arrow.read,
    "docstrings": docstrings.read,
    "hub": hub.read,
    "jsonl": jsonl.read,
    "mds": mds.read,
    "parquet": parquet.read,
    "text_shards": text_shards.read,
    "txt": txt.read,
}
# The source that is no file or folder.
DOCSTRINGS = "docstrings"
# C4 names its compressed JSON Lines files .json.gz. A plain .json may hold anything.
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
TEXT = (".txt", ".txt.gz", ".txt.zst")
EXPECTED = (
    "expected .txt, .jsonl (also .gz or .zst), .parquet or .arrow files, MDS shards, or tokens (.bin and .idx, .ds)"
)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def list_input_splits(source: str, options: ReadOptions, left_out: LeftOut | None = None) -> list[InputSplit]:
    """List the input splits of a source, in the same order on every run over the same input.

    source: "docstrings", a folder of text shards, a file, a folder of .txt, .jsonl, .parquet and .arrow files, a folder
    of save_to_disk, a URL, or hf:OWNER/NAME. What is not read is counted in left_out. Raises ValueError if the source
    does not exist or holds nothing readable, and for an option that does not apply to it.
    """
    splits = _list_input_splits(source, options, left_out or LeftOut(options.skip_damaged))
    kinds = {split.kind for split in splits}
    for flag, value, needed in (
        ("--encoding", options.encoding, {"txt", "jsonl"}),
        ("--blank-lines", options.blank_lines, {"txt"}),
        ("--dataset-config", options.dataset_config, {"hub"}),
    ):
        if value and splits and not kinds & needed:
            raise ValueError(
                f"{source}: {flag} has no effect on it: it contains {', '.join(sorted(kinds))}. Omit {flag}."
            )
    return splits


def _list_input_splits(source: str, options: ReadOptions, left_out: LeftOut) -> list[InputSplit]:
    if source == DOCSTRINGS and os.path.lexists(source):
        raise ValueError(
            f"{source}: is a folder or a file here, and also the name of the docstrings of megabert's dependencies. "
            f"Pass ./{source} for what is here, or run the command in another folder."
        )
    if source == DOCSTRINGS:
        return docstrings.list_input_splits()
    if is_remote(source):
        return _splits_of_files(source, remote_files(source, left_out), options, left_out)
    path = Path(source.removeprefix(hub.PREFIX))
    if arrow.is_saved_data_set(path):
        return arrow.list_saved(path, options, left_out)
    if source.startswith(hub.PREFIX):
        return hub.list_input_splits(source, options)
    if not os.path.lexists(path):
        raise ValueError(f"{source}: no such file or folder.{_suggestion(source)}")
    kind_of(path)
    if (path / MANIFEST).is_file():
        return text_shards.list_input_splits(path)
    return _splits_of_files(source, files_below(path, _is_one_source, left_out), options, left_out)


def _splits_of_files(
    source: str, files: Iterable[Path | RemotePath], options: ReadOptions, left_out: LeftOut
) -> list[InputSplit]:
    splits, found = [], False
    for file in files:
        of_file = _splits_of_file(file, options, left_out)
        found = found or of_file is not None
        splits += of_file or []
    if not found:
        slash = " A folder of a web server ends with a slash." if source.startswith("http") else ""
        held = f" It holds {left_out}." if left_out.counts else ""
        raise ValueError(f"{source}: holds no text; {EXPECTED}.{held}{slash}")
    return splits


def read_input_split(split: InputSplit, options: ReadOptions, left_out: LeftOut | None = None) -> Iterator[str]:
    """Yield the documents of one input split. Null texts, and with skip_damaged damaged ones, are counted in left_out.

    Raises ValueError with file and position if the input is damaged, OSError with the file if it cannot be read.
    """
    if split.kind in TOKEN_KINDS:
        raise ValueError(f"{split.paths[0]}: holds tokens, expected text.")
    left_out = left_out or LeftOut(options.skip_damaged)
    try:
        yield from texts_only(READERS[split.kind](split, options, left_out), split.paths[0], left_out)
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), split.paths[0]) from error
        raise


def source_state(splits: list[InputSplit]) -> list[list[object]]:
    """Return plain values that change when the source changes: every input split, and the size and mtime of its files.

    The mtime of installed Python packages does not count: a reinstallation changes it.
    """
    states: dict[str, tuple[int, int | str]] = {}
    for split in splits:
        paths = map(str, hub.files(split.paths[0])) if split.kind == "hub" else split.paths
        for path in paths:
            if path not in states and split.kind != "hub" and is_remote(path):
                file = describe(path)
                states[path] = file.size, file.version
            elif path not in states and os.path.isfile(path):
                state = os.stat(path)
                states[path] = state.st_size, 0 if split.kind == "docstrings" else state.st_mtime_ns
        if split.kind == "hub":
            # All input splits name the same data set, so the first is enough.
            break
    return [*map(list, splits), *([path, *state] for path, state in states.items())]


def _splits_of_file(path: Path | RemotePath, options: ReadOptions, left_out: LeftOut) -> list[InputSplit] | None:
    """List the input splits of a file, or of the folder of a saved data set. Returns None if it is of another kind."""
    name = path.name.lower()
    try:
        if isinstance(path, Path) and path.is_dir():
            if is_mds(path):
                return mds.list_input_splits(path, options)
            return arrow.list_saved(path, options, left_out)
        if isinstance(path, Path) and name.endswith((".bin", ".idx", datatrove.SUFFIX, *datatrove.BESIDE)):
            return _splits_of_tokens(path, options, left_out)
        if not name.endswith((*TEXT, *JSON_LINES, ".parquet", ".arrow")):
            left_out.add(OTHER_KIND, str(path))
            return None
        if not size_of(path):
            left_out.add(EMPTY_FILE, str(path))
            return []
        if name.endswith(TEXT):
            return txt.list_input_splits(path, options)
        if name.endswith(JSON_LINES):
            return list_line_splits(path, "jsonl", options)
        return (parquet if name.endswith(".parquet") else arrow).list_input_splits(path, options)
    except DamagedError as error:
        left_out.damaged(error)
    except UnicodeDecodeError as error:
        # The name of a column is not UTF-8.
        left_out.damaged(DamagedError(f"{path}: damaged: {error}. Download or write it again."))
    return []


def _is_one_source(folder: Path) -> bool:
    return arrow.is_saved_data_set(folder) or is_mds(folder)


def _splits_of_tokens(path: Path, options: ReadOptions, left_out: LeftOut) -> list[InputSplit] | None:
    """List the input splits of a file that holds tokens or their index, by its suffix; None if it holds neither."""
    name = path.name.lower()
    if name.endswith(datatrove.BESIDE) and path.with_suffix("").is_file():
        return []
    if name.endswith(datatrove.SUFFIX):
        # A task without documents writes such files.
        if datatrove.is_empty(path):
            left_out.add(EMPTY_FILE, str(path))
            return []
        return datatrove.list_input_splits(path, options)
    index = megatron.index_of(path)
    if index.is_file() and (megatron.is_index(index) or path.with_suffix(".bin").is_file()):
        if not path.with_suffix(".bin").is_file():
            raise DamagedError(f"{path.with_suffix('.bin')}: no such file, but its index is there. Copy it there.")
        return [] if name.endswith(".idx") else megatron.list_input_splits(path, options)
    left_out.add(OTHER_KIND, str(path))
    return None


def _suggestion(source: str) -> str:
    """Return a sentence that suggests a source for one that does not exist."""
    path = Path(source)
    beside = [*path.parent.iterdir()] if path.parent.is_dir() else []
    known = {**{str(path.parent / other.name): str(other) for other in beside}, DOCSTRINGS: DOCSTRINGS}
    close = difflib.get_close_matches(str(path), known, n=1, cutoff=0.8)
    sentence = f" Did you mean {close[0]}?" if close else ""
    if HUB_NAME.fullmatch(source):
        sentence += f" For the data set of this name on the Hugging Face hub, pass hf:{source}."
    return (
        f"{sentence} --source takes one file or folder (no pattern, no command) or the URL of one, hf:OWNER/NAME for "
        "a Hugging Face data set, or the word docstrings."
    )
