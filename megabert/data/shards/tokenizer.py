"""Find and read a tokenizer.json, its special tokens, and encode texts with it."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from megabert.data.shards.manifest import MAX_TOKENIZER_BYTES, TOKENIZER, TokenizerInfo
from megabert.data.shards.sample_format import KEPT_NAMES, SPECIAL_TOKENS
from megabert.files.bounded_reads import read_bounded
from megabert.files.json_file import parse_json
from megabert.process.error_text import one_line

# Encoded once, since some damage makes only the first use of a tokenizer fail.
PROBE = "A b\u0301 \uac00 1"


class TokenizerFile(NamedTuple):
    """A tokenizer.json, and the SHA-256 that it had when a command began."""

    path: Path
    fingerprint: str

    def read(self) -> bytes:
        """Read the file again. Raises ValueError if it is another one by now, or on this machine."""
        data = read_bounded(self.path, MAX_TOKENIZER_BYTES)
        if (found := hashlib.sha256(data).hexdigest()) != self.fingerprint:
            raise ValueError(
                f"{self.path}: was replaced while it was used: its fingerprint is {found[:12]}, and was "
                f"{self.fingerprint[:12]} when the command began. Put that tokenizer back, or begin anew with this one."
            )
        return data

    def load(self) -> Tokenizer:
        """Load the tokenizer, as read_tokenizer does."""
        return parse_tokenizer(self.read(), str(self.path))


def find_tokenizer(path: str | Path) -> tuple[Path, TokenizerInfo]:
    """Find a tokenizer.json, given its path or its folder, and its special tokens.

    Raises ValueError if it is missing, cannot be read, or lacks one of BERT's five special tokens.
    """
    file = Path(path, TOKENIZER) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: no such tokenizer. Train one with data_prep/train_tokenizer.py.")
    return file, describe_tokenizer(read_bounded(file, MAX_TOKENIZER_BYTES), str(file))


def describe_tokenizer(data: bytes, where: str) -> TokenizerInfo:
    """Return what a manifest says of a tokenizer. data: tokenizer.json's bytes. Raises what find_tokenizer raises."""
    tokenizer = parse_tokenizer(data, where)
    special_ids = {}
    for name, token in special_tokens(tokenizer).items():
        number = tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(
                f"{where}: has no token {token}, which masked language modelling needs. "
                "Add it with data_prep/train_tokenizer.py --existing."
            )
        special_ids[name] = number
    added = [number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    all_special_ids = tuple(sorted({*special_ids.values(), *added}))
    return TokenizerInfo(hashlib.sha256(data).hexdigest(), vocab_size(tokenizer), special_ids, all_special_ids)


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of the special tokens by role: BERT's, Gemma's or RoBERTa's, whichever it has all of first.

    BERT's if it has none of the three.
    """
    for names in (SPECIAL_TOKENS, *KEPT_NAMES):
        if all(tokenizer.token_to_id(token) is not None for token in names.values()):
            return names
    return SPECIAL_TOKENS


def vocab_size(tokenizer: Tokenizer) -> int:
    """Return one more than the highest id: a vocabulary with gaps still needs an embedding row for each id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def read_tokenizer(file: Path) -> Tokenizer:
    """Load a tokenizer.json for raw text: without truncation or padding, and with "[MASK]" in a text encoded as text.

    Raises ValueError if the file is not a tokenizer.json.
    """
    return parse_tokenizer(read_bounded(file, MAX_TOKENIZER_BYTES), str(file))


def parse_tokenizer(data: bytes, where: str) -> Tokenizer:
    """Parse the bytes of a tokenizer.json, as read_tokenizer does. where: names it in errors."""
    try:
        raw = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}. Fetch or write it again.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict) or "added_tokens" not in raw:
        raise ValueError(
            f"{where}: not a tokenizer of the tokenizers library: it has no model and added tokens. "
            "Make one with data_prep/train_tokenizer.py --existing."
        )
    with rust_errors_as_value_error(where):
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        tokenizer.encode(PROBE)
    if not tokenizer.get_vocab():
        raise ValueError(f"{where}: has no tokens. Fetch or write it again.")
    return tokenizer


@contextmanager
def rust_errors_as_value_error(where: str) -> Iterator[None]:
    """Raise a ValueError for what the tokenizers library raises in the block; what it prints itself is left out."""
    with _quiet_stderr():
        try:
            yield
        except BaseException as error:
            # The library has no class of its own: a plain Exception, or PanicException, which is no Exception.
            if type(error) not in (Exception, ValueError) and type(error).__name__ != "PanicException":
                raise
            reason = one_line(error)[:200]
            raise ValueError(
                f"{where}: the tokenizers library cannot read it: {reason}. Fetch or write it again."
            ) from error


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Let nothing that the process writes to its descriptor 2 through, for a moment."""
    try:
        kept = os.dup(2)
    except OSError:
        # The descriptor is closed, so nothing is visible anyway.
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, without special tokens."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def encode_flat(tokenizer: Tokenizer, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of all texts end to end, without special tokens, and the length of each text (int64)."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
    # Only one text's ids are held as Python numbers at a time.
    ids = chain.from_iterable(encoding.ids for encoding in encodings)
    return np.fromiter(ids, dtype, int(lengths.sum())), lengths
