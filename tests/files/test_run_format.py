"""run.json and result.json have a format version; those without one are older and are read, newer ones are refused."""

import json

import pytest

from megabert.files.run_format import RESULT, read_run_file, write_run_file


def test_a_version_is_written_and_files_without_one_are_read(tmp_path):
    write_run_file(tmp_path / RESULT, {"steps": 10})
    written = json.loads((tmp_path / RESULT).read_text())
    assert written == read_run_file(tmp_path / RESULT) == {"format_version": 1, "steps": 10}
    (tmp_path / RESULT).write_text('{"steps": 10}')
    assert read_run_file(tmp_path / RESULT) == {"steps": 10}


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_version_is_refused(tmp_path, version):
    (tmp_path / RESULT).write_text(json.dumps({"format_version": version, "steps": 10}))
    with pytest.raises(ValueError, match=rf"{RESULT}: has format_version {version!r}, this .* reads version 1. Update"):
        read_run_file(tmp_path / RESULT)
