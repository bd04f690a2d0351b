"""Read the docstrings of installed Python packages: real English text that needs no download."""

import ast
import importlib.metadata
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from data_prep.sources.base import (
    INPUT_SPLIT_BYTES,
    NO_TEXT,
    DamagedError,
    InputSplit,
    LeftOut,
    ReadOptions,
    check_text,
)


def read(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[str]:
    for path in split.paths:
        for text in docstrings(Path(path)):
            try:
                check_text(text, path)
            except DamagedError:
                # Nobody who trains on installed packages can mend them.
                left_out.add(NO_TEXT, path)
                continue
            yield text


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of one Python file, in order. A file that this Python cannot parse yields nothing."""
    try:
        with warnings.catch_warnings():
            # Third-party code may have invalid escapes, and ast.parse warns about each.
            warnings.simplefilter("ignore")
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
        # Only statements can hold definitions. Expressions, which are most of the tree, are never visited.
        for block in ("handlers", "orelse", "finalbody", "body"):
            stack.extend(reversed([child for child in getattr(node, block, ()) if hasattr(child, "body")]))


def required_distributions(root: str) -> list[importlib.metadata.Distribution]:
    """Return the direct and indirect requirements of an installed distribution, sorted by name, without itself."""
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
            # An extra or another platform requires this package, and it is not installed here.
            continue
        for line in found[key].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return [found[key] for key in sorted(found) if key != root]


def list_input_splits() -> list[InputSplit]:
    """List the Python files of megabert's dependencies. Neither other packages nor megabert's own code change it."""
    files: dict[str, Path] = {}
    for distribution in required_distributions("megabert"):
        for file in distribution.files or ():
            if file.suffix == ".py" and ".." not in file.parts:
                files[str(file)] = Path(str(distribution.locate_file(file)))
    splits: list[InputSplit] = []
    group: list[str] = []
    size = 0
    for name in sorted(files):
        if not files[name].is_file():
            continue
        group.append(str(files[name]))
        size += files[name].stat().st_size
        # Parsing is slower than reading, so these input splits are smaller.
        if size >= INPUT_SPLIT_BYTES // 2:
            splits.append(InputSplit("docstrings", tuple(group), 0, 0, size))
            group, size = [], 0
    if group:
        splits.append(InputSplit("docstrings", tuple(group), 0, 0, size))
    return splits
