"""Write and read samples of a shard, whose keys and dtypes this module defines.

A shard is a plain webdataset tar. One sample is a *chunk* of many documents, because a tar member per document
would cost more than the document. There are two kinds:

    tokens: {key}.tokens.npy   uint16 or uint32, all documents end to end, raw ids without special tokens
            {key}.lengths.npy  int32, tokens of each document
    text:   {key}.jsonl        one {"text": ...} per line, UTF-8
"""

import io
import json
import math
import re
import tarfile
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["tokens", "text"]

TOKENS_KEY = "tokens.npy"
LENGTHS_KEY = "lengths.npy"
TEXT_KEY = "jsonl"

# BERT's special tokens, by their names in a manifest.
SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
# Those of Gemma's tokenizers, such as mmBERT's, and of RoBERTa's and its like, which keep their names. Gemma's have
# tokens of the names of both.
GEMMA_TOKENS = {"pad": "<pad>", "unk": "<unk>", "cls": "<bos>", "sep": "<eos>", "mask": "<mask>"}
ROBERTA_TOKENS = GEMMA_TOKENS | {"cls": "<s>", "sep": "</s>"}
KEPT_NAMES = (GEMMA_TOKENS, ROBERTA_TOKENS)

# Most tokens of a chunk. 256 KiB of uint16 are a long enough read for a disk or an object store, and a loader worker
# holds only a few chunks.
MAX_CHUNK_TOKENS = 131_072

# Only the header that numpy.save writes for little-endian numbers in one or two dimensions.
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<dtype><[uif][248]|\|[ui]1)', 'fortran_order': False, "
    rb"'shape': \((?P<shape>\d{1,18},|\d{1,18}, \d{1,18})\), \} *\n",
    re.DOTALL,
)


class TokenChunk(NamedTuple):
    """tokens: (total,) uint16 or uint32; lengths: (documents,) int32 that sum to total."""

    tokens: np.ndarray
    lengths: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest dtype that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode_tokens(chunk: TokenChunk) -> dict[str, bytes]:
    return {TOKENS_KEY: encode_npy(chunk.tokens), LENGTHS_KEY: encode_npy(chunk.lengths.astype(np.int32))}


def decode_tokens(sample: dict[str, bytes], where: str) -> TokenChunk:
    """Decode a sample to a token chunk. `where` names it in errors. Raises ValueError if it is not one."""
    for key in (TOKENS_KEY, LENGTHS_KEY):
        if key not in sample:
            raise ValueError(f"{where}: has {sorted(sample)}, expected a member .{key}. Is this a token shard?")
    tokens, lengths = (read_npy(sample[key], f"{where}.{key}") for key in (TOKENS_KEY, LENGTHS_KEY))
    if tokens.dtype not in (np.uint16, np.uint32) or tokens.ndim != 1:
        raise ValueError(
            f"{where}.{TOKENS_KEY}: holds {tokens.dtype} of shape {tokens.shape}, expected flat uint16 or uint32. "
            "Write it again with data_prep/write_shards.py."
        )
    negative = lengths.size > 0 and lengths.dtype.kind == "i" and lengths.min() < 0
    if lengths.dtype != np.int32 or lengths.ndim != 1 or lengths.sum(dtype=np.int64) != len(tokens) or negative:
        raise ValueError(
            f"{where}.{LENGTHS_KEY}: {lengths.dtype} lengths sum to {lengths.sum(dtype=np.int64)}, expected int32 that "
            f"sum to the chunk's {len(tokens)} tokens. Write it again with data_prep/write_shards.py."
        )
    return TokenChunk(tokens, lengths)


def encode_text(documents: list[str]) -> dict[str, bytes]:
    lines = (json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
    return {TEXT_KEY: "".join(lines).encode()}


def decode_text(sample: dict[str, bytes], where: str) -> list[str]:
    """Decode a sample to the texts of its documents. Raises ValueError if it is not a text chunk."""
    if TEXT_KEY not in sample:
        raise ValueError(f"{where}: has {sorted(sample)}, expected a member .{TEXT_KEY}. Is this a text shard?")
    try:
        texts = [json.loads(line)["text"] for line in sample[TEXT_KEY].splitlines()]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where}.{TEXT_KEY}: not one {{'text': ...}} per line: {error!r}") from error
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}.{TEXT_KEY}: has a text that is not a string.")
    return texts


def write_sample(tar: tarfile.TarFile, key: str, sample: dict[str, bytes]) -> None:
    """Append one sample. The same content gives the same bytes on any machine."""
    for extension, data in sample.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        member.mode = 0o644
        tar.addfile(member, io.BytesIO(data))


def read_sample(data: bytes, where: str) -> dict[str, bytes]:
    """Read one sample from the bytes of its tar members.

    Raises ValueError for damaged bytes and for anything that write_sample does not write, such as links, devices,
    sparse files and long headers. No name becomes a path, and nothing larger than `data` is allocated.
    """
    sample: dict[str, bytes] = {}
    offset = 0
    while offset < len(data):
        try:
            name, kind, size = _read_header(data[offset : offset + tarfile.BLOCKSIZE])
        except ValueError as error:
            raise _damaged(where, f"no tar header at its byte {offset} ({error})") from error
        begin = offset + tarfile.BLOCKSIZE
        if kind != tarfile.REGTYPE or not 0 <= size <= len(data) - begin:
            raise _damaged(where, f"member {name!r} is of type {kind!r} and {size} bytes")
        sample[name.partition(".")[2]] = data[begin : begin + size]
        offset = begin + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return sample


def _read_header(header: bytes) -> tuple[str, bytes, int]:
    """Read (name, type, bytes) of a member from the plain USTAR header that write_sample writes (POSIX.1-1988, ustar).

    Raises ValueError for anything else. tarfile's own parser reads every kind of header and takes four times as long;
    with small chunks that is a third of a stream's time.
    """
    if len(header) != tarfile.BLOCKSIZE or header[257:262] != b"ustar" or header[345:346] != b"\0":
        raise ValueError("not ustar")
    checksum = int(header[148:156].strip(b" \0"), 8)
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise ValueError("bad checksum")
    name = header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return name, header[156:157], int(header[124:136].strip(b" \0"), 8)


def _damaged(where: str, problem: str) -> ValueError:
    return ValueError(
        f"{where}: damaged: {problem}, expected plain members that fill the chunk. "
        "Check the shard with data_prep/check_shards.py."
    )


def encode_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_npy(data: bytes, where: str) -> np.ndarray:
    """Read a plain array of one or two dimensions. Raises ValueError for anything else, such as a pickle.

    numpy's own reader evaluates the header, and allocates the size it gives before it checks that the data is there.
    """
    match = NPY_HEADER.match(data)
    if match is None:
        raise ValueError(f"{where}: not a plain .npy array as numpy.save writes it. Write it again.")
    dtype = np.dtype(match["dtype"].decode())
    shape = tuple(int(number) for number in match["shape"].split(b",") if number.strip())
    begin = 10 + int.from_bytes(data[8:10], "little")
    if math.prod(shape) * dtype.itemsize != len(data) - begin:
        raise ValueError(f"{where}: {len(data) - begin} bytes, expected {dtype} of shape {shape}. Write it again.")
    return np.frombuffer(data, dtype, offset=begin).reshape(shape).copy()
