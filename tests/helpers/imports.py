"""The import graph of the project: its modules, what each imports, and the levels that follow from it."""

import ast
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("megabert", "data_prep", "launch")


def part_of(module: str) -> str:
    """megabert.data.stream -> megabert.data; data_prep.sources -> data_prep."""
    return ".".join(module.split(".")[:2]) if module.startswith("megabert.") else module.split(".")[0]


@cache
def modules() -> dict[str, Path]:
    """The path of each module, by its dotted name."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path
    return found


@cache
def imports_of(module: str) -> frozenset[str]:
    """Every module of ours that a module imports, anywhere in its file."""
    path, ours = modules()[module], modules()
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([base] if base else [])])
            found |= {name if (name := f"{base}.{alias.name}") in ours else base for alias in node.names}
    return frozenset(name for name in found if name.split(".")[0] in FOLDERS)


def code_files(folder: Path) -> list[Path]:
    """The files of code directly inside a folder: Python that is not an empty __init__.py, and shell scripts."""
    suffixes = (".py", ".sh", ".sbatch")
    return [path for path in sorted(folder.iterdir()) if path.suffix in suffixes and path.read_text().strip()]


def units(package: str) -> dict[str, set[str]]:
    """The files and folders directly inside a package, each with those of them that it imports."""
    depth = package.count(".") + 2

    def unit(name: str) -> str | None:
        inside = name.startswith(package + ".") and name != package
        return ".".join(name.split(".")[:depth]) if inside else None

    graph: dict[str, set[str]] = {}
    for module in modules():
        if own := unit(module):
            graph.setdefault(own, set()).update(other for name in imports_of(module) if (other := unit(name)))
    return {own: others - {own} for own, others in graph.items()}


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """The level of each node: one above the highest of those that it imports. Raises ValueError for a circle."""
    found: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> int:
        if name in trail:
            raise ValueError(f"circle: {' -> '.join([*trail[trail.index(name) :], name])}")
        if name not in found:
            found[name] = 1 + max((visit(other, (*trail, name)) for other in graph[name]), default=0)
        return found[name]

    for name in graph:
        visit(name, ())
    return found
