"""Combine the records of all shards, and write the files beside the shards."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.request_file import note_request
from data_prep.writing import length_statistics, shard_writer
from data_prep.writing.shard_options import ShardRequest
from megabert.data.shards.manifest import (
    FIRST_HELDOUT,
    TOKEN_COUNTS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Manifest,
    Shard,
    write_manifest,
)
from megabert.data.shards.sample_format import encode_npy
from megabert.data.shards.side_files import check_tokenizer_config
from megabert.data.shards.tokenizer import TokenizerFile, special_tokens
from megabert.files.atomic import write_atomically
from megabert.files.bounded_reads import has_file
from megabert.files.redact import redact


def build_manifest(
    request: ShardRequest, counts: dict[str, int], read: int, first_heldout: float
) -> tuple[Manifest, np.ndarray]:
    """Combine the records of all shards. read: documents of the source; first_heldout: as in TaskSummary.

    Returns the manifest and how often each token id occurs in the training part, (vocab_size,).
    """
    splits: dict[str, tuple[Shard, ...]] = {}
    lengths = np.zeros(length_statistics.LONGEST_COUNTED + 1, dtype=np.int64)
    ids = np.zeros(request.tokenizer.vocab_size if request.tokenizer else 0, dtype=np.int64)
    unknown_id = request.tokenizer.special_ids["unk"] if request.tokenizer else 0
    unknown = 0
    for part, total in counts.items():
        shards = []
        for number in range(total):
            record = shard_writer.read_record(shard_writer.record_path(request.settings, part, number))
            shards.append(record.shard)
            lengths += record.lengths
            unknown += int(record.ids[unknown_id : unknown_id + 1].sum())
            if part == "train":
                ids[: len(record.ids)] += record.ids
        splits[part] = tuple(shards)
    tokens = sum(shard.tokens for shards in splits.values() for shard in shards)
    unit = "tokens" if request.tokenizer else "bytes"
    statistics = length_statistics.summarize(lengths, tokens, unit, read)
    if request.tokenizer:
        statistics["unknown_tokens"] = unknown
    left_out = request.left_out
    examples = {reason: [redact(place) for place in places] for reason, places in left_out.examples.items()}
    statistics |= {"left_out": left_out.counts, "left_out_examples": examples, FIRST_HELDOUT: first_heldout}
    kind = "tokens" if request.tokenizer else "text"
    return Manifest(kind, splits, statistics, request.tokenizer, request.request_hash), ids


def write_metadata(request: ShardRequest, manifest: Manifest, ids: np.ndarray) -> None:
    """Write all other files of the folder. The manifest comes last, because it makes the folder complete."""
    out = Path(request.options.out)
    files = tokenizer_files(request.tokenizer_file) | ({TOKEN_COUNTS: encode_npy(ids)} if request.tokenizer else {})
    for name, data in files.items():
        write_atomically(out / name, data)
    write_atomically(out / length_statistics.PLOT, length_statistics.plot(manifest.statistics))
    note_request(out, request.request_hash)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != TOKENIZER}
    write_manifest(out, replace(manifest, files=hashes))


def tokenizer_files(file: TokenizerFile | None) -> dict[str, bytes]:
    """Return the files beside the shards for a tokenizer.json.

    Raises ValueError for a damaged config, and for a tokenizer.json that was replaced since the command began.
    """
    if file is None:
        return {}
    config = file.path.with_name(TOKENIZER_CONFIG)
    data = config.read_bytes() if has_file(config) else plain_tokenizer_config(file)
    check_tokenizer_config(data, str(config))
    return {TOKENIZER: file.read(), TOKENIZER_CONFIG: data}


def plain_tokenizer_config(file: TokenizerFile) -> bytes:
    """Return a tokenizer_config.json with which AutoTokenizer loads a bare tokenizer.json."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {f"{name}_token": token for name, token in special_tokens(file.load()).items()}
    return json.dumps(config, indent=1).encode()
