"""Read .txt files: one document per file, or documents separated by blank lines."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.base import MAX_DOCUMENT_BYTES, InputSplit, ReadOptions, bounded_lines, byte_ranges


def list_input_splits(path: Path, options: ReadOptions) -> list[InputSplit]:
    """List the input splits of a file. Raises ValueError if it is too large to be one document."""
    size = path.stat().st_size
    if options.blank_lines:
        return byte_ranges(str(path), size, "txt")
    if size > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"{path}: {size >> 20} MB would be one document, the limit is {MAX_DOCUMENT_BYTES >> 20} MB. Pass "
            "--blank-lines if blank lines separate its documents, or convert it to a .jsonl file with one document "
            "per line."
        )
    return [InputSplit("txt", (str(path),), 0, size, size)]


def read(split: InputSplit, options: ReadOptions) -> Iterator[str]:
    if options.blank_lines:
        for paragraph in _paragraphs(split):
            yield paragraph.decode("utf-8", "replace")
    else:
        yield Path(split.paths[0]).read_bytes().decode("utf-8", "replace")


def _paragraphs(split: InputSplit) -> Iterator[bytes]:
    """Yield paragraphs. One belongs to the byte range in which the blank line before it begins."""
    path = split.paths[0]
    with open(path, "rb") as file:
        offset = split.start
        if split.start:
            file.seek(split.start - 1)
            offset += len(file.readline()) - 1  # skip the rest of a line that began in an earlier range
        lines: list[bytes] = []
        size = 0
        in_range = split.start == 0  # no blank line precedes the first paragraph of the file
        for line in bounded_lines(file, f"{path} at byte {offset}"):
            if line.isspace():
                if lines:
                    yield b"".join(lines)
                lines, size = [], 0
                if offset >= split.stop:
                    return
                in_range = True
            elif in_range:
                lines.append(line)
                size += len(line)
            elif offset >= split.stop:
                return  # no blank line begins in this range
            if size > MAX_DOCUMENT_BYTES:
                raise ValueError(
                    f"{path} at byte {offset}: more than {MAX_DOCUMENT_BYTES >> 20} MB without a blank line, the "
                    "largest allowed document. Separate the documents by blank lines, or convert the file to .jsonl."
                )
            offset += len(line)
        if lines:
            yield b"".join(lines)
