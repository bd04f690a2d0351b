"""Compare finished shards with their manifest, and restore lost files that do not need the corpus."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.writing.length_statistics import PLOT
from megabert.data.shards.manifest import TOKENIZER, TOKENIZER_CONFIG, Manifest, read_manifest
from megabert.files.atomic import write_atomically
from megabert.files.hashing import file_sha256


def read_result_of(out: Path, request_hash: str) -> Manifest | None:
    """Return the manifest of the finished shards in a folder if they were written for this request."""
    try:
        manifest = read_manifest(out)
    except ValueError:
        # A manifest that is missing, damaged or of another format version cannot be reused.
        return None
    return manifest if manifest.request == request_hash else None


def damaged_files(out: Path, manifest: Manifest, workers: int) -> list[str]:
    """Return the names of the files that are missing or differ from the manifest. Every file is read."""
    with ThreadPoolExecutor(workers) as pool:
        listed = [(shard.name, shard.sha256) for part in manifest.splits.values() for shard in part]
        listed += manifest.files.items()
        if manifest.tokenizer is not None:
            listed.append((TOKENIZER, manifest.tokenizer.fingerprint))
        intact = pool.map(lambda item: (out / item[0]).is_file() and file_sha256(out / item[0]) == item[1], listed)
        damaged = [name for (name, _), is_intact in zip(listed, intact, strict=True) if not is_intact]
    return damaged if (out / PLOT).is_file() else [*damaged, PLOT]


def restore_tokenizer(out: Path, manifest: Manifest, tokenizer_files: dict[str, bytes]) -> Iterator[str]:
    """Write lost tokenizer files again if their hashes are the manifest's. Yields their names."""
    expected = dict(manifest.files)
    if manifest.tokenizer is not None:
        expected[TOKENIZER] = manifest.tokenizer.fingerprint
    for name in (TOKENIZER, TOKENIZER_CONFIG):
        data = tokenizer_files.get(name)
        if data is not None and hashlib.sha256(data).hexdigest() == expected.get(name):
            write_atomically(out / name, data)
            yield name
