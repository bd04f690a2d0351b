"""Whatever ends write_shards.py, the same command goes on, and ends with the same bytes as one that was left alone."""

import fcntl
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep import write_shards
from data_prep.workers import Workers

REPOSITORY = Path(__file__).resolve().parents[2]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def command(corpus, tmp_path) -> list[str]:
    """What corpus.tokens was written with, to another folder."""
    return [sys.executable, "data_prep/write_shards.py", f"--source={corpus.jsonl}", f"--tokenizer={corpus.tokenizer}",
            "--heldout=0.1", "--chunk_tokens=2048", f"--out={tmp_path / 'out'}"]  # fmt: skip


def start(command: list[str], **options) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(process: subprocess.Popen, folder: Path, pattern: str, count: int) -> None:
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None, f"it ended before it could be interrupted: {process.communicate()}"
        time.sleep(0.001)


def finish(command: list[str], out: Path, expected: dict[str, str]) -> None:
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    assert hashes(out) == expected
    assert not (out / ".work").exists()


@pytest.mark.parametrize("whole_group", [True, False], ids=["all processes", "the command alone"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(command, tmp_path, corpus, whole_group):
    """In the first pass, in the second at its beginning and middle, and then wherever chance has it."""
    out, work = tmp_path / "out", tmp_path / "out" / ".work"

    def kill(process):
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "manifest.json").exists() or hashes(out) == hashes(corpus.tokens)

    for pattern, count in (
        ("request", 1),
        ("runs/*", 1),
        ("runs/*.json", 1),
        ("shards/*.npz", 1),
        ("shards/*.npz", 10),
    ):
        process = start(command)
        wait_for(process, work, pattern, count)
        kill(process)
    rng = random.Random(os.urandom(8))
    for _ in range(4):
        process = start(command)
        time.sleep(rng.uniform(0.3, 1.5))
        kill(process)
    finish(command, out, hashes(corpus.tokens))


def test_workers_of_a_killed_command_end_with_it(command, tmp_path):
    process = start([*command, "--workers=2"])
    wait_for(process, tmp_path / "out" / ".work", "shards/*.npz", 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    assert psutil.wait_procs(workers, timeout=10)[1] == []


def test_ctrl_c_is_clean(command, tmp_path, corpus):
    for _ in range(5):
        process = start(command)
        wait_for(process, tmp_path / "out" / ".work", "runs/*", 1)  # early: the rest takes a tenth of a second
        os.killpg(process.pid, signal.SIGSTOP)  # else, on a busy machine, it is done before it is looked at
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        os.killpg(process.pid, signal.SIGCONT)
        output, errors = process.communicate(timeout=20)
        if process.returncode:
            break
        shutil.rmtree(tmp_path / "out")  # it was done nevertheless
    assert process.returncode == 130
    assert (output, errors) == ("", f"\n{tmp_path / 'out'}: interrupted. The same command goes on from here.\n")
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    finish(command, tmp_path / "out", hashes(corpus.tokens))


def test_a_worker_that_is_killed_ends_the_command_with_an_error(command, tmp_path, corpus):
    process = start([*command, "--workers=2"])
    wait_for(process, tmp_path / "out" / ".work", "runs/*", 1)
    process.send_signal(signal.SIGSTOP)  # so that it cannot finish meanwhile
    for child in psutil.Process(process.pid).children(recursive=True):
        if not child.children() and "resource_tracker" not in " ".join(child.cmdline()):
            child.kill()
    process.send_signal(signal.SIGCONT)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert "a worker process died, killed perhaps because memory ran out" in errors
    assert "Traceback" not in errors
    finish(command, tmp_path / "out", hashes(corpus.tokens))


def test_a_worker_that_ends_is_an_error_and_not_a_wait():
    with pytest.raises(ValueError, match="a worker process died.*with fewer --workers"), Workers(1) as workers:
        workers.run(os._exit, [(1,)])


def test_a_full_disk_is_one_line_and_nothing_half_is_listed(command, tmp_path, corpus):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(command, preexec_fn=limit)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert "no room left for what has to be written (File too large). Free some" in errors
    assert "Traceback" not in errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".work"]
    finish(command, tmp_path / "out", hashes(corpus.tokens))


@pytest.mark.parametrize("out", ["/proc/out", "/dev/null/out"])
def test_a_folder_that_cannot_be_written_is_named(corpus, out):
    with pytest.raises(OSError, match=out):
        write_shards.main([f"--source={corpus.jsonl}", f"--out={out}"])


def test_two_commands_do_not_write_to_one_folder(corpus, tmp_path):
    (tmp_path / ".work").mkdir()
    with open(tmp_path / ".work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            ValueError, match=r"another write_shards\.py is at work there. Wait, or choose another --out"
        ):
            write_shards.main([f"--source={corpus.jsonl}", f"--out={tmp_path}"])


def test_shards_of_someone_else_are_left_alone(corpus, tmp_path):
    (tmp_path / "train-00000.tar").write_bytes(b"theirs")
    with pytest.raises(ValueError, match=r"train-00000\.tar: is there, but no manifest of ours"):
        write_shards.main([f"--source={corpus.jsonl}", f"--out={tmp_path}"])
    assert (tmp_path / "train-00000.tar").read_bytes() == b"theirs"


def test_what_another_request_left_is_gone(corpus, tmp_path):
    write_shards.main([f"--source={corpus.jsonl}", f"--out={tmp_path}", "--min_shards=30", "--heldout=0.1"])
    other = [f"--source={corpus.jsonl}", f"--out={tmp_path}", "--min_shards=3"]
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"holds finished shards of another source.*--replace\."):
        write_shards.main(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    write_shards.main([*other, "--replace"])
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == [f"train-0000{i}.tar" for i in range(3)]
    with pytest.raises(ValueError, match="is --source and --out"):
        write_shards.main([f"--source={tmp_path}", f"--out={tmp_path}"])
    assert (tmp_path / "manifest.json").is_file()


def test_killed_after_the_manifest_the_same_command_sweeps_up(corpus, tmp_path, capsys):
    command = [f"--source={corpus.jsonl}", f"--out={tmp_path}"]
    write_shards.main(command)
    (tmp_path / ".work" / "runs").mkdir(parents=True)
    write_shards.main(command)
    assert "already written from this, reused" in capsys.readouterr().out
    assert not (tmp_path / ".work").exists()
