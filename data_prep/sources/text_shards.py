"""Read the text shards that write_shards.py writes without --tokenizer."""

import zlib
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.base import DamagedError, InputSplit, LeftOut, ReadOptions
from megabert.data.shards.manifest import read_manifest
from megabert.data.shards.sample_format import decode_text, read_sample


def list_input_splits(folder: Path) -> list[InputSplit]:
    """List one input split per chunk. Raises ValueError for a folder of token shards."""
    manifest = read_manifest(folder)
    if manifest.kind != "text":
        raise ValueError(f"{folder}: holds {manifest.kind} shards, expected text to tokenize.")
    return [
        InputSplit("text_shards", (str(folder / shard.name), str(crc32)), offset, offset + size, size)
        for part in sorted(manifest.splits)
        for shard in manifest.splits[part]
        for offset, size, _, _, crc32 in shard.chunks.tolist()
    ]


def read(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[str]:
    """Yield the documents of one chunk. It is damaged if its checksum is not the one in the manifest."""
    path, crc32 = split.paths
    with open(path, "rb") as file:
        file.seek(split.start)
        data = file.read(split.size)
    where = f"{path} (byte {split.start})"
    if zlib.crc32(data) != int(crc32):
        left_out.damaged(
            DamagedError(f"{where}: damaged: its checksum differs from the manifest's. Write the text shards again.")
        )
        return
    try:
        texts = decode_text(read_sample(data, where), where)
    except ValueError as error:
        left_out.damaged(DamagedError(f"{error} Write the text shards again."))
        return
    yield from texts
