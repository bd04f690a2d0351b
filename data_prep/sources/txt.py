"""Read text files: one document per file, or documents separated by blank lines."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.sources import base
from data_prep.sources.base import DamagedError, InputSplit, LeftOut, ReadOptions, too_long
from data_prep.sources.lines import Line, list_line_splits, read_lines, until_unreadable
from data_prep.sources.remote import RemotePath, size_of
from data_prep.sources.text_encoding import decode, encoding_of, open_bytes

TO_SEPARATE = (
    "Pass --blank-lines if blank lines separate its documents, or convert it to a .jsonl file with one document per "
    "line."
)


def list_input_splits(path: Path | RemotePath, options: ReadOptions) -> list[InputSplit]:
    """List the input splits of a file. Raises DamagedError if it is too large to be one document."""
    if options.blank_lines:
        return list_line_splits(path, "txt", options)
    size = size_of(path)
    if size > base.MAX_DOCUMENT_BYTES:
        raise too_long(str(path), TO_SEPARATE)
    return [InputSplit("txt", (str(path),), 0, size, size)]


def read(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[str]:
    if not options.blank_lines:
        yield from until_unreadable(_whole(split.paths[0], options, left_out), split.paths[0], left_out)
        return
    for lines in _paragraphs(split, options, left_out):
        try:
            yield decode(b"".join(line.data for line in lines), lines[0].encoding, split.paths[0], lines[0].offset)
        except DamagedError as error:
            left_out.damaged(error)


def _whole(path: str, options: ReadOptions, left_out: LeftOut) -> Iterator[str]:
    encoding = encoding_of(path, options.encoding)
    with open_bytes(path) as file:
        data = file.read(base.MAX_DOCUMENT_BYTES + 1)
    if len(data) > base.MAX_DOCUMENT_BYTES:
        left_out.damaged(too_long(path, TO_SEPARATE))
    else:
        yield decode(data[encoding.mark :], encoding, path, encoding.mark)


def _paragraphs(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[list[Line]]:
    """Yield the lines of each paragraph. One belongs to the byte range in which the blank line before it begins."""
    lines: list[Line] = []
    size = 0
    # No blank line precedes the first paragraph of the file.
    in_range = split.start == 0
    for line in read_lines(split, options, left_out):
        if line.data.isspace():
            if size > base.MAX_DOCUMENT_BYTES:
                left_out.damaged(_endless(lines[0]))
            elif lines:
                yield lines
            lines, size = [], 0
            in_range = True
            if line.offset >= split.stop:
                return
        elif in_range:
            size += len(line.data)
            if size <= base.MAX_DOCUMENT_BYTES:
                lines.append(line)
            elif not left_out.skip_damaged:
                left_out.damaged(_endless(lines[0]))
        elif line.offset >= split.stop:
            # No blank line begins in this range, so no paragraph belongs to it.
            return
    if size > base.MAX_DOCUMENT_BYTES:
        left_out.damaged(_endless(lines[0]))
    elif lines:
        yield lines


def _endless(first: Line) -> DamagedError:
    return too_long(first.where, "Separate the documents by blank lines, or convert the file to .jsonl.")
