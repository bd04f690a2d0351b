"""Every number of a recipe and of a command has limits, which --help prints and which no value passes."""

import math
import re
import sys
from importlib import import_module
from typing import get_args, get_type_hints

import pytest

from data_prep import write_shards
from megabert.config.recipe import Recipe
from megabert.config.recipe_parser import load_recipe, setting_types
from megabert.config.settings import LIMITS, check_range, limits_of
from megabert.finetune.options import FinetuneOptions
from tests.helpers.recipes import read_recipe
from tests.helpers.runs import REPOSITORY

NUMBERS = {int, float}
FOLDERS_OF_COMMANDS = ("launch", "data_prep", "megabert/commands", "megabert/finetune")
# Tuples and lists have limits of their own: optimizer.betas, data.max_seq_len as a list.
ALL_LIMITS = limits_of(Recipe)


def test_every_number_has_limits():
    for name, kind in setting_types().items():
        if {kind, *get_args(kind)} & NUMBERS and name != "optimizer.betas":
            assert LIMITS.fullmatch(ALL_LIMITS[name]), name


def options_of_commands() -> list[type]:
    """Return the dataclasses from which the commands make their parsers."""
    paths = [path for folder in FOLDERS_OF_COMMANDS for path in (REPOSITORY / folder).rglob("*.py")]
    named = re.compile(r"^@dataclass.*\nclass (\w*Options)\b", re.MULTILINE)
    found = [
        getattr(import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts)), name)
        for path in sorted(paths)
        for name in named.findall(path.read_text())
    ]
    assert {FinetuneOptions, write_shards.Options} <= set(found)
    return found


@pytest.mark.parametrize(
    "options", options_of_commands(), ids=lambda options: f"{options.__module__}.{options.__name__}"
)
def test_every_number_of_a_command_has_limits(options):
    limits = limits_of(options)
    for name, kind in get_type_hints(options).items():
        if {kind, *get_args(kind)} & NUMBERS:
            assert LIMITS.fullmatch(limits.get(name, "")), f"{name} has no limits"


@pytest.mark.parametrize("name", sorted(ALL_LIMITS))
def test_a_number_outside_the_limits_is_one_line(capsys, name):
    for value in (-1, -0.001, 1e300, math.nan, math.inf, 10**21):
        with pytest.raises(ValueError, match="expected a number in"):
            check_range(name, value, ALL_LIMITS[name])
    with pytest.raises(SystemExit) as exit:
        read_recipe(f"--{name}={10**21}")
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert name in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        ("[0, 1)", [0, 0.5], [-1e-9, 1, math.nan, math.inf, -math.inf]),
        ("(0, 0.1]", [1e-12, 0.1], [0, 0.11]),
        ("[0, 2^63)", [0, (1 << 63) - 1], [1 << 63, -1]),
        ("[1, 1e6]", [1, 1_000_000], [0, 1_000_001]),
    ],
)
def test_intervals_are_read_as_they_are_written(limits, inside, outside):
    for value in inside:
        check_range("x", value, limits)
    for value in outside:
        with pytest.raises(ValueError, match="x is .*, expected a number in"):
            check_range("x", value, limits)


def test_help_prints_the_limits(capsys):
    with pytest.raises(SystemExit):
        read_recipe("--help")
    printed = " ".join(capsys.readouterr().out.split())
    for limits in ALL_LIMITS.values():
        assert f"(range {limits})" in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer.betas": [0.9, 1.0]}, "optimizer.betas is 1.0, expected a number in"),
        ({"optimizer.betas": [0.9, 0.98, 0.5]}, r"optimizer.betas is \[0.9, 0.98, 0.5\], expected 2 values"),
        ({"optimizer.betas": [0.9]}, r"optimizer.betas is \[0.9\], expected 2 values"),
        ({"optimizer.betas": []}, r"optimizer.betas is \[\], expected 2 values"),
        ({"optimizer.lr": 0.5, "optimizer.weight_decay": 3}, "optimizer.weight_decay is 3.0, expected less than 2"),
        ({"run.trackers": ["csv", "csv"]}, "run.trackers: 'csv' is listed twice"),
        ({"data.ranks": [4, 8, 4]}, "data.ranks: 4 is listed twice"),
        ({"data.train": [{"shards": "a", "weight": 0}]}, "weight is 0"),
        ({"data.train": [{"shards": ""}]}, "shards is empty"),
        ({"data.max_seq_len": [{"max_seq_len": 2, "until": 1}]}, "max_seq_len is 2, expected a number in"),
    ],
)
def test_numbers_inside_lists_and_combinations_have_limits(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("quickstart", **overrides)


@pytest.mark.parametrize(
    "text",
    [
        "data: {train: [{class_path: imported_by_a_recipe.Part}]}",
        "data: {train: [{class_path: imported_by_a_recipe.Part, init_args: {shards: x}}]}",
        "data: {train: [imported_by_a_recipe.Part]}",
        "data: {train: {class_path: imported_by_a_recipe.Part}}",
        "data: {max_seq_len: [{class_path: imported_by_a_recipe.Part}]}",
        "model: {class_path: imported_by_a_recipe.Part}",
        "model: imported_by_a_recipe.Part",
        "optimizer: {betas: imported_by_a_recipe.Part}",
        "class_path: imported_by_a_recipe.Part",
    ],
)
def test_a_recipe_imports_nothing(capsys, tmp_path, monkeypatch, text):
    (tmp_path / "imported_by_a_recipe.py").write_text("class Part:\n    def __init__(self, shards='x'): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "mine.yaml"
    path.write_text(f"run: {{max_steps: 5}}\n{text}\n")
    with pytest.raises(SystemExit):
        read_recipe("--recipe", str(path))
    assert "imported_by_a_recipe" not in sys.modules
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--model", "--data.train", "--data.train.help", "--model.help", "--data.max_seq_len"])
def test_a_flag_imports_nothing(capsys, tmp_path, monkeypatch, flag):
    (tmp_path / "imported_by_a_flag.py").write_text("class Part:\n    def __init__(self, shards='x'): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for value in ("imported_by_a_flag.Part", '[{"class_path": "imported_by_a_flag.Part"}]'):
        # A path.
        if (flag, value) != ("--data.train", "imported_by_a_flag.Part"):
            with pytest.raises(SystemExit):
                read_recipe(flag, value)
    assert "imported_by_a_flag" not in sys.modules
    assert "Traceback" not in capsys.readouterr().err
