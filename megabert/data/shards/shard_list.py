"""List the shards of one part of a folder that a run reads, and check that they are there and have the right size."""

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from megabert.data.shards.manifest import Manifest, Shard, heldout_that_is_enough
from megabert.data.shards.storage import Storage

log = logging.getLogger(__name__)

# From MANY_SHARDS shards on, SIZE_THREADS threads look up their sizes.
MANY_SHARDS, SIZE_THREADS = 1000, 32


class DamagedShardError(ValueError):
    """A shard that is missing, truncated or different from its manifest. The message names shard and chunk."""


def shards_of(
    storage: Storage, manifest: Manifest, part: str, on_bad_shard: str, names: list[str] | None = None
) -> tuple[Shard, ...]:
    """Return the shards of a part that have documents, only those with these names. Raises what open_source does."""
    folder, shards = storage.url("").rstrip("/"), manifest.splits.get(part, ())
    if names is not None:
        wanted = set(names)
        if len(wanted) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise ValueError(f"{folder}: {twice} is named twice.")
        if unknown := sorted(wanted - {shard.name for shard in shards}):
            raise ValueError(f"{folder}: {unknown[0]} is not among the manifest's {len(shards)} {part} shards.")
        shards = tuple(shard for shard in shards if shard.name in wanted)
    shards = tuple(shard for shard in shards if shard.documents and shard.tokens)
    if not shards:
        remedy = "from a corpus that has documents"
        if any(shard.documents for other in manifest.splits.values() for shard in other):
            remedy = "with a smaller --heldout"
            if part == "heldout":
                remedy = f"with {heldout_that_is_enough(manifest.statistics)}"
        raise ValueError(f"{folder}: the {part} part has no documents. Write the shards again {remedy}.")
    for problem in _wrong_sizes(storage, shards):
        if on_bad_shard == "stop":
            raise DamagedShardError(problem)
        log.warning("%s", problem)
    return shards


def _wrong_sizes(storage: Storage, shards: tuple[Shard, ...]) -> list[str]:
    """Describe the shards that are missing or have the wrong size, where the storage knows sizes."""
    if len(shards) < MANY_SHARDS:
        return _wrong_sizes_of(storage, shards)
    # A network file system answers in a millisecond, but answers many at once.
    with ThreadPoolExecutor(SIZE_THREADS) as pool:
        parts = pool.map(lambda first: _wrong_sizes_of(storage, shards[first::SIZE_THREADS]), range(SIZE_THREADS))
        return sorted(problem for part in parts for problem in part)


def _wrong_sizes_of(storage: Storage, shards: tuple[Shard, ...]) -> list[str]:
    problems = []
    for shard in shards:
        try:
            size = storage.size(shard.name)
        except FileNotFoundError:
            url = storage.url(shard.name)
            problems.append(f"{url}: the manifest lists this shard, but it is missing. Fetch or write it again.")
            continue
        if size not in (None, shard.bytes):
            url = storage.url(shard.name)
            problems.append(f"{url}: {size} bytes, but the manifest says {shard.bytes}. Fetch or write it again.")
    return problems
