"""Find and read a tokenizer.json, its special tokens, and encode texts with it."""

import hashlib
import json
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from megabert.data.shards.manifest import TOKENIZER, TokenizerInfo
from megabert.data.shards.sample_format import SPECIAL_TOKENS

TOKENIZER_CONFIG = "tokenizer_config.json"


def find_tokenizer(path: str | Path) -> tuple[Path, TokenizerInfo]:
    """Find a tokenizer.json, given its path or its folder, and its special tokens.

    Raises ValueError if it is missing, cannot be read, or lacks one of BERT's five special tokens.
    """
    file = Path(path, TOKENIZER) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: no such tokenizer. Train one with data_prep/train_tokenizer.py.")
    tokenizer = read_tokenizer(file)
    special_ids = {}
    for name, token in SPECIAL_TOKENS.items():
        number = tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"{file}: has no token {token}, which masked language modelling needs.")
        special_ids[name] = number
    added = [number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()
    all_special_ids = tuple(sorted({*special_ids.values(), *added}))
    return file, TokenizerInfo(fingerprint, vocab_size(tokenizer), special_ids, all_special_ids)


def vocab_size(tokenizer: Tokenizer) -> int:
    """Return one more than the highest id: a vocabulary with gaps still needs an embedding row for each id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def read_tokenizer(file: Path) -> Tokenizer:
    """Load a tokenizer.json for raw text: without truncation or padding, and with "[MASK]" in a text encoded as text.

    Raises ValueError if the file is not a tokenizer.json.
    """
    try:
        raw = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict) or "added_tokens" not in raw:
        raise ValueError(
            f"{file}: not a tokenizer of the tokenizers library: it has no model and added tokens. "
            "Make one with data_prep/train_tokenizer.py --existing."
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no class of its own
        raise ValueError(f"{file}: the tokenizers library cannot read it: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, without special tokens."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def encode_flat(tokenizer: Tokenizer, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of all texts end to end, without special tokens, and the length of each text (int64)."""
    ids = encode(tokenizer, texts)
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), dtype, int(lengths.sum())), lengths
