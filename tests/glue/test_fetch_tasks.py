"""launch/fetch_tasks.py without a network: small made-up files in the places of the real ones."""

import io
import runpy
import tarfile

import pytest

from megabert.glue.labelled import movies, same_sense
from megabert.glue.readers import read_split
from megabert.glue.tasks import read_task
from tests.conftest import REPOSITORY

LABELLED = REPOSITORY / "megabert/glue/labelled"


@pytest.fixture
def launch(monkeypatch, capsys):
    """The command in this process: exit code and stderr."""

    def run(*flags: str) -> tuple[int | str | None, str]:
        monkeypatch.setattr("sys.argv", ["launch/fetch_tasks.py", *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPOSITORY / "launch/fetch_tasks.py"), run_name="__main__")
        return end.value.code, capsys.readouterr().err

    return run


def packed(name: str, content: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return archive.getvalue()


@pytest.fixture
def snippets(tmp_path, monkeypatch):
    """The movies' source distribution, with 60 snippets."""
    lines = [f"{i}_{i}\t{(i % 9 - 4) * 0.9}\tsnippet {i}  of a\tfilm " for i in range(60)]
    content = packed(movies.INNER, packed(movies.FILE, "\r\n".join(lines).encode()))
    (tmp_path / movies.SDIST).write_bytes(content)
    monkeypatch.setattr(movies, "SHA256", movies.hashlib.sha256(content).hexdigest())
    return tmp_path


def test_movies_become_two_tasks_that_their_files_describe(snippets, launch):
    assert launch(f"--out={snippets}") == (0, "")
    for name, count in (("movie-sentiment", 53), ("movie-rating", 60)):
        task = read_task(LABELLED / f"{name}.yaml")
        train, dev = (read_split(task, snippets, split) for split in ("train", "validation"))
        assert len(train.first) + len(dev.first) == count
        assert not set(train.first) & set(dev.first)
    assert "snippet 8 of a film" in train.first + dev.first
    assert max(train.labels or []) == pytest.approx(3.6)


def test_what_cannot_be_fetched_or_is_another_file_is_one_line(tmp_path, launch, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    code, mistake = launch(f"--out={tmp_path}")
    assert (code, mistake.count("\n")) == (1, 1)
    assert "vaderSentiment==3.3.2: pip could not fetch it" in mistake
    assert mistake.strip().endswith(f"Put {movies.SDIST} into {tmp_path}.")
    (tmp_path / movies.SDIST).write_bytes(b"something else")
    code, mistake = launch(f"--out={tmp_path}")
    assert (code, mistake.count("\n")) == (1, 1)
    assert f"expected {movies.SHA256}. Remove it, and fetch it again" in mistake


BANK = """\
  1 This is the licence.
00000001 14 n 01 bank 0 000 | sloping land; "they walked along the bank"; "he sat on the bank of the river"
00000002 14 n 01 bank 0 000 | an institution; "he put money in the bank"; "that bank lends"
"""


def test_same_sense_has_as_many_of_each_label_per_word(snippets, tmp_path, launch):
    wordnet = tmp_path / "wordnet"
    wordnet.mkdir()
    code, mistake = launch(f"--out={snippets}", f"--wordnet={wordnet}")
    assert code == 1
    assert "data.noun: no such file; expected WordNet's data files" in mistake
    for name in same_sense.FILES:
        (wordnet / name).write_text(BANK if name == "data.noun" else "  1 This is the licence.\n")
    assert launch(f"--out={snippets}", f"--wordnet={wordnet}") == (0, "")
    lines = [
        line.split("\t")
        for name in ("train", "dev")
        for line in (snippets / f"same-sense/{name}.tsv").read_text().splitlines()[1:]
    ]
    labels = [label for _, _, label in lines]
    assert labels.count("same") == labels.count("different") == 2
    rivers = [("river" in one or "walked" in one) == ("river" in two or "walked" in two) for one, two, _ in lines]
    assert rivers == [label == "same" for label in labels]
    assert all(text.startswith("bank: ") for line in lines for text in line[:2])
