"""The README's Python runs, its links lead somewhere, and its file tree is the repository's."""

import re
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import REPOSITORY, Corpus, run_command

README = (REPOSITORY / "README.md").read_text()


def files_of_repository(*patterns: str) -> list[Path]:
    """Return the files whose name matches a pattern, without those that its commands write."""
    found = (path.relative_to(REPOSITORY) for pattern in patterns for path in REPOSITORY.rglob(pattern))
    return sorted(
        REPOSITORY / path
        for path in found
        if not {part for part in path.parts if part.startswith(".")} - {".github", ".ci", ".pre-commit-config.yaml"}
        and path.parts[0] not in ("build", "data", "runs")
    )


DOCUMENTS = files_of_repository("*.md")


def test_its_python_runs(corpus: Corpus, tmp_path):
    """Run the block on a small corpus, for 2 steps instead of 1000, without compiling."""
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    short = block.replace('"max_steps": 1000', '"max_steps": 2, "eval_tokens": 1024, "ops": "torch"')
    assert short != block
    (tmp_path / "data/mine").mkdir(parents=True)
    (tmp_path / "data/mine/tokens").symlink_to(corpus.tokens)
    script = f"import os\nos.chdir({str(tmp_path)!r})\n{short}"
    done = run_command([sys.executable, "tests/helpers/scripts/run_code.py", script])
    assert done.code == 0, done.output
    assert re.search(r"^runs/quickstart 2 \d+\.\d+ finished$", done.output, re.MULTILINE)


def test_it_is_short():
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_lines_of_prose_have_at_most_120_columns(path: Path):
    """Tables and output of commands may be wider."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not [line for line in prose.splitlines() if len(line) > 120 and not line.startswith(("|", "    "))]


def test_lines_of_scripts_and_settings_have_at_most_120_columns():
    """Ruff checks Python's."""
    paths = files_of_repository("*.sh", "*.sbatch", "*.yaml", "*.yml", "*.toml", "justfile")
    assert {"install.sh", "pretrain.sbatch", "quickstart.yaml", "pyproject.toml"} <= {path.name for path in paths}
    wide = [
        f"{path}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert not wide


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_between_documents_lead_somewhere(path: Path):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    missing = [name for name in targets if "://" not in name and not (path.parent / name).exists()]
    assert not missing


def test_the_file_tree_has_every_folder_and_nothing_else():
    tree = README.split("## Files")[1].split("##")[0]
    shown = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("    ")}
    packages = {path.parent.name for path in (REPOSITORY / "megabert").glob("*/__init__.py")} | {"recipes"}
    top = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} | {"ds_configs", "launch"}
    assert shown == packages | top


def test_every_benchmark_is_in_their_table():
    table = (REPOSITORY / "tests/benchmarks/README.md").read_text().split("## ")[0]
    scripts = {path.name for path in (REPOSITORY / "tests/benchmarks").glob("*.py")}
    assert scripts == {name for name in re.findall(r"`([\w/]+\.py)`", table.partition("|---")[2]) if "/" not in name}
