"""Where text comes from: each source is a list of units, and each unit a stream of documents.

The list is the same on every run over the same input, which is what makes preparation resumable.
"""

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
# C4 calls its compressed lines .json.gz; a plain .json may be anything.
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def list_input_splits(source: str, options: ReadOptions) -> list[InputSplit]:
    """List a source's units, in a fixed order.

    source: "docstrings", a folder of our text shards, a file, a folder of .txt, .jsonl[.gz|.zst] and .parquet files, or
    a data set of the hub. Raises ValueError for a source that is not there or holds nothing readable.
    """
    if source == "docstrings":
        return docstrings.list_input_splits()
    path = Path(source)
    if source.startswith(hub.PREFIX) or (not path.exists() and HUB_NAME.fullmatch(source)):
        return hub.list_input_splits(source, options)
    if not path.exists():
        raise ValueError(
            f"{source}: no such file or folder; --source takes one, hf:OWNER/NAME for a data set of the Hugging Face "
            "hub, or the word docstrings."
        )
    if (path / MANIFEST).is_file():
        return text_shards.list_input_splits(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    units = [unit for file in files if file.is_file() for unit in _splits_of_file(file, options)]
    if not units:
        raise ValueError(f"{source}: holds no text; expected .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet files.")
    return units


def read_input_split(unit: InputSplit, options: ReadOptions) -> Iterator[str]:
    """Yield the documents of one unit. Raises ValueError naming file and place for what is not as promised."""
    return READERS[unit.kind](unit, options)


def source_state(units: list[InputSplit]) -> list[tuple]:
    """What changes when a source does: every unit, and its files' sizes and times (Python packages: sizes only)."""
    states: dict[str, tuple[int, int]] = {}
    for unit in units:
        names = map(str, hub.files(unit.paths[0])) if unit.kind == "hub" else unit.paths
        for name in names:
            if name not in states and os.path.isfile(name):
                state = os.stat(name)
                states[name] = state.st_size, 0 if unit.kind == "docstrings" else state.st_mtime_ns
        if unit.kind == "hub":
            break  # all of one data set
    return [*units, *states.items()]


def _splits_of_file(path: Path, options: ReadOptions) -> list[InputSplit]:
    if path.name.endswith(".txt"):
        return txt.list_input_splits(path, options)
    if path.name.endswith(JSON_LINES):
        return jsonl.list_input_splits(path)
    if path.name.endswith(".parquet"):
        return parquet.list_input_splits(path, options)
    return []
