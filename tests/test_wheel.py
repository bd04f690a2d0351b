"""A machine that has the installed wheel, and no checkout, has every command, the recipes and the ds_configs."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from megabert.config import cli
from tests.helpers.runs import REPOSITORY, TINY, Corpus

SOURCES = ("megabert", "data_prep", "ds_configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
COMMANDS = {"pretrain", "shards", "tokenizer", "export", "import", "finetune"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, and install it without its dependencies into a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        REPOSITORY,
        folder / "source",
        ignore=lambda path, names: set(names) - set(SOURCES) if path == str(REPOSITORY) else ["__pycache__"],
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-index", "--no-deps"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(folder), str(folder / "source")], check=True
    )
    shutil.rmtree(folder / "source")
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def run(site: Path, cwd: Path, name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run an installed command where only the wheel's megabert can be imported."""
    env = os.environ | {"PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu", "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, str(site / "bin" / name), *flags], cwd=cwd, env=env, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_it_has_every_command_and_one_ds_configs_folder(site):
    assert {path.name for path in (site / "bin").iterdir()} == {f"megabert-{name}" for name in COMMANDS}
    ours = {path.name: path.read_text() for path in (REPOSITORY / "ds_configs").glob("*.json")}
    assert {path.name: path.read_text() for path in (site / "megabert/ds_configs").glob("*.json")} == ours
    assert {path.name for path in site.iterdir()} == {
        "bin",
        "data_prep",
        "megabert",
        next(site.glob("*.dist-info")).name,
    }
    [metadata] = site.glob("*.dist-info")
    distribution = Distribution.at(metadata)
    assert distribution.metadata["Name"] == "megabert"
    assert all(callable(command.load()) for command in distribution.entry_points)


def test_it_trains_without_the_checkout(site, corpus: Corpus, tmp_path):
    flags = [*TINY, f"--data.train={corpus.tokens}", "--run.max_steps=1", "--run.output_dir=out"]
    done = run(site, tmp_path, "megabert-pretrain", "--ds_config", "zero0", *flags)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out/checkpoints/latest").read_text() == "step-00000001"


def test_it_says_what_is_missing_where_there_is_no_checkout(site, tmp_path):
    done = run(site, tmp_path, "megabert-pretrain")
    assert done.returncode == 2
    assert "megabert-pretrain: data/quickstart/tokens is missing. Write shards with megabert-shards" in done.stdout
    done = run(site, tmp_path, "megabert-shards", "--tokenizer=nowhere")
    assert "no such tokenizer. Train one with megabert-tokenizer." in done.stdout
    help_text = run(site, tmp_path, "megabert-pretrain", "--help").stdout
    assert "a task's YAML file, as for megabert-finetune" in " ".join(help_text.split())


@pytest.mark.parametrize("name", sorted(COMMANDS - {"pretrain"}))
def test_help_shows_the_command_as_it_is_installed(name, monkeypatch, tmp_path, capsys):
    """megabert-pretrain is left out: it ends its process."""
    [module] = re.findall(rf'"megabert-{name}": "([\w.]+)"', (REPOSITORY / "setup.py").read_text())
    monkeypatch.setattr(sys, "argv", [f"megabert-{name}", "--help"])
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).command()
    assert end.value.code == 0
    help_text = capsys.readouterr().out
    assert help_text.startswith(f"usage: megabert-{name} ")
    assert re.search(rf"^ *megabert-{name} [\w-]", help_text, re.MULTILINE)
    assert not re.search(r"\.py\b|/\w+\.(md|sh|sbatch)\b(?!\s+of\s+MegaBERT's\s+repository)", help_text)
