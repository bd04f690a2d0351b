"""Exports that several files of tests look at. Who changes one copies it first."""

from pathlib import Path

import pytest

from megabert.convert import to_hf
from megabert.convert.to_hf import Wish
from tests.conftest import pretrain_command, run_command
from tests.convert.checkpoints import write_checkpoint
from tests.convert.small import BERT, small_model


@pytest.fixture(scope="session")
def run(corpus, tmp_path_factory) -> Path:
    """Stage 3 on two ranks, whose weights are in pieces; the end-to-end test exports stage 2."""
    out = tmp_path_factory.mktemp("zero3")
    done = run_command(pretrain_command(corpus, out, "--run.max_steps=2", ds_config="zero3", ranks=2))
    assert done.code == 0, done.output
    return out


@pytest.fixture(scope="session")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "hf"
    to_hf.export(run, out)
    return out


@pytest.fixture(scope="session")
def bert(corpus, tmp_path_factory) -> tuple[Path, Path]:
    """A run of BERT, and its export in several files."""
    folder = tmp_path_factory.mktemp("bert")
    write_checkpoint(folder / "run", small_model(**BERT), corpus.tokenizer)
    to_hf.export(folder / "run", folder / "hf", Wish(max_shard_size="30KB"))
    return folder / "run", folder / "hf"
