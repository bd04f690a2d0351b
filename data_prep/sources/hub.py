"""A Hugging Face data set, streamed: by name from the hub, or a local folder in its layout. Needs datasets, of [prep]."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources.base import InputSplit, ReadOptions, missing_extra, no_field, not_text

PREFIX = "hf:"


def list_input_splits(source: str, options: ReadOptions) -> list[InputSplit]:
    """One unit a shard of the data set, which is usually a file.

    source: owner/name or a local folder, perhaps followed by :configuration. The revision of today is part of a unit, so
    that an interrupted command goes on with the same data. Raises ValueError if it cannot be opened.
    """
    name, _, config = source.removeprefix(PREFIX).partition(":")
    if config and options.dataset_config not in (None, config):
        raise ValueError(f"{source}: but --dataset-config is {options.dataset_config}. Give one of the two.")
    key = (name, config or options.dataset_config or "", options.dataset_split, _revision(name))
    number = _open(*key).num_shards
    return [InputSplit("hub", key, shard, number, 1) for shard in range(number)]


def read(unit: InputSplit, options: ReadOptions) -> Iterator[str]:
    where = f"{unit.paths[0]} shard {unit.start}"
    for row in _open(*unit.paths).shard(num_shards=unit.stop, index=unit.start):
        if options.text_key not in row:
            raise no_field(where, options.text_key, list(row))
        text = row[options.text_key]
        if text is None:
            continue
        if not isinstance(text, str):
            raise not_text(where, options.text_key, repr(text)[:40])
        yield text


def files(name: str) -> list[Path]:
    """The files of a local data set, whose change makes it another."""
    folder = Path(name)
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def _revision(name: str) -> str:
    if Path(name).exists():
        return ""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as missing:
        raise missing_extra(PREFIX + name, "datasets") from missing
    try:
        return str(huggingface_hub.HfApi().dataset_info(name).sha)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"{PREFIX}{name}: no such data set on the hub, or the hub cannot be reached: {str(error).strip()}"
        ) from error


@functools.lru_cache(maxsize=4)
def _open(name: str, config: str, split: str, revision: str) -> Any:
    try:
        import datasets
    except ImportError as missing:
        raise missing_extra(PREFIX + name, "datasets") from missing
    try:
        return datasets.load_dataset(name, config or None, split=split, revision=revision or None, streaming=True)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{PREFIX}{name}: cannot be opened: {' '.join(str(error).split())} "
            "See --dataset-config and --dataset-split."
        ) from error
