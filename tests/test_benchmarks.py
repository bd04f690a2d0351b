"""Command lines of the benchmarks: one parser for all, whose errors are one line and exit code 2."""

import os
import re
import subprocess
import sys

import pytest
from support import report

from tests.helpers.runs import REPOSITORY

BENCHMARKS = REPOSITORY / "tests/benchmarks"
SCRIPTS = [*sorted(BENCHMARKS.glob("*.py")), BENCHMARKS / "race/run.py", BENCHMARKS / "race/ablation.py"]


@pytest.mark.parametrize("flags", [["--quic"], ["--json=/nowhere/x.json"], ["--quick", "--quick"], ["--json"], ["x"]])
def test_a_wrong_flag_is_one_line_and_exit_code_2(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tests/benchmarks/bench_x.py", *flags])
    with pytest.raises(SystemExit) as end:
        report.read_arguments("What it measures.")
    assert end.value.code == 2
    assert re.fullmatch(r"bench_x\.py: .*\n", capsys.readouterr().err)


def test_figures_go_to_a_file_in_a_folder_that_exists(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["bench_x.py", "--quick", f"--json={tmp_path / 'x.json'}"])
    arguments = report.read_arguments("What it measures.")
    assert arguments.quick
    report.write({"speed": 1.0}, arguments.json)
    assert '"speed": 1.0' in (tmp_path / "x.json").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_benchmark_makes_its_parser_from_the_shared_one(script):
    text = script.read_text()
    if "race" in script.parts:
        text += (BENCHMARKS / "race/command.py").read_text()
    assert re.search(r"\b(make_parser|read_arguments)\(__doc__|\bmake_parser\(description", text)
    assert "ArgumentParser" not in text


def test_a_script_that_imports_helpers_of_the_tests_finds_them():
    """A script's own folder is on Python's path, the repository is not."""
    for script in SCRIPTS:
        text = script.read_text()
        assert "from tests." not in text or "parents[2]))" in text, script


@pytest.mark.nightly
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_benchmark_starts_without_a_path_of_the_caller(script):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
