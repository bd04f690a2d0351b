"""Print the folders of the project with their files, lines and levels of imports.

python tests/count_code.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.helpers.imports import REPOSITORY, code_files, levels, modules, units


def main() -> None:
    """Print one line per folder, and the totals."""
    print(f"{'folder':<36}{'files':>6}{'lines':>7}{'levels':>8}")
    total_files, total_lines = 0, 0
    folders = sorted({path.parent for path in modules().values()} | {REPOSITORY / "launch/slurm"})
    for folder in folders:
        files = code_files(folder)
        lines = sum(len(path.read_text().splitlines()) for path in files)
        graph = units(".".join(folder.relative_to(REPOSITORY).parts))
        height = max(levels(graph).values(), default=1)
        print(f"{folder.relative_to(REPOSITORY)!s:<36}{len(files):>6}{lines:>7}{height:>8}")
        total_files, total_lines = total_files + len(files), total_lines + lines
    print(f"{len(folders)} folders, {total_files} files, {total_lines} lines")


if __name__ == "__main__":
    main()
