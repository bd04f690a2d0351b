"""The whole command on made-up data and a model of one layer: chains, failures, shards, submission."""

import json
import os
import signal
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megabert.finetune.base_model import BaseModel
from megabert.finetune.jobs import runner
from megabert.finetune.jobs.job import FinetuneJob, JobContext, WorkerSlot
from megabert.finetune.jobs.runner import Runner
from megabert.finetune.main import parse_shard, run_finetuning
from megabert.finetune.protocol import Settings
from megabert.finetune.results.report import average
from megabert.finetune.results.submission import FILES, as_tsv
from megabert.finetune.tasks.task import GLUE
from tests.finetune.conftest import PROTOCOL
from tests.finetune.helpers.layouts import write_tsv
from tests.helpers import warm


def results_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out/results.json").read_text())


def mtimes(tmp_path: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/jobs").glob("*.json")}


def test_one_command_runs_glue(options_for, in_process, tmp_path, capsys):
    options = options_for(tasks="rte,mnli,stsb,cola,ax", submission=True)
    assert run_finetuning(options) == 0
    results = results_of(tmp_path)
    tasks = {name: parts["pretrained"] for name, parts in results["tasks"].items()}
    assert {name: (part["n"], part["start"]) for name, part in tasks.items()} == {
        "mnli": (1, "checkpoint"), "rte": (2, "mnli"), "stsb": (1, "mnli"), "cola": (1, "checkpoint"),
    }  # fmt: skip
    assert tasks["mnli"]["metrics"].keys() == {"accuracy matched", "accuracy mismatched"}
    assert tasks["stsb"]["mean"] == tasks["stsb"]["metrics"]["spearman"]
    assert tasks["cola"]["candidates"] == 2
    assert results["average"] == pytest.approx(sum(part["mean"] for part in tasks.values()) / 4)
    table = (tmp_path / "out/results.md").read_text()
    assert results["checkpoint_sha256"][:16] in table
    assert "nan" not in table.lower()
    assert "cola: the best of 2 candidates, chosen by this same score" in table
    assert "lacks SST-2, MRPC, QQP, QNLI, WNLI, which the server also requires" in capsys.readouterr().out
    assert (tmp_path / "out/results.png").read_bytes().startswith(b"\x89PNG")
    with zipfile.ZipFile(tmp_path / "out/submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(
            f"{n}.tsv" for n in ("AX", "CoLA", "MNLI-m", "MNLI-mm", "RTE", "STS-B")
        )
        lines = archive.read("AX.tsv").decode().splitlines()
        assert lines[0] == "index\tprediction"
        assert len(lines) == 13
        assert {line.split("\t")[1] for line in lines[1:]} <= set(GLUE["ax"].labels)
    before = mtimes(tmp_path)
    assert run_finetuning(options) == 0
    assert mtimes(tmp_path) == before, "jobs that are done do not run again"
    path = Path(options.protocol)
    path.write_text(path.read_text().replace("stsb: {", "stsb: {epochs: 2, "))
    assert run_finetuning(options) == 0
    assert {name.split("-")[0] for name, time in mtimes(tmp_path).items() if time != before[name]} == {"stsb"}


def test_a_failed_job_is_left_out_of_the_mean_and_runs_again(options_for, tmp_path):
    """In real processes, as the command runs them."""
    options, path = options_for(tasks="rte,mnli"), tmp_path / "tiny.yaml"
    path.write_text(
        PROTOCOL.replace("rte: {", "rte: {sweep: {lr: [10.0]}, weight_decay: 100, precision: fp32, epochs: 20, ")
    )
    assert run_finetuning(options) == 1
    table = (tmp_path / "out/results.md").read_text()
    assert "| rte | fine-tuned, pretrained | - | - | 0 of 2 |" in table
    assert "FAILED: rte-pretrained-c0-s1: ValueError: the loss was not finite" in table
    assert "withheld, because jobs are missing" in table
    assert results_of(tmp_path)["average"] is None
    before = mtimes(tmp_path)
    path.write_text(PROTOCOL)
    assert run_finetuning(options) == 0
    after = mtimes(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {
        f"rte-pretrained-c0-s{seed}.json" for seed in (1, 2)
    }


def test_tasks_that_start_from_mnli_need_it_to_be_chosen_and_to_succeed(options_for, in_process, tmp_path):
    with pytest.raises(
        ValueError, match="rte start from the encoder that was fine-tuned on MNLI, and mnli is not among the tasks"
    ):
        run_finetuning(options_for(tasks="rte"))
    assert run_finetuning(options_for(tasks="rte", allow_no_mnli=True)) == 0
    assert "NOT the protocol: rte started from the checkpoint" in (tmp_path / "out/results.md").read_text()
    path = tmp_path / "tiny.yaml"
    path.write_text(PROTOCOL.replace("mnli: {", "mnli: {lr: 10.0, weight_decay: 100, epochs: 20, precision: fp32, "))
    assert run_finetuning(options_for(tasks="rte,mnli")) == 1
    assert (
        "FAILED: rte-pretrained-c0-s1: MNLI failed, whose model it starts from"
        in (tmp_path / "out/results.md").read_text()
    )


def test_an_array_runs_in_two_rounds(options_for, in_process, tmp_path, capsys):
    for waits in (True, False):
        for part in ("1/2", "0/2"):
            assert run_finetuning(options_for(tasks="rte,mnli", shard=part)) == 0
        assert ("waits for MNLI" in capsys.readouterr().out) == waits
    before = mtimes(tmp_path)
    assert run_finetuning(options_for(tasks="rte,mnli")) == 0
    assert mtimes(tmp_path) == before
    assert results_of(tmp_path)["tasks"]["rte"]["pretrained"]["n"] == 2


def test_baselines_are_in_the_results(options_for, in_process, tmp_path):
    assert run_finetuning(options_for(tasks="sst2", baselines=True)) == 0
    parts = results_of(tmp_path)["tasks"]["sst2"]
    assert {name: part["n"] for name, part in parts.items()} == {"pretrained": 2, "random_init": 2, "tfidf": 1}


def test_malformed_data_stops_everything_before_any_training(options_for, tmp_path):
    data = write_tsv(tmp_path / "data")
    path = data / "RTE/dev.tsv"
    path.write_text(path.read_text().replace("\tentailment\n", "\tperhaps\n", 1))
    with pytest.raises(ValueError, match=r"RTE/dev\.tsv, line 2, column label"):
        run_finetuning(options_for(tasks="mnli,rte", data=str(data)))
    assert not (tmp_path / "out").exists()


def test_the_reason_of_a_killed_job_or_one_without_a_log_is_recorded(tmp_path, bert, glue):
    context = JobContext(out=tmp_path, data=glue, base=BaseModel(bert, "0"), ops="torch")
    job = FinetuneJob(task=GLUE["rte"], settings=Settings(lr=1.0, epochs=1, batch_size=1), candidate=0, seed=1)
    runner = Runner([job], context, lambda line: None)
    # The second signal is a real-time one, which has no name.
    for code, reason in (
        (-signal.SIGKILL, "killed by SIGKILL"),
        (-35, "killed by signal 35"),
        (3, "exit code 3, without output"),
    ):
        runner._record_result(job, code)
        assert runner.results[job.name] == {"status": "failed", "error": reason}


def test_a_job_that_cannot_lock_its_file_says_why_in_its_log(options_for, tmp_path):
    jobs = tmp_path / "out/jobs"
    (jobs / "sst2-pretrained-c0-s1.lock").mkdir(parents=True)
    (jobs / "sst2-pretrained-c0-s1.log").write_text("RuntimeError: of an earlier attempt\n")
    assert run_finetuning(options_for(tasks="sst2")) == 1
    table = (tmp_path / "out/results.md").read_text()
    assert (
        f"sst2-pretrained-c0-s1: IsADirectoryError: [Errno 21] Is a directory: '{jobs}/sst2-pretrained-c0-s1" in table
    )
    assert "sst2-pretrained-c0-s2" not in table
    (jobs / "sst2-pretrained-c0-s1.lock").rmdir()
    assert run_finetuning(options_for(tasks="sst2")) == 0
    assert "Error" not in (jobs / "sst2-pretrained-c0-s1.log").read_text(), "a new attempt begins the log anew"


def test_a_killed_command_ends_its_jobs_and_continues_when_repeated(options_for, in_process, tmp_path):
    """kill -9 while processes of jobs run: they end too, and the same command runs only the jobs that are not done."""
    slow = PROTOCOL.replace("rte: {", "rte: {epochs: 100000, ")
    (tmp_path / "tiny.yaml").write_text(slow)
    options = options_for(tasks="rte,mnli")
    command = [
        sys.executable,
        "launch/finetune_glue.py",
        f"--checkpoint={options.checkpoint}",
        f"--data={options.data}",
    ]
    command += [f"--out={options.out}", f"--protocol={options.protocol}", "--tasks=rte,mnli", "--ops=torch"]
    process = warm.popen(command, os.environ | {"DS_ACCELERATOR": "cpu"}, Path(os.devnull))
    log = tmp_path / "out/jobs/rte-pretrained-c0-s1.log"
    deadline = time.monotonic() + 300
    while not log.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert log.is_file()
    deadline = time.monotonic() + 300
    while holds_open(log) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not holds_open(log), "a job outlived the command"
    before = mtimes(tmp_path)
    assert before.keys() == {"mnli-pretrained-c0-s1.json"}
    (tmp_path / "tiny.yaml").write_text(PROTOCOL)
    assert run_finetuning(options) == 0
    assert mtimes(tmp_path)["mnli-pretrained-c0-s1.json"] == before["mnli-pretrained-c0-s1.json"]


def holds_open(path: Path) -> bool:
    """Return whether any process has the file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(path):
                return True
        except OSError:
            # The process ended meanwhile.
            continue
    return False


def test_wrong_flags_are_refused(options_for):
    assert parse_shard("3/8") == (3, 8)
    for wrong in ("8/8", "3", "a/b", "\u0663/8", "0/" + "9" * 5000):
        with pytest.raises(ValueError, match="expected PART/PARTS"):
            parse_shard(wrong)
    for number in (-1, 1025, 10**12):
        with pytest.raises(ValueError, match=rf"--workers is {number}, expected a number in \[0, 1024\]"):
            options_for(workers=number)
    with pytest.raises(ValueError, match="ax: it has only a test set"):
        run_finetuning(options_for(tasks="ax"))


def test_files_for_the_server_have_its_labels():
    import numpy as np

    assert as_tsv(GLUE["cola"], np.array([1, 0])) == "index\tprediction\n0\t1\n1\t0\n"
    assert as_tsv(GLUE["rte"], np.array([1])) == "index\tprediction\n0\tnot_entailment\n"
    assert as_tsv(GLUE["stsb"], np.array([5.7, 2.0])) == "index\tprediction\n0\t5.000\n1\t2.000\n"
    assert set(FILES) == {f"{task.name}/{split}" for task in GLUE.values() for split in task.test.values()}


def test_the_average_names_its_tasks_unless_they_are_the_eight():
    part = {"mean": 0.5, "failed": {}, "missing": []}
    eight = {task: {"pretrained": part} for task in ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")}
    assert average(eight | {"wnli": {"pretrained": part | {"mean": 0.0}}}) == (0.5, "mean of GLUE's eight")
    assert average({"rte": {"pretrained": part}}) == (0.5, "mean of rte only")
    assert average({}) == (None, "mean of nothing")


def test_no_task_is_an_error(options_for):
    with pytest.raises(ValueError, match="--tasks ,: names no task; expected all, or some of cola"):
        run_finetuning(options_for(tasks=","))


def test_a_job_on_a_second_gpu_launches_its_kernels_there(monkeypatch, tmp_path):
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(runner, "run_job", lambda job, context, slot, start: done.append("trained") or {})
    monkeypatch.setattr(runner, "check_data_is_the_same", lambda *arguments: None)
    monkeypatch.setattr(runner, "write_result", lambda *arguments: None)
    job: Any = SimpleNamespace(saves_model=False)
    context: Any = SimpleNamespace(data=tmp_path)
    for device in ("cuda:1", "cpu"):
        runner.run_and_write(job, context, WorkerSlot(torch.device(device), 1), tmp_path, {})
    assert done == [torch.device("cuda:1"), "trained", "trained"]
