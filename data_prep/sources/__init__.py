"""List the input splits of a corpus and read the documents of each."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.sources import docstrings, hub, jsonl, parquet, text_shards, txt
from data_prep.sources.base import InputSplit, ReadOptions
from megabert.data.shards.manifest import MANIFEST

READERS: dict[str, Callable[[InputSplit, ReadOptions], Iterator[str]]] = {
    "docstrings": docstrings.read,
    "hub": hub.read,
    "jsonl": jsonl.read,
    "parquet": parquet.read,
    "text_shards": text_shards.read,
    "txt": txt.read,
}
# C4 names its compressed JSON Lines files .json.gz. A plain .json may hold anything.
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def list_input_splits(source: str, options: ReadOptions) -> list[InputSplit]:
    """List the input splits of a source, in the same order on every run over the same input.

    source: "docstrings", a folder of text shards, a file, a folder of .txt, .jsonl[.gz|.zst] and .parquet files, or
    the name of a Hugging Face data set. Raises ValueError if the source does not exist or holds nothing readable.
    """
    if source == "docstrings":
        return docstrings.list_input_splits()
    path = Path(source)
    if source.startswith(hub.PREFIX) or (not path.exists() and HUB_NAME.fullmatch(source)):
        return hub.list_input_splits(source, options)
    if not path.exists():
        raise ValueError(
            f"{source}: no such file or folder; --source takes a file, a folder, hf:OWNER/NAME for a Hugging Face data "
            "set, or the word docstrings."
        )
    if (path / MANIFEST).is_file():
        return text_shards.list_input_splits(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    splits = [split for file in files if file.is_file() for split in _splits_of_file(file, options)]
    if not splits:
        raise ValueError(f"{source}: holds no text; expected .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet files.")
    return splits


def read_input_split(split: InputSplit, options: ReadOptions) -> Iterator[str]:
    """Yield the documents of one input split. Raises ValueError with file and position if the input is malformed."""
    return READERS[split.kind](split, options)


def source_state(splits: list[InputSplit]) -> list[list[object]]:
    """Return plain values that change when the source changes: every input split, and the size and mtime of its files.

    The mtime of installed Python packages does not count: a reinstallation changes it.
    """
    states: dict[str, tuple[int, int]] = {}
    for split in splits:
        paths = map(str, hub.files(split.paths[0])) if split.kind == "hub" else split.paths
        for path in paths:
            if path not in states and os.path.isfile(path):
                state = os.stat(path)
                states[path] = state.st_size, 0 if split.kind == "docstrings" else state.st_mtime_ns
        if split.kind == "hub":
            break  # all input splits name the same data set
    return [*map(list, splits), *([path, *state] for path, state in states.items())]


def _splits_of_file(path: Path, options: ReadOptions) -> list[InputSplit]:
    if path.name.endswith(".txt"):
        return txt.list_input_splits(path, options)
    if path.name.endswith(JSON_LINES):
        return jsonl.list_input_splits(path)
    if path.name.endswith(".parquet"):
        return parquet.list_input_splits(path, options)
    return []
