"""Read the small files beside the shards, and compare each with what the manifest says of it."""

import errno
import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from megabert.data.shards.manifest import (
    CHUNKS,
    MANIFEST,
    MAX_CHUNKS_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_TOKENIZER_BYTES,
    TOKEN_COUNTS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Manifest,
    parse_manifest,
)
from megabert.data.shards.retry import StoreAwayError
from megabert.data.shards.sample_format import read_npy
from megabert.data.shards.storage import LocalFolder, Storage
from megabert.data.shards.tokenizer import describe_tokenizer
from megabert.files.disk import DiskError


def fetch_manifest(storage: Storage) -> Manifest:
    """Read the manifest of a folder of shards. Raises ValueError if there is none or it is not valid."""
    found = []
    for name, max_bytes in ((MANIFEST, MAX_MANIFEST_BYTES), (CHUNKS, MAX_CHUNKS_BYTES)):
        try:
            found.append(storage.read_whole(name, max_bytes))
        except (FileNotFoundError, NotADirectoryError) as missing:
            raise ValueError(
                f"{storage.url(name)}: no such file. Write shards there with data_prep/write_shards.py."
            ) from missing
    manifest = parse_manifest(found[0], found[1], storage.url(MANIFEST))
    return replace(manifest, chunks_file=storage.url(CHUNKS)) if isinstance(storage, LocalFolder) else manifest


def check_mapped_chunks(manifest: Manifest) -> None:
    """Raise DiskError if chunks.npy was cut since this process mapped it: reading it there kills the process.

    A file that another replaced, or that was removed, stays as it was where it is mapped.
    """
    if manifest.mapped_bytes and manifest.chunks_file:
        with suppress(FileNotFoundError):
            if (size := os.stat(manifest.chunks_file).st_size) < manifest.mapped_bytes:
                raise DiskError(
                    f"{manifest.chunks_file}: has {size} bytes, and had {manifest.mapped_bytes} when the run began. "
                    "Fetch or write the shards again."
                )


@dataclass(frozen=True)
class SideFiles:
    """The tokenizer, its config and the token counts of a folder of token shards."""

    storage: Storage
    manifest: Manifest

    def check(self) -> None:
        """Read all of them. Raises ValueError for one that is not what the manifest says."""
        url, expected = self.storage.url(TOKENIZER), self.manifest.tokenizer
        if describe_tokenizer(self.read_tokenizer(), url) != expected:
            raise ValueError(
                f"{self.storage.url(MANIFEST)}: its vocabulary and special tokens are not those of {TOKENIZER}. Fetch "
                "or write the shards again."
            )
        if (config := self.read(TOKENIZER_CONFIG)) is not None:
            check_tokenizer_config(config, self.storage.url(TOKENIZER_CONFIG))
        self.read_token_counts()

    def read_tokenizer(self) -> bytes:
        """Read the tokenizer.json. Raises ValueError if it is missing or another than the shards were written with."""
        url, info = self.storage.url(TOKENIZER), self.manifest.tokenizer
        assert info is not None, f"{url}: the manifest of token shards names no tokenizer"
        try:
            data = self.storage.read_whole(TOKENIZER, MAX_TOKENIZER_BYTES)
        except FileNotFoundError as missing:
            raise ValueError(
                f"{url}: no such file, expected next to the shards. Copy it there, or write the shards again."
            ) from missing
        fingerprint = hashlib.sha256(data).hexdigest()
        if fingerprint != info.fingerprint:
            raise ValueError(
                f"{url}: its fingerprint is {fingerprint[:12]}, but the shards were written with "
                f"{info.fingerprint[:12]}. Put that tokenizer back, or write the shards again."
            )
        return data

    def read(self, name: str) -> bytes | None:
        """Read a file, or return None if there is none.

        Raises ValueError if it is not the one that the manifest lists, or is listed and missing; StoreAwayError or
        DiskError if its store or its disk fails.
        """
        url, expected = self.storage.url(name), self.manifest.files.get(name)
        try:
            data = self.storage.read_whole(name, MAX_TOKENIZER_BYTES)
        except StoreAwayError:
            raise
        except OSError as error:
            # A web server may answer with any status for a missing file.
            if error.errno in (errno.EIO, errno.ESTALE):
                raise DiskError(f"{url}: cannot be read: {error}") from error
            if expected is None:
                return None
            raise ValueError(
                f"{url}: the manifest lists it, but it cannot be read: {error}. Fetch or write it again."
            ) from error
        if expected not in (None, hashlib.sha256(data).hexdigest()):
            raise ValueError(
                f"{url}: was changed after it had been written: its hash differs from the manifest's. Fetch or write "
                "it again."
            )
        return data

    def read_token_counts(self) -> np.ndarray:
        """Return (vocab_size,) how often each id occurs in the training shards."""
        url, info = self.storage.url(TOKEN_COUNTS), self.manifest.tokenizer
        assert info is not None, f"{url}: the manifest of token shards names no tokenizer"
        data = self.read(TOKEN_COUNTS)
        if data is None:
            raise ValueError(f"{url}: no such file, expected next to the shards. Fetch or write it again.")
        counts = read_npy(data, url)
        if counts.shape != (info.vocab_size,) or counts.dtype.kind not in "iu" or counts.min() < 0:
            raise ValueError(
                f"{url}: {counts.dtype} of shape {counts.shape}, expected {info.vocab_size} counts. "
                "Write the shards again."
            )
        expected = sum(shard.tokens for shard in self.manifest.splits.get("train", ()))
        if (total := int(counts.sum())) != expected:
            raise ValueError(
                f"{url}: counts {total} tokens, the training shards have {expected}. Fetch or write it again."
            )
        return counts


def check_tokenizer_config(data: bytes, where: str) -> None:
    """Raise ValueError unless the bytes are a JSON object, which checkpoints and exports need."""
    try:
        if isinstance(json.loads(data), dict):
            return
        problem = "not a JSON object"
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON: {error}"
    raise ValueError(f"{where}: {problem}. Fetch or write it again.")
