"""Stream a Hugging Face data set from the hub or from a local folder in the layout of the hub.

Needs the package datasets, which the extra [prep] installs.
"""

import functools
import glob
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.sources.base import (
    NULL,
    DamagedError,
    InputSplit,
    LeftOut,
    ReadOptions,
    missing_extra,
    text_of,
    until_damaged,
)
from data_prep.sources.folders import files_below
from data_prep.sources.text_encoding import DAMAGED_ARCHIVE
from megabert.process.error_text import one_line

if TYPE_CHECKING:
    from datasets import IterableDataset

PREFIX = "hf:"


def list_input_splits(source: str, options: ReadOptions) -> list[InputSplit]:
    """List one input split per shard of the data set. A shard is usually a file.

    source: owner/name or a local folder, optionally followed by :configuration. The input splits name the current
    revision, so that all of them read the same data, and an interrupted command starts anew if there is another
    revision. Raises ValueError if the data set cannot be opened.
    """
    name, config = source.removeprefix(PREFIX), ""
    # A folder's own name may have a colon.
    if not Path(name).is_dir():
        name, _, config = name.partition(":")
    if config and options.dataset_config not in (None, config):
        raise ValueError(
            f"{source}: names a configuration, but --dataset-config is {options.dataset_config}. Pass one of the two."
        )
    key = (name, config or options.dataset_config or "", options.dataset_split, _revision(name))
    num_shards = _open(*key).num_shards
    return [InputSplit("hub", key, shard, num_shards, 1) for shard in range(num_shards)]


def read(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[str]:
    where = f"{PREFIX}{split.paths[0]} shard {split.start}"
    rows = iter(_open(*split.paths).shard(num_shards=split.stop, index=split.start))

    local = Path(split.paths[0]).exists()
    remedy = f"Pass --source {split.paths[0]}, without {PREFIX}, which names file and place" if local else "Try again"

    def explain(error: Exception) -> DamagedError:
        return DamagedError(f"{where}: cannot be read: {_describe(error)}. {remedy}.")

    for number, row in enumerate(until_damaged(rows, _reading_errors(), explain, left_out)):
        try:
            text = text_of(row, options.text_key, f"{where} row {number}")
        except DamagedError as error:
            left_out.damaged(error)
            continue
        if text is None:
            left_out.add(NULL, f"{where} row {number}")
        else:
            yield text


def files(name: str) -> list[Path]:
    """List the files of a local data set."""
    folder = Path(name)
    return list(files_below(folder, lambda _: False, LeftOut())) if folder.is_dir() else []


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


def _describe(error: Exception) -> str:
    return one_line(error).rstrip(".") or f"it is empty ({type(error).__name__})"


def _reading_errors() -> tuple[type[Exception], ...]:
    """Return what datasets raises for damaged files, for files of another kind, and without a connection."""
    import datasets
    import pyarrow

    return (
        *DAMAGED_ARCHIVE,
        ValueError,
        TypeError,
        KeyError,
        OSError,
        pyarrow.ArrowException,
        datasets.exceptions.DatasetsError,
        transport_error(),
    )


@functools.lru_cache(maxsize=4)
def _open(name: str, config: str, split: str, revision: str) -> "IterableDataset":
    try:
        import datasets
    except ImportError as missing:
        raise missing_extra(PREFIX + name, "datasets") from missing
    if Path(name).exists():
        # The word "text" alone would be a kind of file, not the folder of that name.
        name = str(Path(name).resolve())
        odd = name if glob.has_magic(name) else next((file for file in map(str, files(name)) if "::" in file), None)
        if odd is not None:
            # datasets would read other folders, or leave the file out.
            raise ValueError(
                f"{PREFIX}{odd}: has one of * ? [ :: in its name, which the package datasets does not take as a name. "
                f"Rename it, or pass --source {name}, without {PREFIX}."
            )
    try:
        return datasets.load_dataset(name, config or None, split=split, revision=revision or None, streaming=True)
    except (StopIteration, RuntimeError, *_reading_errors()) as error:
        # load_dataset raises StopIteration if the first file is empty, RuntimeError for a data set that is a script.
        raise ValueError(
            f"{PREFIX}{name}: cannot be opened: {_describe(error)}. See --dataset-config and --dataset-split."
        ) from error
