"""The same command again: which results it reuses and which it makes again; and two commands at the same time."""

import errno
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from megabert.finetune.jobs import runner
from megabert.finetune.main import run_finetuning
from tests.finetune.helpers.layouts import write_tsv
from tests.finetune.helpers.locks import held


def results_of_jobs(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "jobs").glob("*.json"))}


def changed(before: dict[str, dict], out: Path) -> list[str]:
    """Return the jobs that ran since; at least the seconds in their results differ."""
    after = results_of_jobs(out)
    return [name for name in after if before.get(name) != after[name]]


def labels_in(archive: Path) -> dict[str, str]:
    with zipfile.ZipFile(archive) as files:
        return {name: files.read(name).decode() for name in files.namelist()}


def test_a_changed_test_set_is_labelled_again_only_by_the_best_job(options_for, in_process, tmp_path):
    data, out = write_tsv(tmp_path / "data"), tmp_path / "out"
    options = options_for(tasks="cola", submission=True, data=str(data))
    assert run_finetuning(options) == 0
    before, labels = results_of_jobs(out), labels_in(out / "submission.zip")
    with open(data / "CoLA/test.tsv", "a") as file:
        file.write("12\tthe cat sat on the mat\n")
    assert run_finetuning(options) == 0
    best = max(before, key=lambda name: before[name]["score"])
    assert changed(before, out) == [best]
    after = labels_in(out / "submission.zip")
    assert (after["CoLA.tsv"].count("\n"), labels["CoLA.tsv"].count("\n")) == (14, 13)
    before = results_of_jobs(out)
    assert run_finetuning(options) == 0
    assert changed(before, out) == []


def test_a_full_disk_leaves_the_earlier_submission_whole(options_for, in_process, tmp_path, monkeypatch):
    archive = tmp_path / "out/submission.zip"
    assert run_finetuning(options_for(tasks="cola", submission=True)) == 0
    before, write = archive.read_bytes(), zipfile.ZipFile.writestr

    def write_half(self, name, *rest, **options):
        if "RTE.tsv" in str(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, name, *rest, **options)

    def fill(self, path, name):
        write_half(self, name, Path(path).read_bytes())

    monkeypatch.setattr(zipfile.ZipFile, "write", fill)
    with pytest.raises(OSError, match="No space left"):
        run_finetuning(options_for(tasks="cola,rte", allow_no_mnli=True, submission=True))
    assert archive.read_bytes() == before
    monkeypatch.undo()
    assert run_finetuning(options_for(tasks="cola,rte", allow_no_mnli=True, submission=True)) == 0
    assert set(labels_in(archive)) == {"CoLA.tsv", "RTE.tsv"}


def test_labels_that_are_asked_for_later_are_the_same(options_for, in_process, tmp_path):
    """MNLI labels with the model that it kept; of RTE's two jobs the best one trains again."""
    assert run_finetuning(options_for(tasks="mnli,rte", submission=True, out=str(tmp_path / "at_once"))) == 0
    out = tmp_path / "out"
    assert run_finetuning(options_for(tasks="mnli,rte")) == 0
    before = results_of_jobs(out)
    assert run_finetuning(options_for(tasks="mnli,rte,ax", submission=True)) == 0
    scores = {name: result["score"] for name, result in before.items() if name.startswith("rte")}
    assert changed(before, out) == ["mnli-pretrained-c0-s1", max(scores, key=lambda name: scores[name])]
    mnli = "mnli-pretrained-c0-s1"
    assert results_of_jobs(out)[mnli]["seconds"] == before[mnli]["seconds"], "it was not trained again"
    labels, at_once = labels_in(out / "submission.zip"), labels_in(tmp_path / "at_once/submission.zip")
    assert labels.pop("AX.tsv")
    assert labels == at_once
    before = results_of_jobs(out)
    assert run_finetuning(options_for(tasks="mnli,rte")) == 0
    assert changed(before, out) == []


def test_a_task_added_later_starts_from_the_model_that_mnli_kept(options_for, in_process, tmp_path):
    assert run_finetuning(options_for(tasks="mnli")) == 0
    before = results_of_jobs(tmp_path / "out")
    assert run_finetuning(options_for(tasks="rte,mnli")) == 0
    names = [f"rte-pretrained-c0-s{seed}" for seed in (1, 2)]
    assert changed(before, tmp_path / "out") == names
    rte = results_of_jobs(tmp_path / "out")[names[0]]
    assert rte["request"]["start"] == before["mnli-pretrained-c0-s1"]["model"]


DEEP = b'{"a": ' * 100_000
BROKEN = {
    "empty": (b"", "damaged: it is not JSON"),
    "cut": (b'{"status": "do', "damaged: it is not JSON"),
    "a list": (b"[]", "damaged: it holds a list, expected an object"),
    "deep": (DEEP, "damaged: it is not JSON"),
    "not UTF-8": (b"\xff\xfe{", "damaged: it is not JSON"),
    "without a version": (b'{"status": "done"}', "has format_version 1, expected 2"),
    "of wrong types": (b'{"format_version": 2, "status": "done", "scores": 3, "request": []}', "was changed since"),
    "not a number": (b'{"format_version": 2, "status": "done", "score": NaN}', "was changed since"),
    "missing": (None, None),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_result_is_made_again_with_the_reason(options_for, in_process, tmp_path, capsys, content, reason):
    assert run_finetuning(options_for(tasks="sst2")) == 0
    before, path = results_of_jobs(tmp_path / "out"), tmp_path / "out/jobs/sst2-pretrained-c0-s2.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    capsys.readouterr()
    assert run_finetuning(options_for(tasks="sst2")) == 0
    assert changed(before, tmp_path / "out") == ["sst2-pretrained-c0-s2"]
    lines = [line for line in capsys.readouterr().out.split("\n") if str(path) in line]
    assert len(lines) == (reason is not None)
    assert all(reason in line and line.endswith("It does not count, and the job runs again.") for line in lines)


@pytest.mark.parametrize(
    ("part", "value"),
    [("score", 0.97), ("scores", {"accuracy": 0.97}), ("seconds", 0.0), ("train_examples", 67_349), ("seed", 2)],
)
def test_an_edited_result_does_not_reach_the_table(options_for, in_process, tmp_path, capsys, part, value):
    assert run_finetuning(options_for(tasks="sst2")) == 0
    out = tmp_path / "out"
    path, before = out / "jobs/sst2-pretrained-c0-s1.json", json.loads((out / "results.json").read_text())
    result = json.loads(path.read_text())
    holder = result["request"]["training"] if part == "seed" else result
    holder[part] = value
    path.write_text(json.dumps(result))
    capsys.readouterr()
    assert run_finetuning(options_for(tasks="sst2")) == 0
    assert f"{path}: was changed since it was written: its content has another hash. It does not count" in (
        capsys.readouterr().out
    )
    after = json.loads((out / "results.json").read_text())
    assert after["average"] == before["average"]
    assert after["tasks"]["sst2"]["pretrained"]["scores"] == before["tasks"]["sst2"]["pretrained"]["scores"]
    assert "97.00" not in (out / "results.md").read_text()


def test_data_that_change_during_a_job_are_an_error_and_not_a_result(options_for, in_process, tmp_path, monkeypatch):
    data = write_tsv(tmp_path / "data")
    options, run_job = options_for(tasks="cola", data=str(data)), runner.run_job

    def edit_then_run(*arguments):
        with open(data / "CoLA/train.tsv", "a") as file:
            file.write("gj04\t1\t\tthe cat sat\n")
        return run_job(*arguments)

    monkeypatch.setattr(runner, "run_job", edit_then_run)
    assert run_finetuning(options) == 1
    assert f"{data}: files of cola were changed while the command ran. Run it again." in (
        (tmp_path / "out/results.md").read_text()
    )
    monkeypatch.undo()
    assert {result["status"] for result in results_of_jobs(tmp_path / "out").values()} == {"failed"}


def test_the_result_of_another_job_does_not_count(options_for, in_process, tmp_path):
    assert run_finetuning(options_for(tasks="sst2")) == 0
    out, before = tmp_path / "out", results_of_jobs(tmp_path / "out")
    shutil.copyfile(out / "jobs/sst2-pretrained-c0-s1.json", out / "jobs/sst2-pretrained-c0-s2.json")
    assert run_finetuning(options_for(tasks="sst2")) == 0
    assert results_of_jobs(out)["sst2-pretrained-c0-s2"]["request"] == before["sst2-pretrained-c0-s2"]["request"]


def test_lost_or_damaged_files_of_a_job_are_made_again(options_for, in_process, tmp_path, capsys):
    options, out = options_for(tasks="mnli,rte", submission=True), tmp_path / "out"
    assert run_finetuning(options) == 0
    labels = labels_in(out / "submission.zip")
    mnli = out / "jobs/mnli-pretrained-c0-s1"
    for path in out.glob("jobs/*.npz"):
        path.write_bytes(path.read_bytes()[:-9])
    capsys.readouterr()
    assert run_finetuning(options) == 0
    assert "s1.npz: the predictions there are missing or were changed. The job runs again." in capsys.readouterr().out
    assert labels_in(out / "submission.zip") == labels
    for path in out.glob("jobs/*.npz"):
        path.unlink()
    assert run_finetuning(options) == 0
    assert labels_in(out / "submission.zip") == labels
    before = results_of_jobs(out)
    (mnli / "model.safetensors").write_bytes((mnli / "model.safetensors").read_bytes()[:-4])
    assert run_finetuning(options) == 0
    assert changed(before, out) == [mnli.name], "the model is bitwise the one from which RTE started"
    shutil.rmtree(mnli)
    assert run_finetuning(options) == 0
    assert labels_in(out / "submission.zip") == labels


OWN = "name: own\ntexts: [text]\nlabels: [bad, good]\nmetrics: [accuracy]\ntrain: own.tsv\ndev: own.tsv\n"


def test_the_test_set_of_a_users_task_is_labelled(options_for, in_process, tmp_path):
    (tmp_path / "own.tsv").write_text("text\tlabel\n" + "the cat sat\tgood\nso bad\tbad\n" * 8)
    (tmp_path / "test.tsv").write_text("text\ngood cat\nbad mat\nso good\n")
    (tmp_path / "own.yaml").write_text(OWN)
    own = {"task_file": str(tmp_path / "own.yaml"), "data": str(tmp_path), "submission": True}
    with pytest.raises(ValueError, match="--submission: none of these tasks has a test set"):
        run_finetuning(options_for(**own))
    (tmp_path / "own.yaml").write_text(OWN + "test: missing.tsv\n")
    with pytest.raises(ValueError, match=r"missing\.tsv: no such file"):
        run_finetuning(options_for(**own))
    (tmp_path / "own.yaml").write_text(OWN + "test: test.tsv\n")
    assert run_finetuning(options_for(**own)) == 0
    lines = (tmp_path / "out/predictions/own.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == ["0", "1", "2"]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"bad", "good"}
    assert not (tmp_path / "out/submission.zip").exists()


def test_a_second_command_on_one_folder_is_refused_unless_both_are_parts_of_an_array(
    options_for, in_process, tmp_path, monkeypatch
):
    monkeypatch.setattr("megabert.finetune.main.LOCK_TIMEOUT_S", 0.3)
    out = tmp_path / "out"
    out.mkdir()
    with held(out / "glue.lock", exclusive=True) as pid:
        for shard in ("", "0/2"):
            with pytest.raises(
                ValueError, match=f"out: process {pid} on .* is fine-tuning there. Wait for it, end it, or"
            ):
                run_finetuning(options_for(tasks="sst2", shard=shard))
        assert not (out / "jobs").exists()
    with held(out / "glue.lock", exclusive=False), pytest.raises(ValueError, match="is fine-tuning there"):
        run_finetuning(options_for(tasks="sst2"))
    with held(out / "glue.lock", exclusive=False):
        assert run_finetuning(options_for(tasks="sst2", shard="0/2")) == 0
    with held(out / "start-1.lock"), pytest.raises(ValueError, match="is fine-tuning there"):
        run_finetuning(options_for(tasks="sst2", shard="1/2"))
    (out / "glue.lock").write_text('{"host": "node-7", "pid": 12}')
    assert run_finetuning(options_for(tasks="sst2")) == 0, "a lock file that no process locks does not count"


def test_a_job_that_another_command_runs_is_not_run(options_for, tmp_path, capsys):
    name = "sst2-pretrained-c0-s1"
    (tmp_path / "out/jobs").mkdir(parents=True)
    with held(tmp_path / f"out/jobs/{name}.lock"):
        assert run_finetuning(options_for(tasks="sst2", shard="0/2")) == 0
        output = capsys.readouterr().out
        assert f"{name}: another command is running it" in output
        assert "1 not run (waits for MNLI, or another command runs it)" in output
        assert run_finetuning(options_for(tasks="sst2")) == 1
        assert f"not run yet: {name}" in (tmp_path / "out/results.md").read_text()
    assert run_finetuning(options_for(tasks="sst2")) == 0


def test_inputs_that_no_job_could_use_are_refused_before_any_job(options_for, tmp_path, bert):
    with pytest.raises(ValueError, match="run.ops is fused, but"):
        run_finetuning(options_for(tasks="sst2", ops="fused"))
    other = shutil.copytree(bert, tmp_path / "other")
    tokens = json.loads((tmp_path / "out/start/tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"].items()
    tokens["model"]["vocab"] = {word if word == "[UNK]" else f"{word}x": number for word, number in vocabulary}
    tokens["added_tokens"] = []
    tokens["post_processor"] = None
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    # BERT's class would add the tokens.
    (other / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ValueError, match=r"its tokenizer has no \[CLS\]"):
        run_finetuning(options_for(tasks="sst2", checkpoint=str(other)))
    assert not (tmp_path / "out/jobs").exists()
