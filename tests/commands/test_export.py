"""The export command finds its source where a killed one left it."""

import pytest

from megabert.commands import export
from megabert.convert import folder_to_hf


def test_a_folder_that_a_killed_export_moved_aside_is_the_source_again(tmp_path, monkeypatch):
    """Where names cannot be exchanged, a kill between two renames leaves no folder under the name of the source."""
    moved = tmp_path / ".tmp-hf-0123abcd-old"
    moved.mkdir()
    (moved / "config.json").write_text("{}")
    sources = []

    def export_folder(source, *_):
        sources.append([path.name for path in source.iterdir()])
        raise ValueError("enough")

    monkeypatch.setattr(folder_to_hf, "export_folder", export_folder)
    with pytest.raises(ValueError, match="enough"):
        export.export(export.Options(str(tmp_path / "hf"), out=str(tmp_path / "hf")))
    assert sources == [["config.json"]]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
