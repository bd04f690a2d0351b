"""Imports run one way, as ALLOWED says, folders stay small, and the model folder can be shipped alone."""

import ast
import re

import pytest

from tests.helpers.imports import REPOSITORY, code_files, imports_of, levels, modules, part_of, units

# Which parts of the project each part may import, besides itself and megabert.version. A part is a package of megabert,
# data_prep or launch.
ALLOWED = {
    "megabert": {"megabert.commands", "megabert.config", "megabert.model"},
    "megabert.version": set(),
    "megabert.process": set(),
    "megabert.files": {"megabert.process"},
    "megabert.config": {"megabert.files", "megabert.process"},
    "megabert.data": {"megabert.files", "megabert.process"},
    "megabert.model": set(),
    "megabert.optim": set(),
    "megabert.kernels": {"megabert.model", "megabert.process"},
    "megabert.training": {
        "megabert.config",
        "megabert.convert",
        "megabert.data",
        "megabert.files",
        "megabert.kernels",
        "megabert.model",
        "megabert.optim",
        "megabert.process",
    },
    "megabert.convert": {"megabert.config", "megabert.data", "megabert.files", "megabert.model", "megabert.process"},
    "megabert.finetune": {
        "megabert.config",
        "megabert.convert",
        "megabert.data",
        "megabert.files",
        "megabert.kernels",
        "megabert.model",
        "megabert.optim",
        "megabert.plots",
        "megabert.process",
    },
    "megabert.commands": {
        "megabert.config",
        "megabert.convert",
        "megabert.files",
        "megabert.finetune",
        "megabert.plots",
        "megabert.training",
        "megabert.process",
    },
    "megabert.plots": {"megabert.config", "megabert.files", "megabert.training"},
    "data_prep": {"megabert.config", "megabert.data", "megabert.files", "megabert.process"},
    "launch": {
        "data_prep",
        "megabert.commands",
        "megabert.config",
        "megabert.convert",
        "megabert.data",
        "megabert.files",
        "megabert.finetune",
        "megabert.plots",
        "megabert.training",
        "megabert.process",
    },
}
# Of the training data data_prep knows only what lies on disk.
DATA_PREP_MAY_READ = "megabert.data.shards"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_one_way(module):
    mine = part_of(module)
    for imported in imports_of(module):
        theirs = part_of(imported)
        assert theirs in ALLOWED[mine] | {mine, "megabert.version"}, f"{module} imports {imported}"
        if mine == "data_prep" and theirs == "megabert.data":
            assert imported.startswith(DATA_PREP_MAY_READ), f"{module} imports {imported}"


def test_no_circles():
    assert levels({name: imports_of(name) & modules().keys() - {name} for name in modules()}).keys() == modules().keys()


PACKAGES = sorted({path.parent for path in modules().values()} - {REPOSITORY})


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: str(folder.relative_to(REPOSITORY)))
def test_a_folder_has_at_most_a_dozen_files_of_code_and_no_circle(folder):
    assert len(code_files(folder)) <= 12
    levels(units(".".join(folder.relative_to(REPOSITORY).parts)))


# Each benchmark is a command whose path users know.
TEST_FOLDERS = sorted(
    {path.parent for path in (REPOSITORY / "tests").rglob("*.py")} - {REPOSITORY / "tests/benchmarks"}
)


@pytest.mark.parametrize("folder", TEST_FOLDERS, ids=lambda folder: str(folder.relative_to(REPOSITORY)))
def test_a_folder_of_tests_has_at_most_a_dozen_files_of_tests(folder):
    assert len([path for path in code_files(folder) if path.name != "conftest.py"]) <= 12


def test_tests_import_from_helpers_and_not_from_each_other():
    found = []
    for path in sorted((REPOSITORY / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [f"{getattr(node, 'module', None) or ''}.{alias.name}" for alias in node.names]
                found += [f"{path}: {name}" for name in modules if re.search(r"^\.?tests\.(.*\.)?test_", name)]
    assert not found, "move what tests share to a folder of helpers"


def test_what_is_no_test_lies_in_a_folder_of_helpers():
    programs = {"benchmarks", "fuzz", "gpu", "gpu_walk"}
    tests = re.compile(r"(test_|check_)\w+\.py|conftest\.py|__init__\.py|count_code\.py")
    for path in (REPOSITORY / "tests").rglob("*.py"):
        folders = path.relative_to(REPOSITORY / "tests").parts[:-1]
        assert tests.fullmatch(path.name) or "helpers" in folders or programs & {*folders}, path


def test_training_has_at_most_five_levels():
    assert max(levels(units("megabert.training")).values()) <= 5


@pytest.mark.parametrize("path", sorted((REPOSITORY / "megabert/model").glob("*.py")), ids=lambda path: path.name)
def test_the_model_folder_can_be_shipped_as_it_is(path):
    """Exported folders carry it: only one-dot imports of its own, and only torch and transformers from elsewhere."""
    allowed = {
        "torch",
        "transformers",
        "flash_attn",
        "functools",
        "itertools",
        "math",
        "collections",
        "dataclasses",
        "typing",
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 or (node.module or "").split(".")[0] in allowed


def test_the_modelling_code_imports_the_whole_model_folder_directly():
    """transformers 4 copies only what that file itself imports to where it runs an exported folder's code."""
    path = REPOSITORY / "megabert/model/modeling_megabert.py"
    others = {other.stem for other in path.parent.glob("*.py")} - {"__init__", path.stem}
    imports = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom))
    assert {node.module for node in imports if node.level} == others


@pytest.mark.parametrize("path", sorted((REPOSITORY / "launch").glob("*.py")), ids=lambda path: path.name)
def test_launchers_stay_small(path):
    assert len(path.read_text().splitlines()) <= 90


def test_nothing_but_two_files_asks_what_device_this_is():
    for name, path in modules().items():
        if name not in ("megabert.training.distributed.device", "megabert.kernels.devices") and name.startswith(
            "megabert"
        ):
            text = path.read_text()
            assert "cuda.is_available" not in text, name
            assert "get_accelerator" not in text, name


def test_one_function_writes_safetensors():
    """Its error on a full disk is no OSError; save_tensors() makes it one, which commands print as one line."""
    writers = [path.name for path in modules().values() if "save_file" in path.read_text()]
    assert writers == ["writer.py"]
