"""Prose that two Debian packages carry: Jane Austen's six novels and Spurgeon's Treasury of David, both public domain.

apt-get downloads the packages without installing them; R and SWORD are not needed to read them.
"""

import html
import json
import re
import struct
import subprocess
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from megabert.files.atomic import write_atomically
from megabert.files.hashing import file_sha256

PACKAGES = {
    "r-cran-janeaustenr": "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    "sword-comm-tdavid": "bcbfad701c5c4a061475b58309cebc42755a59e87478c8355227c5e046412b3f",
}
NOVELS = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
COMMENTARY = "usr/share/sword/modules/comments/zcom/tdavid/ot"
# Paragraphs are joined to documents of at least this many characters, so that 2 % of them are held out evenly.
DOCUMENT_CHARACTERS = 1500
# R's serialization: CHARSXP.
STRING = 9


class UnreachableError(Exception):
    """apt-get did not give the packages."""


def write_documents(folder: Path, out: Path) -> None:
    """Write all documents to a .jsonl file. Raises UnreachableError without the packages, ValueError for other ones."""
    for package, sha256 in PACKAGES.items():
        extract(package, sha256, folder)
    paragraphs = [*novels(folder / NOVELS), *commentary(folder / COMMENTARY)]
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents(paragraphs))
    write_atomically(out, "".join(f"{line}\n" for line in lines).encode())


def extract(package: str, sha256: str, folder: Path) -> None:
    """Download a package, compare its hash, and extract it to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(f"{package}_*.deb")):
        command = ["apt-get", "download", package]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            raise UnreachableError(f"{' '.join(command)}: {error}") from error
        if done.returncode:
            output = done.stderr.strip().splitlines() or ["no error message"]
            raise UnreachableError(f"{' '.join(command)}: {output[-1]}")
    [path] = folder.glob(f"{package}_*.deb")
    if (digest := file_sha256(path)) != sha256:
        raise ValueError(f"{path}: sha256 {digest}, expected {sha256}: another version. Remove it, or take Debian 12.")
    subprocess.run(["dpkg-deb", "-x", str(path), str(folder)], check=True)


def novels(path: Path) -> Iterator[str]:
    """Yield the paragraphs of R's lazy-load file: zlib streams, each after its size, of vectors of lines."""
    data = path.read_bytes()
    while data:
        stream = zlib.decompressobj()
        serialized = stream.decompress(data[4:])
        data = stream.unused_data
        yield from (" ".join(block.split()) for block in re.split(r"\n\s*\n", "\n".join(strings(serialized))))


def strings(serialized: bytes) -> Iterator[str]:
    """Yield the elements of a serialized character vector without attributes (XDR format, version 3).

    The header is "X\\n", three versions, an encoding's name after its length; then come type and length of the vector.
    """
    (name,) = struct.unpack_from(">i", serialized, 14)
    at = 18 + name
    _, count = struct.unpack_from(">ii", serialized, at)
    at += 8
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", serialized, at)
        assert flags & 0xFF == STRING, "the vector holds strings"
        at += 8
        yield serialized[at : at + max(0, size)].decode()
        at += max(0, size)


def commentary(stem: Path) -> Iterator[str]:
    """Yield the paragraphs of a SWORD module: an index of (offset, compressed size, size), and zlib blocks of XML."""
    index, blocks = stem.with_suffix(".czs").read_bytes(), stem.with_suffix(".czz").read_bytes()
    for offset, size, _ in struct.iter_unpack("<III", index[: len(index) // 12 * 12]):
        if size:
            text = zlib.decompress(blocks[offset : offset + size]).decode()
            for part in re.split(r'<div [^>]*type="x-p"/>', text):
                yield " ".join(html.unescape(re.sub(r"<[^>]*>", " ", part)).split())


def documents(paragraphs: Iterable[str]) -> Iterator[str]:
    """Join consecutive paragraphs to documents."""
    held: list[str] = []
    for paragraph in paragraphs:
        if paragraph:
            held.append(paragraph)
        if sum(map(len, held)) >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)
