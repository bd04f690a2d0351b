"""Stream a Hugging Face data set from the hub or from a local folder in the layout of the hub.

Needs the package datasets, which the extra [prep] installs.
"""

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.sources.base import InputSplit, ReadOptions, missing_extra, no_field, not_text

if TYPE_CHECKING:
    from datasets import IterableDataset

PREFIX = "hf:"


def list_input_splits(source: str, options: ReadOptions) -> list[InputSplit]:
    """List one input split per shard of the data set. A shard is usually a file.

    source: owner/name or a local folder, optionally followed by :configuration. The input splits name the current
    revision, so that all of them read the same data, and an interrupted command starts anew if there is another
    revision. Raises ValueError if the data set cannot be opened.
    """
    name, _, config = source.removeprefix(PREFIX).partition(":")
    if config and options.dataset_config not in (None, config):
        raise ValueError(
            f"{source}: names a configuration, but --dataset-config is {options.dataset_config}. Pass one of the two."
        )
    key = (name, config or options.dataset_config or "", options.dataset_split, _revision(name))
    num_shards = _open(*key).num_shards
    return [InputSplit("hub", key, shard, num_shards, 1) for shard in range(num_shards)]


def read(split: InputSplit, options: ReadOptions) -> Iterator[str]:
    where = f"{split.paths[0]} shard {split.start}"
    for row in _open(*split.paths).shard(num_shards=split.stop, index=split.start):
        if options.text_key not in row:
            raise no_field(where, options.text_key, list(row))
        text = row[options.text_key]
        if text is None:
            continue
        if not isinstance(text, str):
            raise not_text(where, options.text_key, repr(text)[:40])
        yield text


def files(name: str) -> list[Path]:
    """List the files of a local data set."""
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
    except (HfHubHTTPError, HFValidationError, OSError, transport_error()) as error:
        raise ValueError(
            f"{PREFIX}{name}: no such data set on the hub, or the hub cannot be reached: {str(error).strip()}"
        ) from error


def transport_error() -> type[Exception]:
    """Return the base class of the errors that huggingface_hub's HTTP client raises, which need not be OSErrors.

    The client has changed between its versions: requests, httpx, httpx2.
    """
    import huggingface_hub

    package = type(huggingface_hub.get_session()).__module__.partition(".")[0]
    return importlib.import_module(package).HTTPError


@functools.lru_cache(maxsize=4)
def _open(name: str, config: str, split: str, revision: str) -> "IterableDataset":
    try:
        import datasets
    except ImportError as missing:
        raise missing_extra(PREFIX + name, "datasets") from missing
    try:
        return datasets.load_dataset(name, config or None, split=split, revision=revision or None, streaming=True)
    except (ValueError, OSError, datasets.exceptions.DatasetsError, transport_error()) as error:
        raise ValueError(
            f"{PREFIX}{name}: cannot be opened: {' '.join(str(error).split())} "
            "See --dataset-config and --dataset-split."
        ) from error
