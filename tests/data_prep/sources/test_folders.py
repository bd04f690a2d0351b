"""Tests that everything below a folder is read, counted as left out, or named in an error."""

import gzip
import json
import os

import pytest

from data_prep import write_shards
from data_prep.sources import LeftOut, ReadOptions, hub, list_input_splits, read_input_split, source_state
from megabert.data.shards.manifest import read_manifest


def read(source, left_out=None, **options) -> list[str]:
    left_out = LeftOut() if left_out is None else left_out
    settings = ReadOptions(**options)
    splits = list_input_splits(str(source), settings, left_out)
    return [text for split in splits for text in read_input_split(split, settings, left_out)]


@pytest.fixture
def folder(tmp_path):
    """corpus/a.txt and corpus/link, a link to the folder linked, which holds b.txt."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "linked" / "deep").mkdir(parents=True)
    (tmp_path / "corpus" / "a.txt").write_text("a")
    (tmp_path / "linked" / "deep" / "b.txt").write_text("b")
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "linked")
    return tmp_path / "corpus"


def test_linked_folders_are_read(folder):
    assert read(folder) == ["a", "b"]
    (folder / "c.txt").symlink_to(folder.parent / "linked" / "deep" / "b.txt")
    (folder / "d.txt").hardlink_to(folder / "a.txt")
    left_out = LeftOut()
    assert read(folder, left_out) == ["a", "b"]
    assert left_out.counts == {"files and folders that are read under another name": 2}
    (folder.parent / "elsewhere.txt").write_text("c")
    (folder / "e.txt").symlink_to(folder.parent / "elsewhere.txt")
    assert read(folder) == ["a", "b", "c"]


def test_a_change_behind_a_link_changes_the_state_of_the_source(folder):
    splits = list_input_splits(str(folder), ReadOptions(), LeftOut())
    before = source_state(splits), hub.files(str(folder))
    (folder / "link" / "deep" / "b.txt").write_text("another")
    assert source_state(splits) != before[0]
    assert [path.name for path in before[1]] == ["a.txt", "b.txt"]


def test_documents_of_dolma_are_read_and_its_attributes_are_named(tmp_path):
    """The layout of docs/data-format.md of https://github.com/allenai/dolma."""
    document = {
        "id": "1",
        "text": "a text",
        "source": "web",
        "added": "2024",
        "created": "2023",
        "metadata": {"url": "u"},
    }
    attributes = {"id": "1", "source": "web", "attributes": {"toxicity": [[0, 6, 0.1]]}}
    for name, row in (("documents/2019-09", document), ("attributes/toxicity-0/2019-09", attributes)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0933_uk_all.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))
    assert read(tmp_path / "documents") == ["a text"]
    with pytest.raises(
        ValueError, match=r"0933_uk_all\.jsonl\.gz at line 1: holds .* Pass the folder documents beside"
    ):
        read(tmp_path)
    assert read(tmp_path, LeftOut(skip_damaged=True), skip_damaged=True) == ["a text"]


def test_the_folders_that_nemo_curator_writes_are_read(tmp_path):
    """One file a task, named by a hash, as pandas writes it: records with an index of no meaning."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    rows = pandas.DataFrame({"text": ["a text", "caf\u00e9 / b"], "id": [1, 2], "quality": [0.5, None]}, index=[7, 3])
    for folder in ("jsonl", "parquet"):
        (tmp_path / folder).mkdir()
    rows.to_json(tmp_path / "jsonl/0a1b2c3d4e5f.jsonl", lines=True, orient="records")
    rows.to_parquet(tmp_path / "parquet/0a1b2c3d4e5f.parquet")
    assert read(tmp_path / "jsonl") == read(tmp_path / "parquet") == ["a text", "caf\u00e9 / b"]


def test_circles_of_links_end(folder):
    (folder / "link" / "up").symlink_to(folder)
    (folder / "z").symlink_to("link")
    left_out = LeftOut()
    assert read(folder, left_out) == ["a", "b"]
    assert left_out.counts == {"files and folders that are read under another name": 2}
    assert str(folder / "link" / "up") in str(left_out)


def test_many_links_between_folders_are_followed_once(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}").mkdir()
        for name in ("x", "y"):
            (tmp_path / f"{number}" / name).symlink_to(tmp_path / f"{number + 1}")
    (tmp_path / "30").mkdir()
    (tmp_path / "30" / "a.txt").write_text("a")
    assert read(tmp_path) == ["a"]


def test_hidden_files_are_left_out_and_counted(folder):
    for name in ("._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "link/.DS_Store", "__MACOSX/a.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("hidden")
    (folder / ".broken").symlink_to("nowhere")
    left_out = LeftOut()
    assert read(folder, left_out) == ["a", "b"]
    assert left_out.counts == {"hidden files and folders": 5}
    assert read(folder / "._a.txt") == ["hidden"] == read(folder / ".ipynb_checkpoints")


def test_files_of_another_kind_are_counted(folder):
    (folder / "notes.csv").write_text("text\nx\n")
    (folder / "B.TXT").write_text("upper case")
    left_out = LeftOut()
    assert read(folder, left_out) == ["upper case", "a", "b"]
    assert str(left_out) == f"files of another kind: 1 ({folder / 'notes.csv'})"
    with pytest.raises(ValueError, match=r"notes\.csv: holds no text; expected .*It holds files of another kind: 1"):
        read(folder / "notes.csv")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("nowhere"), "x: a link whose target cannot be read: No such file or directory"),
        (lambda path: path.symlink_to("x"), "x: a link whose target cannot be read: Too many levels of symbolic links"),
        (os.mkfifo, "x: is a pipe or a device, expected a file or a folder.* Write its content to a file"),
    ],
)
def test_what_cannot_be_read_is_named(folder, make, message):
    make(folder / "x")
    for source in (folder, folder / "x"):
        with pytest.raises(ValueError, match=message):
            read(source)
    # As the message says.
    (folder / "x").unlink()
    assert read(folder) == ["a", "b"]


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    listdir = os.listdir

    def deny(path):
        if path.name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", deny)
    with pytest.raises(ValueError, match="link/deep: cannot be listed: Permission denied"):
        read(folder)


def test_a_device_is_no_source():
    with pytest.raises(ValueError, match="/dev/zero: is a pipe or a device"):
        read("/dev/zero")


NAMES = ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.parquet", "a.arrow"]


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_file_holds_no_document(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.txt").write_text("a text")
    left_out = LeftOut()
    assert read(tmp_path, left_out) == ["a text"]
    assert str(left_out) == f"empty files: 1 ({tmp_path / name})"


def test_empty_files_before_the_first_document_are_reported(tmp_path, capsys):
    source = tmp_path / "corpus"
    source.mkdir()
    for name in NAMES:
        (source / name).write_bytes(b"")
    command = [f"--source={source}", f"--out={tmp_path / 'out'}", "--workers=1", "--min-shards=1"]
    with pytest.raises(ValueError, match=r"has no document .* Left out: empty files: 7 \(such as .*/a.arrow\)"):
        write_shards.main(command)
    (source / "b.txt").write_text("a text")
    assert write_shards.main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'out'}: 1 documents, 6 characters, shards: 1 train",
        f"left out: empty files: 7 (such as {source / 'a.arrow'})",
    ]
    statistics = read_manifest(tmp_path / "out").statistics
    assert statistics["left_out"] == {"empty files": 7}
    assert statistics["left_out_examples"] == {"empty files": [str(source / name) for name in sorted(NAMES)[:3]]}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("corpsu", r"corpsu: no such file or folder\. Did you mean corpus\?"),
        ("docstring", r"docstring: no such file or folder\. Did you mean docstrings\?"),
        (
            "allenai/c4",
            "no such file or folder.*For the data set of this name on the Hugging Face hub, pass hf:allenai/c4",
        ),
        ("*.txt", r"no such file or folder.*takes one file or folder \(no pattern, no command\) or the URL of one"),
        ("pipe:cat x", "no such file or folder.*no command"),
    ],
)
def test_a_source_that_does_not_exist_is_explained(folder, monkeypatch, source, message):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ValueError, match=message):
        read(source)


@pytest.mark.parametrize(
    ("name", "options", "flag"),
    [
        ("x.jsonl", {"blank_lines": True}, "--blank-lines"),
        ("x.txt", {"dataset_config": "en"}, "--dataset-config"),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path, name, options, flag):
    (tmp_path / name).write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=rf"{flag} has no effect on it: it contains {name[2:]}. Omit {flag}"):
        read(tmp_path, **options)
    assert read(tmp_path)


def test_a_read_error_names_the_file(folder, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")
        yield

    monkeypatch.setattr("data_prep.sources.READERS", {"txt": fail})
    with pytest.raises(OSError, match=r"Input/output error: '.*a\.txt'"):
        read(folder)
