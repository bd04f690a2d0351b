"""What a command writes is a path: a URL or a command as an output is refused before any work."""

import os
import re
import sys
from dataclasses import MISSING, fields

import pytest
import torch
from safetensors.torch import save

from data_prep import fetch_tasks, train_tokenizer
from data_prep.writing import shard_options
from launch import pareto, plot_run
from megabert.commands import export, import_hf
from megabert.config.cli import read_flags
from megabert.config.recipe_parser import load_recipe
from megabert.convert.hf.reader import read_weights
from megabert.finetune.jobs import score_checkpoint
from megabert.finetune.options import FinetuneOptions
from tests.helpers.imports import modules
from tests.helpers.runs import run_command

COMMANDS = {
    fetch_tasks.Options: [],
    train_tokenizer.Options: [],
    shard_options.Options: [],
    FinetuneOptions: ["--checkpoint", "x"],
    pareto.Options: ["--runs", "x"],
    plot_run.Options: ["x"],
    score_checkpoint.Options: [],
    export.Options: ["x"],
    import_hf.Options: ["x"],
}
OUTPUT = re.compile(r"    (out|output_dir|cache_dir): str\b.*")


@pytest.mark.parametrize("options", COMMANDS, ids=lambda options: options.__module__)
@pytest.mark.parametrize("out", ["s3://bucket/x", "file:///x", "hf:me/x"])
def test_an_output_that_is_no_path_is_refused(options, out, capsys):
    is_flag = next(field for field in fields(options) if field.name == "out").default is not MISSING
    with pytest.raises(SystemExit) as exit:
        read_flags(options, "x.py", "", [*COMMANDS[options], *(["--out", out] if is_flag else [out])])
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"x.py: {'--' if is_flag else ''}out is '{out}', expected a path on ")
    assert printed.endswith("Leave out file://.\n" if out.startswith("file:") else "copy the result.\n")


def test_an_output_whose_name_is_not_utf_8_is_refused(capsys, tmp_path):
    """Weights could be written there, but not read again."""
    out = tmp_path / os.fsdecode(b"caf\xe9")
    out.mkdir()
    (out / "model.safetensors").write_bytes(save({"x": torch.ones(2)}))
    with pytest.raises(ValueError, match="its name is not UTF-8, so safetensors cannot open it"):
        read_weights(out)
    with pytest.raises(SystemExit):
        read_flags(import_hf.Options, "x.py", "", ["x", str(out)])
    assert capsys.readouterr().err == f"x.py: out is {str(out)!r}, which is not UTF-8. Choose another name.\n"


@pytest.mark.parametrize("name", ["run.output_dir", "data.cache_dir"])
def test_an_output_of_a_recipe_that_is_no_path_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} is 'gs://bucket/run', expected a path"):
        load_recipe("quickstart", **{name: "gs://bucket/run"})


def test_every_output_is_declared_as_one():
    lines = [line for path in modules().values() for line in path.read_text().splitlines()]
    found = [line for line in lines if OUTPUT.fullmatch(line)]
    assert len(found) == len(COMMANDS) + 2
    assert all("is_output=True" in line for line in found), found


def test_a_picture_of_the_schedule_that_is_no_path_is_refused():
    # In a process of its own, whose signal handlers the command changes.
    done = run_command([sys.executable, "launch/pretrain.py", "--plot_schedule", "s3://bucket/a.png"])
    assert done.code == 2
    assert "--plot_schedule is 's3://bucket/a.png', expected a path" in done.output
