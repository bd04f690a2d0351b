"""Where text comes from: each source is a list of units, and each unit a stream of documents.

A unit is what one process reads at a time. The list is the same on every run over the same input, which is what makes
preparation resumable.
"""

import ast
import gzip
import importlib.metadata
import io
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import zstandard
from packaging.requirements import Requirement

from megabert.data.manifest import MANIFEST, read_manifest
from megabert.data.sample_format import decode_text, read_sample

UNIT_BYTES = 8 << 20  # a unit of text takes a worker some seconds: long enough to be worth a process switch


class Unit(NamedTuple):
    """Files, or the bytes [start, stop) of one; size: bytes of input, for progress."""

    kind: Literal["python", "txt", "jsonl", "text_shard"]
    paths: tuple[str, ...]
    start: int
    stop: int
    size: int


class ReadOptions(NamedTuple):
    """text_key: the field of a .jsonl line; blank_lines: whether a blank line separates documents of a .txt."""

    text_key: str = "text"
    blank_lines: bool = False


def list_units(source: str) -> list[Unit]:
    """List a source's units, in a fixed order.

    source: "docstrings", a folder of our text shards, a file, or a folder of .txt and .jsonl[.gz|.zst] files.
    Raises ValueError for a source that is not there or holds nothing readable.
    """
    if source == "docstrings":
        return _docstring_units()
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{source}: no such file or folder; --source takes one, or the word docstrings.")
    if (path / MANIFEST).is_file():
        return _text_shard_units(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    units = [unit for file in files if file.is_file() for unit in _file_units(file)]
    if not units:
        raise ValueError(f"{source}: holds no text; expected .txt, .jsonl, .jsonl.gz or .jsonl.zst files.")
    return units


def read_unit(unit: Unit, options: ReadOptions) -> Iterator[str]:
    """Yield the documents of one unit. Raises ValueError naming file and line for a line that is not as promised."""
    if unit.kind == "python":
        for path in unit.paths:
            yield from docstrings(Path(path))
    elif unit.kind == "text_shard":
        with open(unit.paths[0], "rb") as file:
            file.seek(unit.start)
            data = file.read(unit.stop - unit.start)
        where = f"{unit.paths[0]} (byte {unit.start})"
        yield from decode_text(read_sample(data, where), where)
    elif unit.kind == "txt":
        text = Path(unit.paths[0]).read_text(encoding="utf-8", errors="replace")
        yield from re.split(r"\n\s*\n", text) if options.blank_lines else [text]
    else:
        yield from _read_jsonl(unit, options.text_key)


def stamps(units: list[Unit]) -> list[tuple]:
    """What changes when a source does: every unit, and its files' sizes and times (Python packages: sizes only)."""
    found = []
    for unit in units:
        states = [os.stat(path) for path in unit.paths]
        found.append((unit, *((s.st_size, 0 if unit.kind == "python" else s.st_mtime_ns) for s in states)))
    return found


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of one Python file, in order. Files that this Python cannot parse yield nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text
        # Only statements can hold definitions: the rest of the tree, which is most of it, is never visited.
        for block in ("handlers", "orelse", "finalbody", "body"):
            stack.extend(reversed([child for child in getattr(node, block, ()) if hasattr(child, "body")]))


def required_distributions(root: str) -> list[importlib.metadata.Distribution]:
    """Find an installed distribution and all that it requires, however indirectly, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    queue = [root]
    while queue:
        name = queue.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        try:
            found[key] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra, or another platform's requirement
        for line in found[key].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return [found[key] for key in sorted(found)]


def _docstring_units() -> list[Unit]:
    """The Python files of megabert's dependencies: the same whatever else is installed beside them."""
    files: dict[str, Path] = {}
    for distribution in required_distributions("megabert"):
        for file in distribution.files or ():
            if file.suffix == ".py" and ".." not in file.parts:
                files[str(file)] = Path(str(distribution.locate_file(file)))
    units: list[Unit] = []
    group: list[str] = []
    size = 0
    for name in sorted(files):
        if not files[name].is_file():
            continue
        group.append(str(files[name]))
        size += files[name].stat().st_size
        if size >= UNIT_BYTES // 4:  # parsing is slower than reading
            units.append(Unit("python", tuple(group), 0, 0, size))
            group, size = [], 0
    return [*units, Unit("python", tuple(group), 0, 0, size)] if group else units


def _text_shard_units(folder: Path) -> list[Unit]:
    manifest = read_manifest(folder)
    if manifest.kind != "text":
        raise ValueError(f"{folder}: holds {manifest.kind} shards, expected text to tokenize.")
    return [
        Unit("text_shard", (str(folder / shard.name),), offset, offset + size, size)
        for part in sorted(manifest.splits)
        for shard in manifest.splits[part]
        for offset, size in shard.chunks[:, :2].tolist()
    ]


def _file_units(path: Path) -> list[Unit]:
    size = path.stat().st_size
    name = path.name
    if name.endswith(".txt"):
        return [Unit("txt", (str(path),), 0, size, size)]
    if name.endswith((".jsonl.gz", ".jsonl.zst")):
        return [Unit("jsonl", (str(path),), 0, size, size)]
    if name.endswith(".jsonl"):
        starts = range(0, size, UNIT_BYTES)
        return [Unit("jsonl", (str(path),), a, min(a + UNIT_BYTES, size), min(UNIT_BYTES, size - a)) for a in starts]
    return []


def _read_jsonl(unit: Unit, text_key: str) -> Iterator[str]:
    path = unit.paths[0]
    for place, line in _lines(unit):
        if not line.strip():
            continue
        try:
            yield str(json.loads(line)[text_key])
        except (json.JSONDecodeError, UnicodeDecodeError) as mistake:
            raise ValueError(f"{path} at {place}: not valid JSON: {mistake}") from mistake
        except (KeyError, TypeError) as mistake:
            raise ValueError(
                f"{path} at {place}: has no field {text_key!r}. Name the right one with --text-key."
            ) from mistake


def _lines(unit: Unit) -> Iterator[tuple[str, bytes]]:
    """Yield (place, line). A line belongs to the byte range in which it begins."""
    path = unit.paths[0]
    if path.endswith(".gz"):
        with gzip.open(path) as file:
            yield from ((f"line {n}", line) for n, line in enumerate(file, 1))
    elif path.endswith(".zst"):
        with open(path, "rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as file:
            yield from ((f"line {n}", line) for n, line in enumerate(io.BufferedReader(file), 1))
    else:
        with open(path, "rb") as file:
            if unit.start:
                file.seek(unit.start - 1)
                file.readline()  # the rest of a line that began before
            while (begin := file.tell()) < unit.stop:
                yield f"byte {begin}", file.readline()
