"""Read the documents that text shards hold out, from which tasks are made, and those that an encoder may train on."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from megabert.data.shards.manifest import read_manifest
from megabert.data.shards.sample_format import decode_text, read_sample


def read_documents(folder: Path, part: Literal["train", "heldout"]) -> Iterator[str]:
    """Yield the documents of one part of text shards. Raises ValueError if these are none, or hold nothing out."""
    manifest = read_manifest(folder)
    if manifest.kind != "text":
        raise ValueError(
            f"{folder}: holds {manifest.kind} shards, expected text shards. Run write_shards.py without --tokenizer."
        )
    if not any(shard.documents for shard in manifest.splits.get("heldout", ())):
        raise ValueError(f"{folder}: no document is held out for tasks. Write the shards with --heldout 0.3 --replace.")
    for shard in manifest.splits[part]:
        data = (folder / shard.name).read_bytes()
        for offset, size, *_ in shard.chunks.tolist():
            where = f"{folder / shard.name} (byte {offset})"
            yield from decode_text(read_sample(data[offset : offset + size], where), where)


def hash_fraction(text: str) -> float:
    """Map a text to a number in [0, 1) by its hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / (1 << 48)
