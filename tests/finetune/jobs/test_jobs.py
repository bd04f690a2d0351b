"""The whole command on the made-up data and a model of one layer: chains, repetition, failures, shards, submission."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from megabert.finetune.base_model import Start
from megabert.finetune.jobs.job import Context, Job
from megabert.finetune.jobs.runner import Runner
from megabert.finetune.main import read_shard, run, slots
from megabert.finetune.protocol import Settings
from megabert.finetune.results.report import average
from megabert.finetune.results.submission import FILES, as_tsv
from megabert.finetune.tasks.task import GLUE
from tests.conftest import REPOSITORY
from tests.finetune.conftest import PROTOCOL
from tests.finetune.layouts import write_tsv


def results_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out/results.json").read_text())


def stamps(tmp_path: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/jobs").glob("*.json")}


def test_glue_in_one_command(request_for, tmp_path, capsys):
    request = request_for(tasks="rte,mnli,stsb,cola,ax", submission=True)
    assert run(request) == 0
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
    assert "cola: the best of 2 candidates, by this very score" in table
    assert "lacks SST-2, MRPC, QQP, QNLI, WNLI, which the server wants too" in capsys.readouterr().out
    assert (tmp_path / "out/results.png").read_bytes().startswith(b"\x89PNG")
    with zipfile.ZipFile(tmp_path / "out/submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(
            f"{n}.tsv" for n in ("AX", "CoLA", "MNLI-m", "MNLI-mm", "RTE", "STS-B")
        )
        lines = archive.read("AX.tsv").decode().splitlines()
        assert lines[0] == "index\tprediction"
        assert len(lines) == 13
        assert {line.split("\t")[1] for line in lines[1:]} <= set(GLUE["ax"].labels)
    before = stamps(tmp_path)
    assert run(request) == 0
    assert stamps(tmp_path) == before, "what is done is not done again"
    path = Path(request.protocol)
    path.write_text(path.read_text().replace("stsb: {", "stsb: {epochs: 2, "))
    assert run(request) == 0
    assert {name.split("-")[0] for name, stamp in stamps(tmp_path).items() if stamp != before[name]} == {"stsb"}


def test_a_failed_job_is_in_no_mean_and_runs_again(request_for, tmp_path):
    request, path = request_for(tasks="rte,mnli"), tmp_path / "tiny.yaml"
    path.write_text(PROTOCOL.replace("rte: {", "rte: {sweep: {lr: [1.0e+30]}, precision: fp32, epochs: 2, "))
    assert run(request) == 1
    table = (tmp_path / "out/results.md").read_text()
    assert "| rte | fine-tuned, pretrained | - | - | 0 of 2 |" in table
    assert "FAILED: rte-pretrained-c0-s1: ValueError: the loss was not finite" in table
    assert "withheld, for jobs are lacking" in table
    assert results_of(tmp_path)["average"] is None
    before = stamps(tmp_path)
    path.write_text(PROTOCOL)
    assert run(request) == 0
    after = stamps(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {
        f"rte-pretrained-c0-s{seed}.json" for seed in (1, 2)
    }


def test_without_mnli_the_chain_stops_and_what_fails_stops_it_too(request_for, tmp_path):
    with pytest.raises(ValueError, match="rte start from the encoder that MNLI left, and mnli is not among the tasks"):
        run(request_for(tasks="rte"))
    assert run(request_for(tasks="rte", allow_no_mnli=True)) == 0
    assert "NOT the protocol: rte started from the checkpoint" in (tmp_path / "out/results.md").read_text()
    path = tmp_path / "tiny.yaml"
    path.write_text(PROTOCOL.replace("mnli: {", "mnli: {lr: 1.0e+30, epochs: 2, precision: fp32, "))
    assert run(request_for(tasks="rte,mnli")) == 1
    assert (
        "FAILED: rte-pretrained-c0-s1: its start, MNLI's encoder, is missing"
        in (tmp_path / "out/results.md").read_text()
    )


def test_an_array_in_two_rounds(request_for, tmp_path, capsys):
    for left in (True, False):
        for part in ("1/2", "0/2"):
            assert run(request_for(tasks="rte,mnli", shard=part)) == 0
        assert ("waits for MNLI" in capsys.readouterr().out) == left
    before = stamps(tmp_path)
    assert run(request_for(tasks="rte,mnli")) == 0
    assert stamps(tmp_path) == before
    assert results_of(tmp_path)["tasks"]["rte"]["pretrained"]["n"] == 2


def test_baselines_are_beside_the_encoder(request_for, tmp_path):
    assert run(request_for(tasks="sst2", baselines=True)) == 0
    parts = results_of(tmp_path)["tasks"]["sst2"]
    assert {name: part["n"] for name, part in parts.items()} == {"pretrained": 2, "random_init": 2, "tfidf": 1}


def test_malformed_data_stops_everything_before_any_training(request_for, tmp_path):
    data = write_tsv(tmp_path / "data")
    path = data / "RTE/dev.tsv"
    path.write_text(path.read_text().replace("\tentailment\n", "\tperhaps\n", 1))
    with pytest.raises(ValueError, match=r"RTE/dev\.tsv, line 2, column label"):
        run(request_for(tasks="mnli,rte", data=str(data)))
    assert not (tmp_path / "out").exists()


def test_a_job_that_is_killed_or_leaves_no_log_says_so(tmp_path, bert, glue):
    context = Context(out=tmp_path, data=glue, start=Start(bert, "0"), ops="torch")
    job = Job(task=GLUE["rte"], settings=Settings(lr=1.0, epochs=1, batch_size=1), candidate=0, seed=1)
    runner = Runner([job], context, lambda line: None)
    for code, reason in ((-signal.SIGKILL, "killed by SIGKILL"), (3, "exit code 3")):
        runner._collect(job, code)
        assert runner.results[job.name] == {"status": "failed", "error": reason}


def test_killed_and_repeated_it_goes_on(request_for, tmp_path):
    """kill -9 while jobs run: they end too, and the same command does only what is left."""
    slow = PROTOCOL.replace("rte: {", "rte: {epochs: 100000, ")
    (tmp_path / "tiny.yaml").write_text(slow)
    request = request_for(tasks="rte,mnli")
    command = [
        sys.executable,
        "launch/finetune_glue.py",
        f"--checkpoint={request.checkpoint}",
        f"--data={request.data}",
    ]
    command += [f"--out={request.out}", f"--protocol={request.protocol}", "--tasks=rte,mnli", "--ops=torch"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "out/jobs/rte-pretrained-c0-s1.log"
    until = time.monotonic() + 60
    while not log.is_file() and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert log.is_file()
    until = time.monotonic() + 20
    while holds_open(log) and time.monotonic() < until:
        time.sleep(0.1)
    assert not holds_open(log), "a job outlived the command"
    before = stamps(tmp_path)
    assert before.keys() == {"mnli-pretrained-c0-s1.json"}
    (tmp_path / "tiny.yaml").write_text(PROTOCOL)
    assert run(request) == 0
    assert stamps(tmp_path)["mnli-pretrained-c0-s1.json"] == before["mnli-pretrained-c0-s1.json"]


def holds_open(path: Path) -> bool:
    """Whether any process has a file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(path):
                return True
        except OSError:  # it ended meanwhile
            continue
    return False


def test_flags(request_for):
    assert read_shard("3/8") == (3, 8)
    for wrong in ("8/8", "3", "a/b"):
        with pytest.raises(ValueError, match="expected PART/PARTS"):
            read_shard(wrong)
    with pytest.raises(ValueError, match="--workers is -1"):
        slots(-1, 3)
    with pytest.raises(ValueError, match="ax: it has only a test set"):
        run(request_for(tasks="ax"))


def test_the_servers_files_have_its_labels():
    import numpy as np

    assert as_tsv(GLUE["cola"], np.array([1, 0])) == "index\tprediction\n0\t1\n1\t0\n"
    assert as_tsv(GLUE["rte"], np.array([1])) == "index\tprediction\n0\tnot_entailment\n"
    assert as_tsv(GLUE["stsb"], np.array([5.7, 2.0])) == "index\tprediction\n0\t5.000\n1\t2.000\n"
    assert set(FILES) == {f"{task.name}/{split}" for task in GLUE.values() for split in task.test.values()}


def test_the_average_is_of_the_eight_and_says_when_it_is_not():
    part = {"mean": 0.5, "failed": {}, "missing": []}
    eight = {task: {"pretrained": part} for task in ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")}
    assert average(eight | {"wnli": {"pretrained": part | {"mean": 0.0}}}) == (0.5, "mean of GLUE's eight")
    assert average({"rte": {"pretrained": part}}) == (0.5, "mean of rte only")
    assert average({}) == (None, "mean of nothing")


def test_no_task_is_a_mistake(request_for):
    with pytest.raises(ValueError, match="--tasks ,: names no task; expected all, or some of cola"):
        run(request_for(tasks=","))
