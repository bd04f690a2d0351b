"""Exports that several test files share, and launchers that run in the test's own process."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megabert.convert import to_hf
from megabert.convert.check import export_check
from megabert.convert.to_hf import ExportOptions
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.small_model import BERT, small_model
from tests.helpers import warm
from tests.helpers.runs import REPOSITORY, Finished, run_ranks
from tests.helpers.shared import make_once


@pytest.fixture(autouse=True)
def warm_checks(monkeypatch) -> None:
    """Fork the process of every export check; the end-to-end test starts one as users do."""
    monkeypatch.setattr(export_check, "subprocess", warm.CHECKS)


@pytest.fixture(scope="session")
def run(corpus, tmp_path_factory) -> Path:
    """A run at ZeRO 3 on two ranks; the end-to-end test exports ZeRO 2. A test that changes it must copy it first."""

    def train(out: Path) -> None:
        done = run_ranks(corpus, out, "--run.max_steps=2", ds_config="zero3", ranks=2)
        assert done.code == 0, done.output

    return make_once(tmp_path_factory, "zero3", train)


@pytest.fixture(scope="session")
def exported(run, tmp_path_factory) -> Path:
    """The export of that run. A test that changes it must copy it first."""

    def export(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export_check, "subprocess", warm.CHECKS)
            to_hf.export_checkpoint(run, folder / "hf")

    return make_once(tmp_path_factory, "exported", export) / "hf"


@pytest.fixture(scope="session")
def bert(corpus, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint of a BERT, and its export in several files."""

    def write(folder: Path) -> None:
        write_checkpoint(folder / "run", small_model(**BERT), corpus.tokenizer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export_check, "subprocess", warm.CHECKS)
            to_hf.export_checkpoint(folder / "run", folder / "hf", ExportOptions(max_shard_size="30KB"))

    folder = make_once(tmp_path_factory, "bert-checkpoint", write)
    return folder / "run", folder / "hf"


@pytest.fixture
def skipped_checks(monkeypatch) -> list[Path]:
    """Let every export check pass without starting a process. Lists the folders that would have been checked."""
    folders = []

    def pass_check(folder: Path) -> dict:
        folders.append(folder)
        return {"max_difference": 0.0, "transformers": "0"}

    monkeypatch.setattr(export_check, "run_in_subprocess", pass_check)
    return folders


@pytest.fixture
def run_launcher(monkeypatch, capsys) -> Callable[..., Finished]:
    """Run a file of launch/ as a command, but in this process, which saves loading torch again."""

    def run_launcher(file: str, *arguments: str | Path) -> Finished:
        monkeypatch.setattr(sys, "argv", [file, *map(str, arguments)])
        # What the test printed before.
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "launch" / file), run_name="__main__")
        captured = capsys.readouterr()
        return Finished(int(ended.value.code or 0), captured.out + captured.err)

    return run_launcher
