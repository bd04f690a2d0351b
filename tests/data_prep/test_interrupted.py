"""Tests that an interrupted write_shards.py, run again, writes the same bytes as one that was not interrupted."""

import hashlib
import json
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
from data_prep.output_folder import WORK_FORMAT
from data_prep.workers import WorkerPool
from megabert.data.shards.manifest import read_manifest
from megabert.files.lock import acquire

REPOSITORY = Path(__file__).resolve().parents[2]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def command(corpus, tmp_path) -> list[str]:
    """The command that wrote corpus.tokens, with another output folder."""
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


def start_until(command: list[str], out: Path, pattern: str, count: int) -> subprocess.Popen:
    """Start the command and return when .work holds `count` files of the pattern.

    On a busy machine the command can end before this is noticed. Then it is started again from nothing.
    """
    for _ in range(10):
        process = start(command)
        while process.poll() is None:
            if len(list((out / ".work").glob(pattern))) >= count:
                return process
            time.sleep(0.001)
        assert process.returncode == 0, process.communicate()
        shutil.rmtree(out)
    raise AssertionError(f"always ended before {count} of {pattern} were seen")


def finish(command: list[str], out: Path, expected: dict[str, str]) -> None:
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    assert hashes(out) == expected
    assert not (out / ".work").exists()


@pytest.mark.parametrize(
    ("whole_group", "moments"),
    [
        pytest.param(False, 2, id="the command alone"),
        pytest.param(False, 4, marks=pytest.mark.nightly, id="the command alone, more often"),
        pytest.param(True, 4, marks=pytest.mark.nightly, id="all processes"),
    ],
)
def test_killed_at_any_moment_the_same_command_writes_the_same_bytes(command, tmp_path, corpus, whole_group, moments):
    """Kill in the first pass, at the beginning and the middle of the second, then at random moments."""
    out = tmp_path / "out"

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
        kill(start_until(command, out, pattern, count))
    rng = random.Random(17)
    for _ in range(moments):
        process = start(command)
        time.sleep(rng.uniform(0.3, 1.5))
        kill(process)
    finish(command, out, hashes(corpus.tokens))


def test_workers_of_a_killed_command_end(command, tmp_path):
    process = start_until([*command, "--workers=2"], tmp_path / "out", "shards/*.npz", 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    assert psutil.wait_procs(workers, timeout=300)[1] == []


def test_ctrl_c_prints_one_line_and_leaves_no_process(command, tmp_path, corpus):
    for _ in range(5):
        # Early, because the rest takes a tenth of a second.
        process = start_until(command, tmp_path / "out", "runs/*", 1)
        # So that a busy machine cannot finish it while its workers are listed.
        os.killpg(process.pid, signal.SIGSTOP)
        workers = psutil.Process(process.pid).children(recursive=True)
        # As a terminal does.
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGCONT)
        output, errors = process.communicate(timeout=300)
        if process.returncode:
            break
        # It was finished nevertheless.
        shutil.rmtree(tmp_path / "out")
    assert process.returncode == 130
    assert (output, errors) == ("", f"\n{tmp_path / 'out'}: interrupted. Run the same command again to continue.\n")
    assert psutil.wait_procs(workers, timeout=300)[1] == []
    finish(command, tmp_path / "out", hashes(corpus.tokens))


def test_a_killed_worker_ends_the_command_with_an_error(command, tmp_path, corpus):
    process = start_until([*command, "--workers=2"], tmp_path / "out", "runs/*", 1)
    # So that it cannot finish in the meantime.
    process.send_signal(signal.SIGSTOP)
    for child in psutil.Process(process.pid).children(recursive=True):
        if not child.children() and "resource_tracker" not in " ".join(child.cmdline()):
            child.kill()
    process.send_signal(signal.SIGCONT)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert "a worker process died, perhaps killed because memory ran out" in errors
    assert "Traceback" not in errors
    finish(command, tmp_path / "out", hashes(corpus.tokens))


def test_a_worker_that_exits_raises_an_error_instead_of_blocking():
    with pytest.raises(ValueError, match="a worker process died.*with fewer --workers"), WorkerPool(1) as pool:
        pool.run(os._exit, [(1,)])


def test_a_full_disk_is_a_one_line_error_and_no_partial_shard_is_listed(command, tmp_path, corpus):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(command, preexec_fn=limit)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output) == (1, "")
    assert "File too large. Raise the limit of file sizes (ulimit -f) and run the same command again." in errors
    assert "Traceback" not in errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".work"]
    finish(command, tmp_path / "out", hashes(corpus.tokens))


@pytest.mark.parametrize("out", ["/proc/out", "/dev/null/out"])
def test_the_error_names_a_folder_that_cannot_be_written(corpus, out):
    with pytest.raises(OSError, match=out):
        write_shards.main([f"--source={corpus.jsonl}", f"--out={out}"])


def test_two_commands_cannot_write_to_one_folder(corpus, tmp_path):
    (tmp_path / ".work").mkdir()
    lock = acquire(tmp_path / ".work" / "lock")
    message = rf"another write_shards\.py is writing there, process {os.getpid()} on .* or choose another --out"
    with pytest.raises(ValueError, match=message):
        write_shards.main([f"--source={corpus.jsonl}", f"--out={tmp_path}"])
    lock.release()
    write_shards.main([f"--source={corpus.jsonl}", f"--out={tmp_path}"])


def test_shards_of_another_program_are_not_replaced(corpus, tmp_path):
    (tmp_path / "train-00000.tar").write_bytes(b"foreign")
    with pytest.raises(ValueError, match=r"train-00000\.tar: exists, but its folder has no manifest\.json"):
        write_shards.main([f"--source={corpus.jsonl}", f"--out={tmp_path}"])
    assert (tmp_path / "train-00000.tar").read_bytes() == b"foreign"


def test_shards_of_another_request_are_replaced_only_with_replace(corpus, tmp_path):
    write_shards.main([f"--source={corpus.jsonl}", f"--out={tmp_path}", "--min_shards=30", "--heldout=0.1"])
    other = [f"--source={corpus.jsonl}", f"--out={tmp_path}", "--min_shards=3"]
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"holds finished shards of another source.*pass --replace\."):
        write_shards.main(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    write_shards.main([*other, "--replace"])
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == [f"train-0000{i}.tar" for i in range(3)]
    with pytest.raises(ValueError, match="is both --source and --out"):
        write_shards.main([f"--source={tmp_path}", f"--out={tmp_path}"])
    assert (tmp_path / "manifest.json").is_file()


def test_a_folder_of_text_is_no_place_for_its_shards(tmp_path):
    """The same command would then read the shards, and never the text again."""
    (tmp_path / "a.txt").write_text("a text\n" * 50)
    with pytest.raises(ValueError, match="is both --source and --out. Choose another --out"):
        write_shards.main([f"--source={tmp_path}", f"--out={tmp_path / 'x' / '..'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    write_shards.main([f"--source={tmp_path}", f"--out={tmp_path / 'x'}"])


def test_the_same_command_removes_the_work_folder_of_one_killed_after_its_manifest(corpus, tmp_path, capsys):
    command = [f"--source={corpus.jsonl}", f"--out={tmp_path}"]
    write_shards.main(command)
    (tmp_path / ".work" / "runs").mkdir(parents=True)
    lock = acquire(tmp_path / ".work" / "lock")
    write_shards.main(command)
    # It belongs to a command that still runs.
    assert (tmp_path / ".work").exists()
    lock.release()
    write_shards.main(command)
    assert capsys.readouterr().out.count("already written from this source with these settings, reused") == 2
    assert not (tmp_path / ".work").exists()


@pytest.mark.parametrize("version", [None, WORK_FORMAT - 1])
def test_unfinished_work_of_another_format_version_is_not_read(command, corpus, tmp_path, version):
    """A summary of the first task claims that it wrote no sorted run: who read it would write empty shards."""
    request, work = read_manifest(corpus.tokens).request, tmp_path / "out" / ".work"
    (work / "runs").mkdir(parents=True)
    (work / "runs" / "000000.json").write_text(
        json.dumps({"runs": 0, "read": 1, "elements": {"train": 0, "heldout": 0}})
    )
    current = json.dumps({"format": WORK_FORMAT, "request": request})
    (work / "request").write_text(request if version is None else current.replace(f": {WORK_FORMAT},", f": {version},"))
    write_shards.main(command[2:])
    assert hashes(tmp_path / "out") == hashes(corpus.tokens)
