"""Open text files as decompressed streams of bytes, and decode them by their byte order mark or a given encoding."""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, NamedTuple

import zstandard

from data_prep.sources.base import ISO_2022, DamagedError
from data_prep.sources.remote import open_file

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSED = (".gz", ".zst")
DAMAGED_ARCHIVE = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)

# The first bytes of a compressed file, and how its name ends.
ARCHIVES = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}

READ_BYTES = 1 << 20
# Compressed bytes that are decompressed by one call. A block of 128 kB takes at least 4 bytes, so the result has at
# most 32 MB.
PACKED_BYTES = 1 << 10
# Bytes that one call of gzip returns: as many are lost before damage at most.
UNPACKED_BYTES = 1 << 16
# The largest window of the format that `zstd --long=31` writes, as in archives of Reddit.
MAX_WINDOW_BYTES = 1 << 31

# The marks of UTF-32 come first, because that of its little-endian form begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


# These do not say the order of their bytes; the byte order mark does.
WITHOUT_ORDER = ("utf-16", "utf-32")
# These say once, before the first such character, which characters follow, so a line alone cannot be decoded.
STATEFUL = re.compile("iso2022_|hz$|utf-7$")


class UndecodableError(DamagedError):
    """Bytes that are not text in the encoding of their file. The message names the file and the byte."""


class Encoding(NamedTuple):
    """codec: Python's name of an encoding; mark: bytes of the byte order mark that says so, 0 without one."""

    codec: str
    mark: int

    @property
    def has_plain_line_ends(self) -> bool:
        """Whether a line ends where the byte 0x0a is and can be decoded alone, as in UTF-8 but not in UTF-16."""
        return "\n".encode(self.codec) == b"\n" and not STATEFUL.match(codecs.lookup(self.codec).name)


UTF_8 = Encoding("utf-8", 0)


def check_encoding(name: str) -> None:
    """Raise ValueError for a name that Python has no text encoding of."""
    try:
        "\n".encode(name)
        b"".decode(name)
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"encoding is {name!r}, expected the name of a text encoding, such as latin-1, cp1252, utf-16 or gb18030."
        ) from error


def encoding_of(path: str, asked: str | None) -> Encoding:
    """Return the encoding of a file: that of its byte order mark, else the one that is asked for, else UTF-8."""
    with open_bytes(path) as file:
        head = file.read(4)
    for magic, suffix in ARCHIVES.items():
        if head.startswith(magic):
            raise UndecodableError(f"{path}: is compressed. Rename it so that its name ends with {suffix}.")
    for mark, codec in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return Encoding(codec, len(mark))
    if asked and (codec := codecs.lookup(asked).name) in WITHOUT_ORDER:
        raise UndecodableError(
            f"{path}: has no byte order mark, so {codec} does not say the order of its bytes. Pass --encoding "
            f"{codec}-le or --encoding {codec}-be."
        )
    return Encoding(asked or "utf-8", 0)


@contextmanager
def open_bytes(path: str) -> Iterator[io.BufferedReader]:
    """Open a file or URL; .gz and .zst are decompressed. Reading a damaged archive raises one of DAMAGED_ARCHIVE."""
    with open_file(path) as raw:
        if path.lower().endswith(".gz"):
            yield io.BufferedReader(ChunkStream(_unpack_gzip(raw)), READ_BYTES)
        elif path.lower().endswith(".zst"):
            yield io.BufferedReader(ChunkStream(_unpack_zstd(raw)), READ_BYTES)
        else:
            yield raw


def decode(data: bytes, encoding: Encoding, path: str, offset: int = 0) -> str:
    """Decode bytes that begin at `offset` of a file. Raises UndecodableError for bytes that are not text."""
    try:
        text = data.decode(encoding.codec)
    except UnicodeDecodeError as error:
        raise not_in_encoding(path, encoding, offset + error.start, data[error.start]) from error
    if "\0" in text:
        raise contains_nul(path, offset, data, bytes_before_nul(text, encoding))
    if ISO_2022 in text:
        at = offset + len(text[: text.index(ISO_2022)].encode(encoding.codec))
        codec = "iso2022_kr" if text.startswith(f"{ISO_2022})C", text.index(ISO_2022)) else "iso2022_jp"
        raise UndecodableError(
            f"{path}: byte {at} begins an escape sequence of ISO-2022. Pass --encoding {codec}, or convert it to "
            "UTF-8; if the file is no such text, remove the sequence."
        )
    return text


def in_utf8(file: io.BufferedIOBase, encoding: Encoding, path: str) -> IO[bytes]:
    """Return a stream of the same text in UTF-8. file: at its beginning. Reading it raises UndecodableError."""
    return io.BufferedReader(ChunkStream(_encode_again(file, encoding, path)), READ_BYTES)


def not_in_encoding(path: str, encoding: Encoding, offset: int, byte: int) -> UndecodableError:
    remedy = "Pass the encoding of the file, such as --encoding latin-1, or convert it to UTF-8."
    if encoding.mark:
        remedy = "The file's byte order mark says that it is, so it is damaged: write it again."
    return UndecodableError(f"{path}: byte {offset} ({byte:#04x}) is not valid {encoding.codec}. {remedy}")


def bytes_before_nul(text: str, encoding: Encoding) -> int:
    return len(text[: text.index("\0")].encode(encoding.codec)) - len("".encode(encoding.codec))


def contains_nul(path: str, offset: int, data: bytes, at: int) -> UndecodableError:
    """Make the error for a NUL at data[at], and guess the encoding from its place and its neighbours."""
    unit = 32 if data[at : at + 2] == b"\0\0" else 16
    order = "le" if (offset + at) % 2 else "be"
    return UndecodableError(
        f"{path}: byte {offset + at} is NUL, which no text contains. If the file is text of another encoding, pass it, "
        f"such as --encoding utf-{unit}-{order}; otherwise remove the NUL."
    )


class ChunkStream(io.RawIOBase):
    """A stream of the bytes that an iterator yields in chunks."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        view = memoryview(buffer).cast("B")
        size = min(len(view), len(self._rest))
        view[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _unpack_gzip(raw: IO[bytes]) -> Iterator[bytes]:
    """Yield the content of a .gz file in pieces. A read of several pieces would lose those before the damage."""
    file = gzip.GzipFile(fileobj=raw)
    while piece := file.read1(UNPACKED_BYTES):
        yield piece


def _unpack_zstd(raw: IO[bytes]) -> Iterator[bytes]:
    """Yield the content of all frames of a .zst file, in pieces.

    Raises EOFError for a truncated file, which the reader of zstandard takes for the end, ZstdError for other damage.
    """
    frame: zstandard.ZstdDecompressionObj | None = None
    while packed := raw.read(PACKED_BYTES):
        while packed:
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
            yield frame.decompress(packed)
            packed = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the file ends within a zstd frame")


def _encode_again(file: io.BufferedIOBase, encoding: Encoding, path: str) -> Iterator[bytes]:
    """Yield the text of a file in UTF-8, up to the first byte that is no text, which raises UndecodableError."""
    decoder = codecs.getincrementaldecoder(encoding.codec)()
    offset = len(file.read(encoding.mark))
    while True:
        # read() would lose what it has read before damage in an archive.
        data = file.read1(READ_BYTES)
        state = decoder.getstate()
        # The decoder keeps the bytes of an unfinished character and decodes them again with the next ones.
        kept = len(state[0])
        begin = offset - kept
        damage = None
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            damage = not_in_encoding(path, encoding, begin + error.start, error.object[error.start])
            decoder.setstate(state)
            text = decoder.decode(data[: max(0, error.start - kept)])
        if "\0" in text:
            damage = contains_nul(path, begin, b"", bytes_before_nul(text, encoding))
            text = text[: text.index("\0")]
        yield text.encode()
        if damage is not None:
            raise damage
        if not data:
            return
        offset += len(data)
