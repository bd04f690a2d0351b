"""--keep-models: the best run's model as a folder that transformers loads, with the names of the labels."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from megabert.convert.check import export_check
from megabert.convert.check.export_check import verify
from megabert.finetune.base_model import prepare_base_model
from megabert.finetune.jobs.job import FinetuneJob, has_token_types, tokenizer_for
from megabert.finetune.main import run_finetuning
from megabert.finetune.protocol import Settings
from megabert.finetune.results import kept_models
from megabert.finetune.tasks.readers import read_split
from megabert.finetune.tasks.task import GLUE, read_task
from megabert.finetune.training import Backend, build_model, encode
from tests.convert.helpers.auto_tokenizer import load_auto_tokenizer
from tests.finetune.conftest import PROTOCOL, SHAPE, WORDS
from tests.helpers import warm


@pytest.fixture(autouse=True)
def warm_checks(monkeypatch) -> None:
    monkeypatch.setattr(export_check, "subprocess", warm.CHECKS)


OWN = """
name: own
texts: [one, two]
labels: [bad, good]
metrics: [accuracy]
train: own.jsonl
dev: own.jsonl
"""
ROWS = [("the cat sat", "on the mat", "good"), ("so bad", "the side", "bad"), ("cat", "mat on 3 4 5", "good")] * 8


@pytest.fixture
def own(tmp_path) -> dict[str, str]:
    (tmp_path / "own.yaml").write_text(OWN)
    rows = (json.dumps({"one": one, "two": two, "label": label}) + "\n" for one, two, label in ROWS)
    (tmp_path / "own.jsonl").write_text("".join(rows))
    return {"task_file": str(tmp_path / "own.yaml"), "data": str(tmp_path)}


def results_of(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "jobs").glob("*.json"))}


def load(folder: Path, kind: str):
    tokenizer = load_auto_tokenizer(folder, trust_remote_code=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == kind
    return tokenizer, model.eval()


def test_the_best_pair_classifier_is_transformers_own_and_scores_the_same(
    options_for, in_process, own, tmp_path, capsys, monkeypatch
):
    options, out = options_for(keep_models=True, **own), tmp_path / "out"
    (tmp_path / "tiny.yaml").write_text(PROTOCOL.replace("epochs: 1,", "epochs: 3, precision: fp32,"))
    folder = out / "models/own"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("three years")
    with pytest.raises(ValueError, match="models/own: is neither empty nor an export; choose another folder"):
        run_finetuning(options)
    assert not (out / "jobs").exists()
    (folder / "thesis.txt").rename(tmp_path / "thesis.txt")
    assert run_finetuning(options) == 0
    results = results_of(out)
    best = max(results, key=lambda name: results[name]["score"])
    line = f"{folder}: {best}, the best of 2 by its score {100 * results[best]['score']:.2f}; loads in transformers"
    assert line in capsys.readouterr().out
    assert not [path for path in (out / "jobs").iterdir() if path.is_dir()], "the other models are removed"
    tokenizer, model = load(folder, "BertForSequenceClassification")
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.problem_type == "single_label_classification"
    examples = read_split(read_task(Path(own["task_file"])), tmp_path, "validation")
    assert tokenizer.model_max_length == 32
    inputs = tokenizer(examples.first, examples.second, padding=True, truncation=True, return_tensors="pt")
    assert inputs["token_type_ids"].sum() > 0
    with torch.no_grad():
        predictions = model(**inputs).logits.argmax(-1).tolist()
    right = sum(a == b for a, b in zip(predictions, examples.labels or [], strict=True)) / len(ROWS)
    assert right == results[best]["scores"]["accuracy"]
    assert verify(folder)["max_difference"] <= 1e-5
    assert (
        f"the best of 2 runs by the score on the evaluation sets; seed {best[-1]}" in (folder / "README.md").read_text()
    )
    assert "own: scored on the file that it was trained on" in (out / "results.md").read_text()
    # The same command again trains and writes nothing.
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert run_finetuning(options) == 0
    assert results_of(out) == results
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    # A folder of which a file was changed is written again, from the best job, which trains to the same weights.
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-4] + b"\1\2\3\4")
    assert run_finetuning(options) == 0
    assert (folder / "model.safetensors").read_bytes() == content
    assert results_of(out)[best]["scores"] == results[best]["scores"]


# What each class needs beside its sizes, and settings of its own names for them.
NATIVE = {
    "ModernBert": {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8},
    "Gte": {}, "Roberta": {"pad_token_id": 0}, "Electra": {"embedding_size": 16}, "DistilBert": {"hidden_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["ModernBert", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in NATIVE)])
def test_a_classifier_of_another_architecture_is_transformers_own(kind, options_for, in_process, own, tmp_path):
    sizes = {"vocab_size": len(WORDS), "max_position_embeddings": 64, "pad_token_id": 0} | SHAPE
    if kind == "DistilBert":
        del sizes["intermediate_size"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes | NATIVE[kind])
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "start")
    (tmp_path / "start/vocab.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "tiny.yaml").write_text(
        "settings: {lr: 1.0e-2, epochs: 4, batch_size: 8, max_seq_len: 32, precision: fp32}"
    )
    out = tmp_path / "out"
    assert run_finetuning(options_for(keep_models=True, checkpoint=str(tmp_path / "start"), **own)) == 0
    folder = out / "models/own"
    assert not list(folder.glob("*.py"))
    assert "trust_remote_code" not in (folder / "README.md").read_text()
    tokenizer, model = load(folder, f"{kind}ForSequenceClassification")
    assert (model.config.id2label, model.config.label2id) == ({0: "bad", 1: "good"}, {"bad": 0, "good": 1})
    examples = read_split(read_task(Path(own["task_file"])), tmp_path, "validation")
    inputs = tokenizer(examples.first, examples.second, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        predictions = model(**inputs).logits.argmax(-1).tolist()
    right = sum(a == b for a, b in zip(predictions, examples.labels or [], strict=True)) / len(ROWS)
    (result,) = results_of(out).values()
    assert right == result["scores"]["accuracy"] > 0.6


def test_a_regression_with_pooling_by_the_mean_carries_our_code(options_for, in_process, tmp_path):
    (tmp_path / "tiny.yaml").write_text(PROTOCOL.replace("max_seq_len: 32", "max_seq_len: 16, pooling: mean"))
    options, out = options_for(tasks="stsb", allow_no_mnli=True, keep_models=True), tmp_path / "out"
    assert run_finetuning(options_for(tasks="stsb", allow_no_mnli=True)) == 0
    before = results_of(out)
    assert run_finetuning(options) == 0, "a job that kept no model trains again"
    assert results_of(out)["stsb-pretrained-c0-s1"]["scores"] == before["stsb-pretrained-c0-s1"]["scores"]
    tokenizer, model = load(out / "models/stsb", "MegaBertForSequenceClassification")
    assert (model.config.id2label, model.config.problem_type) == ({0: "label"}, "regression")
    assert (model.config.classifier_pooling, tokenizer.model_max_length) == ("mean", 16)


def test_the_tokenizer_of_the_folder_gives_the_ids_of_fine_tuning(bert, glue, tmp_path):
    base = prepare_base_model(bert, tmp_path / "start").folder
    settings = Settings(lr=1e-3, epochs=1, batch_size=8, max_seq_len=12)
    task = GLUE["rte"]
    model = build_model(base, task, settings, Backend(torch.device("cpu"), "torch"), 0)
    job = FinetuneJob(task=task, settings=settings, candidate=0, seed=0)
    (tmp_path / "out").mkdir()
    assert kept_models._write_tokenizer(tmp_path / "out", base, model, job) == 12
    tokenizer = load_auto_tokenizer(tmp_path / "out")
    examples = read_split(task, glue, "train")
    ours = encode(examples, tokenizer_for(model, base, settings), has_token_types(model))
    theirs = tokenizer(examples.first, examples.second, truncation=True)
    assert (theirs["input_ids"], theirs["token_type_ids"]) == (ours.input_ids, ours.token_type_ids)
