"""Tests of data_prep/fetch_tasks.py without a network, on small made-up files instead of the real data."""

import errno
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_prep.tasks import movies, parameters, same_sense, tsv, verses
from data_prep.tasks.held_out import read_documents
from data_prep.tasks.tsv import Row, write_splits
from data_prep.write_shards import main
from megabert.files.lock import acquire
from megabert.finetune.tasks.readers import read_split
from megabert.finetune.tasks.task import read_task
from tests.helpers.runs import REPOSITORY

TASKS = REPOSITORY / "data_prep/tasks"


@pytest.fixture
def launch(monkeypatch, capsys):
    """A function that runs the command in this process and returns exit code and stderr."""

    def run(*flags: str) -> tuple[int | str | None, str]:
        monkeypatch.setattr("sys.argv", ["data_prep/fetch_tasks.py", *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPOSITORY / "data_prep/fetch_tasks.py"), run_name="__main__")
        return end.value.code, capsys.readouterr().err

    return run


def tar_gz(name: str, content: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return archive.getvalue()


@pytest.fixture
def snippets(tmp_path, monkeypatch):
    """A folder with a source distribution of 60 snippets instead of the real one."""
    lines = [f"{i}_{i}\t{(i % 9 - 4) * 0.9}\tsnippet {i}  of a\tfilm " for i in range(60)]
    content = tar_gz(movies.INNER, tar_gz(movies.FILE, "\r\n".join(lines).encode()))
    (tmp_path / movies.SDIST).write_bytes(content)
    monkeypatch.setattr(movies, "SHA256", movies.hashlib.sha256(content).hexdigest())
    return tmp_path


def test_the_movie_tasks_have_the_labels_of_their_task_files(snippets, launch):
    assert launch(f"--out={snippets}") == (0, "")
    for name, count in (("movie-sentiment", 53), ("movie-rating", 60)):
        task = read_task(TASKS / f"{name}.yaml")
        train, dev = (read_split(task, snippets, split) for split in ("train", "validation"))
        assert len(train.first) + len(dev.first) == count
        assert not set(train.first) & set(dev.first)
    assert "snippet 8 of a film" in train.first + dev.first
    assert max(train.labels or []) == pytest.approx(3.6)


def test_two_commands_cannot_write_to_one_folder(snippets, launch):
    lock = acquire(snippets / "writing.lock")
    code, stderr = launch(f"--out={snippets}")
    assert code == 1
    assert f"{snippets}: another fetch_tasks.py is writing there, process {os.getpid()} on" in stderr
    assert stderr.count("\n") == 1
    lock.release()


def test_a_failed_download_and_a_wrong_file_are_one_line_errors(tmp_path, launch, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    code, stderr = launch(f"--out={tmp_path}")
    assert (code, stderr.count("\n")) == (1, 1)
    assert "vaderSentiment==3.3.2: pip could not download it" in stderr
    assert stderr.strip().endswith(f"Put {movies.SDIST} into {tmp_path}.")
    (tmp_path / movies.SDIST).write_bytes(b"something else")
    code, stderr = launch(f"--out={tmp_path}")
    assert (code, stderr.count("\n")) == (1, 1)
    assert f"expected {movies.SHA256}. Remove it and run the command again" in stderr


# Stands in for pip: writes its process id and a temporary file, and waits.
WAITING_PIP = """
import os, sys, tempfile, time
from pathlib import Path
tempfile.mkstemp()
Path(sys.argv[sys.argv.index("-d") + 1], "pid").write_text(f"{os.getpid()}\\n")
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_download_leaves_no_process_and_no_folder(snippets, tmp_path, launch, number):
    out, pip = tmp_path / "out", tmp_path / "pip"
    pip.mkdir()
    (pip / "__init__.py").touch()
    (pip / "__main__.py").write_text(WAITING_PIP)
    command = subprocess.Popen(
        [sys.executable, "data_prep/fetch_tasks.py", f"--out={out}"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "TMPDIR": str(tmp_path)},
    )
    while not (pids := [path for path in out.glob("*/pid") if path.read_text().endswith("\n")]):
        assert command.poll() is None
        time.sleep(0.01)
    download = psutil.Process(int(pids[0].read_text()))
    command.send_signal(number)
    assert command.wait() == (-number if number == signal.SIGKILL else 128 + number)
    assert psutil.wait_procs([download], timeout=60)[1] == []
    shutil.copy(snippets / movies.SDIST, out)
    assert launch(f"--out={out}") == (0, "")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["movie-rating", "movie-sentiment", movies.SDIST, "writing.lock"]
    )
    assert list(tmp_path.glob("tmp*")) == []


BANK = """\
  1 This is the licence.
00000001 14 n 01 bank 0 000 | sloping land; "they walked along the bank"; "he sat on the bank of the river"
00000002 14 n 01 bank 0 000 | an institution; "he put money in the bank"; "that bank lends"
"""


def test_same_sense_has_as_many_of_each_label_per_word(snippets, tmp_path, launch):
    wordnet = tmp_path / "wordnet"
    wordnet.mkdir()
    code, stderr = launch(f"--out={snippets}", f"--wordnet={wordnet}")
    assert code == 1
    assert "data.noun: no such file; expected WordNet's data files" in stderr
    for name in same_sense.FILES:
        (wordnet / name).write_text(BANK if name == "data.noun" else "  1 This is the licence.\n")
    (wordnet / "data.adv").write_text("  1 This is the licence.\n00000001 14 n\n")
    code, stderr = launch(f"--out={snippets}", f"--wordnet={wordnet}")
    assert (code, stderr.count("\n")) == (1, 1)
    assert "data.adv: line 2 is not in WordNet's format. Copy the file again (Debian: wordnet-base)." in stderr
    (wordnet / "data.adv").write_text("")
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


NAMES = "Adam Boaz Caleb Daniel Esther Felix Gideon Hannah Isaac Jonah Kish Laban".split()
OLD_WORDS, NEW_WORDS = (
    ("spake unto", "went forth with", "begat"),
    ("talked to", "left together with", "became the father of"),
)


def translated(chapter: int, verbs: tuple[str, ...]) -> list[str]:
    """Make twelve verses of a chapter. The translations share the names and differ in the verbs."""
    return [f"{NAMES[i]} {verbs[(i + chapter) % 3]} {NAMES[(i * 5 + chapter) % 12]} " for i in range(12)]


class Bible:
    """Stands for pysword.bible.SwordBible: one book of forty chapters."""

    def __init__(self, verbs: tuple[str, ...]):
        self.verbs = verbs
        self._decompressed_text = str

    def get_structure(self):
        book = types.SimpleNamespace(name="Genesis", osis_name="Gen", num_chapters=40)
        return types.SimpleNamespace(get_books=lambda: {"ot": [book]})

    def get_iter(self, books: list[str], chapters: list[int]) -> list[str]:
        # Other numbering.
        more = [""] if chapters == [7] and self.verbs == NEW_WORDS else []
        return translated(chapters[0], self.verbs) + more


class Modules:
    """Stands for pysword.modules.SwordModules."""

    def __init__(self, folder: str):
        assert folder.endswith("sword")

    def parse_modules(self) -> None:
        pass

    def get_bible_from_module(self, name: str) -> Bible:
        return Bible(OLD_WORDS if name == verses.OLD else NEW_WORDS)


def test_similarity_alone_does_not_tell_verse_pairs_apart(snippets, tmp_path, launch, monkeypatch):
    sword = tmp_path / "sword"
    monkeypatch.setitem(sys.modules, "pysword.modules", None)
    code, stderr = launch(f"--out={snippets}", f"--sword={sword}")
    assert (code, stderr) == (
        1,
        "data_prep/fetch_tasks.py: verse-paraphrase needs pysword: pip install pysword==0.2.8\n",
    )
    monkeypatch.setitem(sys.modules, "pysword.modules", types.SimpleNamespace(SwordModules=Modules))
    code, stderr = launch(f"--out={snippets}", f"--sword={sword}")
    assert code == 1
    assert f"mods.d/{verses.OLD}.conf: no such file" in stderr
    (sword / "mods.d").mkdir(parents=True)
    for name in (verses.OLD, verses.NEW):
        (sword / f"mods.d/{name}.conf").touch()
    assert launch(f"--out={snippets}", f"--sword={sword}") == (0, "")
    task = read_task(TASKS / "verse-paraphrase.yaml")
    train, dev = (read_split(task, snippets, split) for split in ("train", "validation"))
    assert train.second is not None
    assert dev.second is not None
    old = {
        verse.strip(): (chapter, i)
        for chapter in range(1, 41)
        for i, verse in enumerate(translated(chapter, OLD_WORDS))
    }
    texts = [*zip(train.first, train.second, strict=True), *zip(dev.first, dev.second, strict=True)]
    labels = [*(train.labels or []), *(dev.labels or [])]
    assert sum(labels) * 2 == len(labels) > 20
    for (first, second), label in zip(texts, labels, strict=True):
        chapter, number = old[first]
        assert (second == translated(chapter, NEW_WORDS)[number].strip()) == (label == 1)
    found = list(verses.pairs(list(verses.chapters(sword))))
    assert {pair.chapter for pair in found} == {f"Gen {number}" for number in range(1, 41) if number != 7}
    chosen = verses.balance(found)
    assert len(chosen) == len(labels)
    means = [np.mean([pair.similarity for pair in chosen if pair.label == label]) for label in ("same", "different")]
    assert abs(means[0] - means[1]) < verses.INTERVAL


def test_every_interval_of_similarity_has_equally_many_of_each_label():
    pairs = [verses.Pair(f"old {i}", f"new {i}", "same", 0.2 + i / 1000, "Gen 1") for i in range(300)]
    pairs += [verses.Pair(f"old {i}", f"other {i}", "different", 0.3 + i / 1000, "Gen 1") for i in range(300)]
    chosen = verses.balance(pairs)
    intervals = [(int((pair.similarity - verses.MIN_SIMILARITY) / verses.INTERVAL), pair.label) for pair in chosen]
    assert len(chosen) > 380, "both have 200 between 0.3 and 0.5"
    assert Counter(interval for interval, label in intervals if label == "same") == Counter(
        interval for interval, label in intervals if label == "different"
    )
    assert chosen == verses.balance(reversed(pairs))


DOCUMENT = """Do something, version {number}.

Parameters
----------
flag_{number} : bool, optional
    Whether to do it {number} times. More text.
*name : `str` or None
    The name of number {number}.
short : int
    A number.
other : Widget
    A widget of another kind, number {number}.
"""
GOOGLE = """Sum up {number}.

Args:
    size (int): How many there are, {number}.
    fn (Callable[[int], str]): Called {number} times.
"""


def test_parameters_have_the_usual_name_of_their_type():
    found = list(parameters.parameters(DOCUMENT.format(number=7)))
    assert found == [("bool", "flag 7: Whether to do it 7 times."), ("str", "name: The name of number 7.")]
    found = list(parameters.parameters(GOOGLE.format(number=7)))
    assert found == [("int", "size: How many there are, 7."), ("callable", "fn: Called 7 times.")]
    assert list(parameters.parameters("No parameters.")) == []


def test_a_text_is_as_often_a_positive_as_a_negative_and_not_in_the_pretraining_part():
    texts = [part.format(number=number) for number in range(40) for part in (DOCUMENT, GOOGLE)]
    known = {"name: The name of number 3."}
    rows = list(parameters.rows([*texts, texts[4]], known))
    # Without the document whose name is known, since its flag is alone.
    assert len(rows) == 2 * 2 * (2 * 40 - 1)
    for column in (0, 1):
        labels = {
            label: Counter(row.texts[column] for row in rows if row.label == label) for label in ("fits", "other")
        }
        assert labels["fits"] == labels["other"]
    assert not any("number 3." in row.texts[1] for row in rows)
    dev = {row.texts[1] for row in rows if row.held_out}
    assert 0 < len(dev) < 60
    assert not dev & {row.texts[1] for row in rows if not row.held_out}


def write_text(folder: Path, heldout: float, texts: list[str]) -> Path:
    """Write text shards in this process."""
    folder.mkdir()
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out, source = folder / "shards", folder / "texts.jsonl"
    assert not main([f"--source={source}", f"--out={out}", f"--heldout={heldout}", "--workers=1", "--min-shards=1"])
    return out


def test_the_output_names_the_task_file(tmp_path, capsys, monkeypatch):
    rows = [Row(("a",), "1", held_out) for held_out in (False, False, True)]
    monkeypatch.chdir(TASKS.parents[1])
    write_splits(tmp_path / "same-sense", ("text",), rows)
    monkeypatch.chdir(tmp_path)
    write_splits(tmp_path / "same-sense", ("text",), rows)
    counts = f"{tmp_path / 'same-sense'}: 2 rows to train on, 1 held out; --task-file "
    files = ["data_prep/tasks/same-sense.yaml", str(TASKS / "same-sense.yaml")]
    assert capsys.readouterr().out == "".join(f"{counts}{file}\n" for file in files)


def test_an_interruption_leaves_no_older_file_beside_a_new_one(tmp_path, monkeypatch):
    """dev.tsv of an earlier command may have rows that the new train.tsv has, too."""
    folder = tmp_path / "same-sense"
    write_splits(folder, ("text",), [Row(("a",), "1", held_out=False), Row(("b",), "1", held_out=True)])
    new = [Row(("b",), "1", held_out=False), Row(("a",), "1", held_out=True)]

    def write_train_only(path: Path, data: bytes) -> None:
        if path.name == "dev.tsv":
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(tsv, "write_atomically", write_train_only)
    with pytest.raises(OSError, match="No space left"):
        write_splits(folder, ("text",), new)
    assert [path.name for path in folder.iterdir()] == ["train.tsv"]
    assert (folder / "train.tsv").read_text() == "text\tlabel\nb\t1\n"


def test_the_parameter_task_comes_from_held_out_documents(tmp_path, launch):
    texts = [part.format(number=number) for number in range(40) for part in (DOCUMENT, GOOGLE)]
    shards = write_text(tmp_path / "some", 0.4, texts)
    flags = ("--movies=false", f"--out={tmp_path}")
    assert launch(*flags, f"--text={shards}") == (0, "")
    task = read_task(TASKS / "parameter-type.yaml")
    train, dev = (read_split(task, tmp_path, split) for split in ("train", "validation"))
    held_out = list(read_documents(shards, "heldout"))
    assert 0 < len(held_out) < len(texts)
    assert len(train.first) + len(dev.first) == 4 * len(held_out)
    assert sum(train.labels or []) == len(train.first) / 2

    # The advice of each message leads to shards that work.
    none = write_text(tmp_path / "none", 0.0, texts)
    code, error = launch(*flags, f"--text={none}")
    assert (code, error.count("\n")) == (1, 1)
    assert "no document is held out" in error
    prose = write_text(tmp_path / "prose", 0.4, [f"Only prose, number {number}." for number in range(40)])
    code, error = launch(*flags, f"--text={prose}")
    assert (code, error.count("\n")) == (1, 1)
    assert "describe too few parameters" in error


def test_a_command_without_a_task_is_an_error(launch, tmp_path):
    code, stderr = launch("--movies=false", f"--out={tmp_path / 'out'}")
    assert code == 2
    assert "--movies false leaves no task to write: pass --text, --wordnet or --sword." in stderr
    assert not (tmp_path / "out").exists()
