"""A staged folder appears complete or not at all, also if its writer is killed or several write to one place."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megabert.files import atomic
from megabert.files.atomic import replace_folder, restore_folder, staged_folder
from megabert.files.disk import explain
from tests.helpers.runs import REPOSITORY

WRITER = """
import sys, time
from pathlib import Path
from megabert.files.atomic import staged_folder
with staged_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("written")
    print(folder.name, flush=True)
    time.sleep(60)
"""


def start(out: Path) -> tuple[subprocess.Popen, str]:
    """Start a process that stays in the middle of writing. Also returns the name of its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_leaves_nothing(tmp_path, number, code):
    process, name = start(tmp_path / "out")
    assert (tmp_path / name / "half").is_file()
    process.send_signal(number)
    process.communicate(timeout=300)
    assert process.returncode == code
    assert not list(tmp_path.iterdir())


def test_the_next_writer_removes_folders_of_killed_processes_only(tmp_path):
    out = tmp_path / "out"
    (tmp_path / ".tmp-out-of-another-program").mkdir()
    alive, being_written = start(out)
    killed, left = start(out)
    other, left_of_another = start(tmp_path / "out-2")
    for process in (killed, other):
        process.kill()
        process.communicate(timeout=300)
    assert len({being_written, left, left_of_another}) == 3
    with staged_folder(out) as folder:
        assert not (tmp_path / left).exists()
        assert (tmp_path / being_written / "half").is_file()
        (folder / "mine").write_text("")
        replace_folder(folder, out)
    alive.terminate()
    alive.communicate(timeout=300)
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".tmp-out-of-another-program", left_of_another}


def test_several_at_once_write_whole_folders_and_leave_nothing(tmp_path):
    code = """
import sys
from pathlib import Path
from megabert.files.atomic import replace_folder, staged_folder
for _ in range(100):
    with staged_folder(Path(sys.argv[1])) as folder:
        for name in "ab":
            (folder / name).write_text(sys.argv[2])
        replace_folder(folder, Path(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    writers = [subprocess.Popen([*command, text], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) for text in "123"]
    for writer in writers:
        error = writer.communicate(timeout=120)[1]
        assert writer.returncode == 0, error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    assert (tmp_path / "out" / "a").read_text() == (tmp_path / "out" / "b").read_text()


def test_an_error_leaves_nothing_and_a_name_may_have_any_sign(tmp_path):
    out = tmp_path / "[x] *?"

    def fail() -> None:
        with staged_folder(out) as folder:
            assert folder.parent == tmp_path
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with staged_folder(out) as folder:
        assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()


def begin_to_write(out: Path) -> None:
    with staged_folder(out):
        pass


KILLED = """
import os, sys
from pathlib import Path
from megabert.files import atomic
if sys.argv[2] == "without exchange":
    atomic._exchange = lambda folder, other: False
renamed = []
def rename(self, to):
    os.rename(self, to)
    renamed.append(to)
    if len(renamed) == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
def rmtree(path, ignore_errors=False):
    os.kill(os.getpid(), 9)
Path.rename, atomic.shutil.rmtree = rename, rmtree
with atomic.staged_folder(Path(sys.argv[1])) as folder:
    (folder / "new").write_text("new")
    atomic.replace_folder(folder, Path(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("how", "renames", "found", "then"),
    [
        # Killed before the old folder was removed, between the two renames, and after them.
        ("with exchange", 9, "new", "new"),
        ("without exchange", 1, None, "old"),
        ("without exchange", 2, "new", "new"),
    ],
)
@pytest.mark.parametrize("restore", [restore_folder, begin_to_write])
def test_a_kill_while_a_folder_is_replaced_loses_neither(tmp_path, how, renames, found, then, restore):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), how, str(renames)], cwd=REPOSITORY, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert out.exists() == (found is not None)
    assert found is None or (out / found).is_file()
    restore(out)
    assert [path.name for path in out.iterdir()] == [then]


def test_a_folder_is_exchanged_in_one_step_where_the_file_system_can(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    with pytest.raises(OSError, match="No such file or directory.*missing"):
        atomic._exchange(tmp_path / "missing", tmp_path / "b")
    # The kernel answers this, as it does on NFS, to flags that it does not know.
    monkeypatch.setattr(atomic, "RENAME_EXCHANGE", 1 << 30)
    assert not atomic._exchange(tmp_path / "a", tmp_path / "b")


FULL_DISK = (errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("make", "named"), [
    (lambda folder: OSError(*FULL_DISK, str(folder / "a" / "b")), "out/a/b"),
    (lambda folder: OSError(*FULL_DISK, folder), "out"),
    (lambda folder: OSError(*FULL_DISK), "out"),
    (lambda folder: PermissionError(errno.EPERM, "not permitted", str(folder), None, f"{folder}-old"), "out"),
    (lambda folder: OSError(*FULL_DISK, f"{folder}-other"), None),
    (lambda folder: OSError(*FULL_DISK, "/elsewhere/file"), None),
])  # fmt: skip
def test_an_error_names_the_folder_that_was_asked_for(tmp_path, make, named):
    out, before = tmp_path / "out", []

    def fail() -> OSError:
        with staged_folder(out) as folder:
            error = make(folder)
            before.append(explain(error))
            raise error

    with pytest.raises(OSError, match=".") as raised:
        fail()
    expected = before[0] if named is None else str(tmp_path / named)
    assert explain(raised.value).startswith(expected)
    assert named is None or ".tmp" not in explain(raised.value)


def test_an_encoding_error_names_the_file_that_a_library_could_not_open(tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.touch()
    for text, expected in ((str(odd), f"{odd}: its name is not UTF-8"), ("\0\udce9", "'utf-8' codec can't encode")):
        with pytest.raises(UnicodeEncodeError) as raised:
            text.encode()
        assert explain(raised.value).startswith(expected)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
