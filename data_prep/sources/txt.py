""".txt: a document a file, or one between blank lines."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.base import MAX_DOCUMENT_BYTES, InputSplit, ReadOptions, bounded_lines, byte_ranges


def list_input_splits(path: Path, options: ReadOptions) -> list[InputSplit]:
    """Raises ValueError for a file that is too large to be one document."""
    size = path.stat().st_size
    if options.blank_lines:
        return byte_ranges(str(path), size, "txt")
    if size > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"{path}: {size >> 20} MB would be one document, the most is {MAX_DOCUMENT_BYTES >> 20} MB. Pass "
            "--blank-lines if blank lines separate its documents, or make it a .jsonl with a document a line."
        )
    return [InputSplit("txt", (str(path),), 0, size, size)]


def read(unit: InputSplit, options: ReadOptions) -> Iterator[str]:
    if options.blank_lines:
        for paragraph in _paragraphs(unit):
            yield paragraph.decode("utf-8", "replace")
    else:
        yield Path(unit.paths[0]).read_bytes().decode("utf-8", "replace")


def _paragraphs(unit: InputSplit) -> Iterator[bytes]:
    """Yield what stands between blank lines. It belongs to the range in which the blank line before it begins."""
    path = unit.paths[0]
    with open(path, "rb") as file:
        place = unit.start
        if unit.start:
            file.seek(unit.start - 1)
            place += len(file.readline()) - 1  # the rest of a line that began before
        lines: list[bytes] = []
        size = 0
        ours = unit.start == 0  # the file's first paragraph has no blank line before it
        for line in bounded_lines(file, f"{path} at byte {place}"):
            if line.isspace():
                if lines:
                    yield b"".join(lines)
                lines, size = [], 0
                if place >= unit.stop:
                    return
                ours = True
            elif ours:
                lines.append(line)
                size += len(line)
            elif place >= unit.stop:
                return  # not one blank line began here
            if size > MAX_DOCUMENT_BYTES:
                raise ValueError(
                    f"{path} at byte {place}: more than {MAX_DOCUMENT_BYTES >> 20} MB without a blank line, the most "
                    "of one document. Separate its documents by blank lines, or make it a .jsonl."
                )
            place += len(line)
        if lines:
            yield b"".join(lines)
