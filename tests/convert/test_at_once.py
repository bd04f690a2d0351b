"""What another command wrote to the same folder, while an import or an export ran, is not replaced in silence."""

from contextlib import contextmanager
from pathlib import Path

import pytest

from megabert.convert import folder_to_hf, from_hf, to_hf, to_mosaicbert
from megabert.convert.from_hf import ImportOptions, import_model
from megabert.convert.to_hf import ExportOptions
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.folders import write_published_mosaicbert
from tests.convert.helpers.small_model import small_model


def then(monkeypatch, module, write) -> None:
    """Call `write` once the module has begun to write to its temporary folder."""
    begin = module.staged_folder

    @contextmanager
    def begun(out: Path):
        with begin(out) as folder:
            monkeypatch.setattr(module, "staged_folder", begin)
            write(out)
            yield folder

    monkeypatch.setattr(module, "staged_folder", begun)


def add_file(out: Path) -> None:
    out.mkdir()
    (out / "theirs.txt").write_text("theirs")


@pytest.mark.usefixtures("skipped_checks")
@pytest.mark.parametrize(
    ("module", "start"),
    [
        (from_hf, lambda here: from_hf.import_model(here / "published", here / "out")),
        (to_hf, lambda here: to_hf.export_checkpoint(here / "run", here / "out")),
        (folder_to_hf, lambda here: folder_to_hf.export_folder(here / "hf", here / "out", ExportOptions())),
        (to_mosaicbert, lambda here: to_mosaicbert.export_mosaicbert(here / "run", here / "out")),
    ],
)
def test_a_folder_of_another_command_is_kept(corpus, tmp_path, monkeypatch, module, start):
    write_published_mosaicbert(tmp_path / "published")
    write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer)
    to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf")
    then(monkeypatch, module, add_file)
    with pytest.raises(ValueError, match=r"out: is (not empty|neither empty nor an export).* choose another folder"):
        start(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out", "published", "run"]


def test_of_two_imports_with_other_options_the_first_that_ends_is_kept(tmp_path, monkeypatch):
    write_published_mosaicbert(tmp_path / "in")
    longer = ImportOptions(max_length=99)
    then(monkeypatch, from_hf, lambda out: import_model(tmp_path / "in", out, longer))
    with pytest.raises(ValueError, match="is the import of another source, or with other options"):
        import_model(tmp_path / "in", tmp_path / "out")
    assert import_model(tmp_path / "in", tmp_path / "out", longer).reused


def test_of_two_equal_imports_both_end_well(tmp_path, monkeypatch):
    write_published_mosaicbert(tmp_path / "in")
    then(monkeypatch, from_hf, lambda out: import_model(tmp_path / "in", out))
    assert not import_model(tmp_path / "in", tmp_path / "out").reused
    assert import_model(tmp_path / "in", tmp_path / "out").reused
