"""Finished exports for targets to be added to, made once and in this process."""

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megabert.convert import to_hf
from megabert.convert.check import export_check
from megabert.convert.targets import compared_texts, registry
from megabert.convert.targets.target import ExportedFolder
from megabert.files.checkpoint_format import files_of
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.small_model import small_model
from tests.helpers.shared import make_once
from tests.model.helpers.architectures import ARCHITECTURES

TARGETS = ("onnx", "onnx-int8", "jina")
# How the names of each target's files begin.
OWN = {"onnx": ("onnx/model.onnx", "onnx/model_mlm"), "onnx-int8": ("onnx/model_quantized",), "jina": ("jina/",)}


@pytest.fixture(scope="session")
def checkpoint(corpus, tmp_path_factory) -> Path:
    folder = make_once(
        tmp_path_factory, "targets", lambda folder: write_checkpoint(folder / "run", small_model(), corpus.tokenizer)
    )
    return folder / "run"


@pytest.fixture(scope="session")
def served(checkpoint, tmp_path_factory) -> Path:
    """An export with targets, without the check in another process. A test that changes it must copy it first."""

    def export(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                export_check, "run_in_subprocess", lambda folder: {"max_difference": 0.0, "transformers": "0"}
            )
            to_hf.export_checkpoint(checkpoint, folder / "hf", to_hf.ExportOptions(targets=TARGETS))

    return make_once(tmp_path_factory, "served", export) / "hf"


@pytest.fixture(scope="session")
def export_native(corpus, tmp_path_factory) -> Callable[[str], Path]:
    """Export a model of an architecture that transformers has, as encoder too; fewer texts. Copy it to change it."""

    @functools.cache
    def export_native(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        model = small_model(**ARCHITECTURES[architecture] | {"num_attention_heads": 2})
        write_checkpoint(folder / "run", model, corpus.tokenizer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                export_check, "run_in_subprocess", lambda folder: {"max_difference": 0.0, "transformers": "0"}
            )
            patch.setattr(compared_texts, "NUM_TEXTS", 200)
            to_hf.export_checkpoint(folder / "run", folder / "hf", to_hf.ExportOptions(targets=("encoder",)))
        return folder / "hf"

    return export_native


@pytest.fixture
def write_damaged(served, tmp_path, monkeypatch) -> Callable[[str, Callable[[Path], object]], str]:
    """Write one target again, then damage its files before the proof. Returns why it failed; nothing of it is left."""

    def write_damaged(name: str, damage: Callable[[Path], object]) -> str:
        target = registry.TARGETS[name]
        own = [file for file in files_of(served) if file.startswith(OWN[name])]
        folder = shutil.copytree(served, tmp_path / "base", dirs_exist_ok=True)
        registry.remove_files(folder, set(own))
        before = files_of(folder)

        def write(exported: ExportedFolder, folder: Path) -> str:
            for file in own:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(served / file, folder / file)
            damage(folder)
            return "a damaged program"

        monkeypatch.setitem(registry.TARGETS, name, replace(target, write=write, requires=()))
        outcome = registry.write_targets(folder, (name,))[name]
        assert "opened" not in outcome, "the proof passed"
        assert files_of(folder) == before
        assert not [path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]
        return outcome["failed"]

    return write_damaged
