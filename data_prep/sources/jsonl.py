"""Read JSON Lines files: one document per line, in one field."""

from collections.abc import Iterator

from data_prep.sources.base import NULL, DamagedError, InputSplit, LeftOut, ReadOptions, text_of
from data_prep.sources.lines import Line, read_lines
from data_prep.sources.text_encoding import UndecodableError
from megabert.files.json_file import parse_json


def read(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[str]:
    for line in read_lines(split, options, left_out):
        if line.offset >= split.stop:
            return
        if line.data.isspace():
            continue
        try:
            text = _text(line, options.text_key)
        except DamagedError as error:
            left_out.damaged(error)
            continue
        if text is None:
            left_out.add(NULL, line.where)
        else:
            yield text


def _text(line: Line, key: str) -> str | None:
    """Return the text of a line, None if it is null. Raises DamagedError."""
    try:
        row = parse_json(line.text())
    except UndecodableError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f'{line.where}: not valid JSON: {error}. Expected one object such as {{"text": "..."}} per line.'
        ) from error
    return text_of(row, key, line.where)
