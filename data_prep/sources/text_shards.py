"""Our own text shards: what write_shards.py writes without --tokenizer."""

import zlib
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.base import InputSplit, ReadOptions
from megabert.data.shards.manifest import read_manifest
from megabert.data.shards.sample_format import decode_text, read_sample


def list_input_splits(folder: Path) -> list[InputSplit]:
    """One unit a chunk. Raises ValueError for a folder of token shards."""
    manifest = read_manifest(folder)
    if manifest.kind != "text":
        raise ValueError(f"{folder}: holds {manifest.kind} shards, expected text to tokenize.")
    return [
        InputSplit("text_shards", (str(folder / shard.name), str(crc32)), offset, offset + size, size)
        for part in sorted(manifest.splits)
        for shard in manifest.splits[part]
        for offset, size, _, _, crc32 in shard.chunks.tolist()
    ]


def read(unit: InputSplit, options: ReadOptions) -> Iterator[str]:
    """Raises ValueError for a chunk that is not as its manifest says."""
    path, crc32 = unit.paths
    with open(path, "rb") as file:
        file.seek(unit.start)
        data = file.read(unit.size)
    where = f"{path} (byte {unit.start})"
    if zlib.crc32(data) != int(crc32):
        raise ValueError(f"{where}: damaged: its checksum is not the manifest's. Write the text shards again.")
    yield from decode_text(read_sample(data, where), where)
