"""Tests that write_shards.py in separate tasks, on one machine or a Ray cluster, writes the bytes of one command."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from data_prep import output_folder, write_shards
from data_prep.writing import merged_runs, passes
from megabert.process.exit_codes import EXIT_INTERRUPTED

REPOSITORY = Path(__file__).resolve().parents[2]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def write_corpus(path: Path, documents: int = 600) -> Path:
    path.mkdir()
    for number in range(3):
        texts = [f"document {i} of {number} " + "word " * (i % 40) for i in range(documents // 3)]
        lines = [json.dumps({"text": text}) + "\n" for text in [*texts, *texts[:20], "a copy in every file"]]
        (path / f"{number}.jsonl").write_text("".join(lines))
    return path


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    """A command for a corpus that is cut into about 15 tasks, whose sorted runs are merged in groups."""
    monkeypatch.setattr("data_prep.sources.base.INPUT_SPLIT_BYTES", 5000)
    monkeypatch.setattr(passes, "INPUT_SPLIT_BYTES", 5000)
    monkeypatch.setattr(merged_runs, "CACHED_BYTES", 0)
    monkeypatch.setattr(merged_runs, "READ_BYTES", 2000)
    return [f"--source={write_corpus(tmp_path / 'corpus')}", "--min_shards=4", "--heldout=0.1", "--workers=1"]


@pytest.fixture
def whole(command, tmp_path) -> dict[str, str]:
    write_shards.main([*command, f"--out={tmp_path / 'whole'}"])
    return hashes(tmp_path / "whole")


def test_separate_tasks_write_the_same_bytes_and_say_what_is_missing(command, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def step(name: str, task: str = "0/1", *more: str) -> None:
        write_shards.main([*command, f"--out={out}", f"--step={name}", f"--task={task}", *more])

    with pytest.raises(ValueError, match=r"plan\.jsonl: no such file\. Run the same command with --step plan first"):
        step("runs", "0/2")
    step("plan")
    with pytest.raises(ValueError, match="is for another source, tokenizer or other settings"):
        step("runs", "0/2", "--min_chars=7")
    with monkeypatch.context() as newer:
        newer.setattr(output_folder, "WORK_FORMAT", output_folder.WORK_FORMAT + 1)
        with pytest.raises(ValueError, match="or another version of MegaBERT wrote it"):
            step("runs", "0/2")
    with pytest.raises(ValueError, match=r"separate commands with --step may be writing there.*remove this file"):
        write_shards.main([*command, f"--out={out}"])
    step("runs", "0/2")
    with pytest.raises(ValueError, match=r"\d+ results of step runs are missing \(1, 3, 5, \.\.\.\)\. Run --step runs"):
        step("shards")
    step("runs", "1/2")
    with pytest.raises(ValueError, match=r"results of step merge are missing \(0, 1, 2"):
        step("shards")
    step("merge", "1/3")
    step("merge", "0/3")
    step("merge", "2/3")
    assert not list((out / ".work/runs").glob("*.run"))
    step("merge", "2/3")
    step("shards", "0/2")
    with pytest.raises(ValueError, match=r"results of step shards are missing \(train-00001\.tar, "):
        step("finish")
    step("shards", "1/2")
    step("finish")
    assert hashes(out) == whole
    assert not (out / ".work").exists()
    for name in ("plan", "runs", "merge", "shards", "finish"):
        step(name)
        assert "already written from this source with these settings" in capsys.readouterr().out
    assert hashes(out) == whole
    with pytest.raises(ValueError, match=r"plan\.jsonl: no such file\. Run the same command with --step plan first"):
        step("finish", "0/1", "--min_chars=7")


def test_a_finish_that_is_killed_while_it_removes_its_work_is_repeated(command, whole, tmp_path, monkeypatch):
    flags = [*command, f"--out={tmp_path / 'out'}"]
    for name in ("plan", "runs", "merge", "shards"):
        write_shards.main([*flags, f"--step={name}"])

    def remove_runs(work: Path) -> None:
        shutil.rmtree(work / "runs")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "shutil", SimpleNamespace(rmtree=remove_runs))
        assert write_shards.main([*flags, "--step=finish"]) == EXIT_INTERRUPTED
    assert write_shards.main([*flags, "--step=finish"]) == 0
    assert hashes(tmp_path / "out") == whole
    assert not (tmp_path / "out/.work").exists()


def test_a_source_that_changes_after_the_plan_is_noticed(command, tmp_path):
    out = tmp_path / "out"
    write_shards.main([*command, f"--out={out}", "--step=plan"])
    (tmp_path / "corpus/1.jsonl").write_text('{"text": "another"}\n')
    with pytest.raises(ValueError, match=r"was changed after the plan was made.*Run --step plan again"):
        write_shards.main([*command, f"--out={out}", "--step=runs"])
    for name in ("plan", "runs", "merge", "shards", "finish"):
        write_shards.main([*command, f"--out={out}", f"--step={name}"])
    assert (out / "manifest.json").is_file()


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("step", [None, "runs"])
def test_a_source_that_is_changed_while_it_is_read_ends_the_command(command, tmp_path, monkeypatch, step, is_cut):
    """The next command begins anew, with the source as it is then. A file that is cut meanwhile is not damaged."""
    out, file, steps = tmp_path / "out", tmp_path / "corpus/1.jsonl", [f"--step={step}"] if step else []
    run_pass = passes.write_sorted_runs
    if step:
        write_shards.main([*command, f"--out={out}", "--step=plan"])

    def read_and_change(*arguments):
        if is_cut:
            file.write_text('{"text": "ano')
            run_pass(*arguments)
        run_pass(*arguments)
        file.write_text('{"text": "another"}\n')

    with monkeypatch.context() as patch:
        patch.setattr(passes, "write_sorted_runs", read_and_change)
        with pytest.raises(ValueError, match=r"was changed (while it was read|after the plan was made)"):
            write_shards.main([*command, f"--out={out}", *steps])
    assert not (out / "manifest.json").exists()
    file.write_text('{"text": "another"}\n')
    for name in ("plan", "runs", "merge", "shards", "finish") if step else ():
        write_shards.main([*command, f"--out={out}", f"--step={name}"])
    if not step:
        write_shards.main([*command, f"--out={out}"])
    write_shards.main([*command, f"--out={tmp_path / 'anew'}"])
    assert hashes(out) == hashes(tmp_path / "anew")


def test_a_damaged_plan_is_named_and_planning_again_mends_it(command, whole, tmp_path):
    out = tmp_path / "out"
    write_shards.main([*command, f"--out={out}", "--step=plan"])
    path = out / ".work/plan.jsonl"
    header, first, *rest = path.read_text().splitlines()
    without_key = json.loads(header)
    del without_key["left_out"]
    headers = ["", header[:30], "[]", json.dumps(without_key), json.dumps(json.loads(header) | {"format": 1})]
    damages = [[text, first, *rest] for text in headers] + [[header, text, *rest] for text in ("{", first[:-9], "{}")]
    for damaged in damages:
        path.write_text("\n".join(damaged) + "\n")
        with pytest.raises(
            ValueError, match=r"plan\.jsonl: is damaged, or another version .*\. Run --step plan again\."
        ):
            write_shards.main([*command, f"--out={out}", "--step=runs"])
    for name in ("plan", "runs", "merge", "shards", "finish"):
        write_shards.main([*command, f"--out={out}", f"--step={name}"])
    assert hashes(out) == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task=3/3"], "task is '3/3', expected i/N with i from 0 to N - 1"),
        (["--task=1/2"], "needs --step runs, merge or shards"),
        (["--step=plan", "--task=1/2"], "needs --step runs, merge or shards"),
        (["--step=runs", "--engine=ray"], "Omit one of them"),
    ],
)
def test_flags_that_do_not_fit_together_are_a_one_line_error(capsys, flags, message):
    with pytest.raises(SystemExit):
        write_shards.main(flags)
    assert message in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.parametrize("step", ["runs", "merge", "shards"])
def test_a_killed_task_is_done_by_the_same_command(command, whole, tmp_path, step):
    out = tmp_path / "out"
    flags = [*command, f"--out={out}"]
    for name in ("plan", "runs", "merge", "shards"):
        if name == step:
            kill_once(flags, step, out)
        write_shards.main([*flags, f"--step={name}"])
    write_shards.main([*flags, "--step=finish"])
    assert hashes(out) == whole


def kill_once(flags: list[str], step: str, out: Path) -> None:
    """Start a step with the small limits of the fixture, and kill it after its first result."""
    patches = """
import sys
from data_prep import write_shards
from data_prep.sources import base
from data_prep.writing import merged_runs, passes
merged_runs.CACHED_BYTES, merged_runs.READ_BYTES = 0, 2000
write_shards.main(sys.argv[1:])
"""
    pattern = {"runs": "runs/*.json", "merge": "runs/*.merged", "shards": "shards/*.npz"}[step]
    process = subprocess.Popen(
        [sys.executable, "-c", patches, *flags, f"--step={step}"], cwd=REPOSITORY, start_new_session=True
    )
    while process.poll() is None and not list((out / ".work").glob(pattern)):
        time.sleep(0.001)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.ray
def test_a_ray_cluster_writes_the_same_bytes(command, whole, tmp_path):
    from ray.cluster_utils import Cluster  # pyrefly: ignore[missing-import]

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        out = tmp_path / "out"
        write_shards.main([*command, f"--out={out}", "--engine=ray", f"--ray_address={cluster.address}"])
        assert hashes(out) == whole
    finally:
        cluster.shutdown()


@pytest.mark.ray
@pytest.mark.nightly
def test_a_ray_cluster_that_loses_a_worker_in_each_pass_writes_the_same_bytes(command, whole, tmp_path, monkeypatch):
    """Two nodes with one core each. Once in each pass a process that runs a task is killed."""
    from ray.cluster_utils import Cluster  # pyrefly: ignore[missing-import]

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    out, killed = tmp_path / "out", set()
    patterns = {"runs": "runs/*.json", "merge": "runs/*.merged", "shards": "shards/*.npz"}

    def kill_workers() -> None:
        for name, pattern in patterns.items():
            if name not in killed and list((out / ".work").glob(pattern)):
                workers = [p for p in psutil.process_iter(["cmdline"]) if is_busy(p)]
                for worker in workers[:1]:
                    worker.kill()
                    killed.add(name)

    def is_busy(process: psutil.Process) -> bool:
        """Whether Ray shows this process as one that runs a task, and it belongs to this cluster."""
        return "ray::_run_task" in " ".join(process.info["cmdline"] or []) and os.getpid() in [
            parent.pid for parent in process.parents()
        ]

    import threading

    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            kill_workers()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        write_shards.main([*command, f"--out={out}", "--engine=ray", f"--ray_address={cluster.address}"])
    finally:
        stop.set()
        thread.join()
        cluster.shutdown()
    assert hashes(out) == whole
    assert killed == set(patterns)


def test_ray_without_the_package_or_a_cluster_is_a_one_line_error(command, tmp_path):
    flags = [*command, f"--out={tmp_path / 'out'}", "--engine=ray", "--ray_address=127.0.0.1:1"]
    with pytest.raises(ValueError, match=r"needs the package ray|no Ray cluster answers there"):
        write_shards.main(flags)
