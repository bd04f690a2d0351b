"""The whole path: tokenizer, shards, training, kill -9, resume, export, reload, fine-tuning."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.training.telemetry.reporter import read_metrics
from tests.helpers import warm
from tests.helpers.runs import pretrain_command, run_command

STEPS = 20
SUMMARY = {
    "unigram_loss", "heldout_loss", "masked_accuracy", "tasks", "pretrain_seconds", "total_seconds",
    "tokens_per_second", "hf_dir",
}  # fmt: skip
# Saved every third step and killed at any step: repeated steps must have the same results.
SETTINGS = [f"--run.max_steps={STEPS}", "--run.save_every_steps=3", "--run.eval_every_steps=7", "--data.num_workers=1"]
SETTINGS += ["--run.log_every_steps=2"]


def kill_during(command: list[str], metrics: Path, step: int) -> None:
    """Start the command in its own session, and kill -9 the session when `step` is logged."""
    process = warm.popen(command, os.environ | {"DS_ACCELERATOR": "cpu"}, Path(os.devnull))
    until = time.monotonic() + 600
    while time.monotonic() < until and process.poll() is None:
        if any(record["step"] >= step for record in read_metrics(metrics)):
            break
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    done = run_command(pretrain_command(corpus, out, *SETTINGS))
    assert done.code == 0, done.output
    return out


def test_killed_and_resumed_it_ends_bitwise_the_same(corpus, undisturbed, tmp_path):
    command = pretrain_command(corpus, tmp_path, *SETTINGS)
    for step in (5, 12):
        kill_during(command, tmp_path / "metrics.jsonl", step)
    done = run_command(command)
    assert done.code == 0, done.output
    assert "resumed from" in done.output
    curves = []
    for out in (undisturbed, tmp_path):
        records = read_metrics(out / "metrics.jsonl")
        curves.append(
            {key: [r[key] for r in records if key in r] for key in ("step", "loss", "heldout_loss", "tokens")}
        )
    assert curves[0] == curves[1]
    first, second = (read_checkpoint(out)[0] for out in (undisturbed, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_resumes_before_a_damaged_checkpoint_and_says_so(corpus, undisturbed, tmp_path):
    out = tmp_path / "run"
    subprocess.run(["cp", "-r", str(undisturbed), str(out)], check=True)
    newest = out / "checkpoints" / f"step-{STEPS:08d}"
    largest = max(newest.glob("*.pt"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    # One bit.
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))
    done = run_command(pretrain_command(corpus, out, *SETTINGS))
    assert done.code == 0, done.output
    assert f"checkpoint {newest.name} is damaged and not used" in done.output
    assert "resumed from" in done.output
    first, second = (read_checkpoint(folder)[0] for folder in (undisturbed, out))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def exported(undisturbed) -> Path:
    done = run_command([sys.executable, "launch/convert_to_hf.py", str(undisturbed), str(undisturbed / "hf")])
    assert done.code == 0, done.output
    assert "loads in transformers" in done.output
    return undisturbed / "hf"


RELOAD = """
import sys
sys.modules["megabert"] = None
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
print(len(fill("the [MASK] of the module")))
AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
model.save_pretrained(sys.argv[2])
again = AutoModelForMaskedLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
inputs = tokenizer(["one sentence", "and another, which is longer"], return_tensors="pt", padding=True)
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)
print("reloaded")
"""


def test_the_export_works_where_megabert_is_not_importable(exported, tmp_path):
    command = [sys.executable, "tests/helpers/scripts/run_code.py", RELOAD, str(exported), str(tmp_path / "again")]
    done = run_command(command, preload="transformers", HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.code == 0, done.output
    assert "reloaded" in done.output


@pytest.fixture(scope="module")
def task_data(texts, tmp_path_factory) -> Path:
    """Data of the task movie-sentiment, made up: the scores mean nothing, and nothing is downloaded."""
    data = tmp_path_factory.mktemp("glue")
    (data / "movie-sentiment").mkdir()
    lines = [f"{' '.join(text.split())[:80]}\t{'positive' if len(text) % 2 else 'negative'}" for text in texts]
    for name, rows in (("train", lines[:240]), ("dev", lines[240:300])):
        (data / f"movie-sentiment/{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]))
    return data


def test_fine_tuning_and_the_summary(exported, undisturbed, task_data):
    out = undisturbed / "finetune"
    protocol = undisturbed / "tiny.yaml"
    protocol.write_text(
        "settings: {lr: 1.0e-3, epochs: 1, batch_size: 32, max_seq_len: 32, pooling: mean, max_train_examples: 200}\n"
    )
    command = [sys.executable, "launch/finetune_glue.py", f"--checkpoint={exported}", f"--out={out}", "--baselines"]
    command += [
        f"--data={task_data}",
        "--task-file=data_prep/tasks/movie-sentiment.yaml",
        f"--protocol={protocol}",
        "--ops=torch",
    ]
    done = run_command(command)
    assert done.code == 0, done.output
    assert "200 / 60" in done.output
    assert all(row in done.output for row in ("fine-tuned, pretrained", "from random weights", "TF-IDF"))
    assert "accuracy 0." not in run_command(command).output, "every job's result is reused"
    (undisturbed / "times.tsv").write_text("pretraining\t10.5\nexport\t2.5\n")
    command = [sys.executable, "launch/quickstart/summarize.py", f"--run={undisturbed}"]
    done = run_command([*command, f"--times={undisturbed / 'times.tsv'}"])
    assert done.code == 0, done.output
    assert "held-out loss" in done.output
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary.keys() == SUMMARY
    assert summary["total_seconds"] == 13.0
    assert summary["tasks"]["movie-sentiment"].keys() == {"pretrained", "random", "tfidf", "std", "seeds"}
    assert summary["tasks"]["movie-sentiment"]["seeds"] == 1
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_score_against_cost_is_drawn_from_training_checkpoints(undisturbed, task_data, tmp_path):
    protocol = tmp_path / "tiny.yaml"
    protocol.write_text("settings: {lr: 1.0e-3, epochs: 1, batch_size: 32, max_seq_len: 32, max_train_examples: 64}\n")
    command = [sys.executable, "launch/pareto.py", f"--runs={undisturbed}", f"--protocol={protocol}", "--ops=torch"]
    command += [
        "--task-file=data_prep/tasks/movie-sentiment.yaml",
        f"--data={task_data}",
        f"--out={tmp_path}",
        "--dollars-per-gpu-hour=2",
    ]
    done = run_command(command)
    assert done.code == 0, done.output
    points = json.loads((tmp_path / "pareto.json").read_text())
    assert points[-1]["step"] == STEPS
    assert points[-1]["dollars"] == pytest.approx(2 * points[-1]["hours"])
    assert points[-1]["tokens"] == read_metrics(undisturbed / "metrics.jsonl")[-1]["tokens"]
    # The best point is on each cost's front.
    for cost in ("hours", "tokens", "dollars"):
        assert any(cost in point["fronts"] for point in points)
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
