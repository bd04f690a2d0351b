"""tests/benchmarks/bench_glue.py without a package that it needs."""

import importlib.util
import runpy

import pytest

from tests.helpers.runs import REPOSITORY


def test_the_benchmark_names_accelerate_if_it_is_missing(monkeypatch, tmp_path, capsys):
    folder, find = REPOSITORY / "tests/benchmarks", importlib.util.find_spec
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("sys.argv", ["bench_glue.py", str(tmp_path)])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "accelerate" else find(name, *rest)
    )
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(folder / "bench_glue.py"), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("transformers' Trainer needs accelerate: pip install accelerate\n")
