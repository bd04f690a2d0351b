"""From published folders of every architecture to shards, an import, a training, an export and fine-tuned models."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from tests.convert.helpers.auto_tokenizer import load_auto_tokenizer
from tests.helpers.foreign.published_folders import SETTINGS, write_published_folder
from tests.helpers.foreign.sentencepiece_models import lines_of_every_script
from tests.helpers.runs import Corpus, run_command

SHAPE = ["--model.num_hidden_layers=2", "--model.hidden_size=32", "--model.num_attention_heads=2"]
RUN = ["--data.max_seq_len=32", "--data.micro_batch_tokens=256", "--data.global_batch_tokens=512"]
RUN += ["--data.num_workers=0", "--run.max_steps=2", "--run.eval_tokens=512", "--run.ops=torch"]
RECIPES = {"ModernBert": "modernbert-continue", "Gte": "mosaicbert-rope-base"}
# The classes that exports have, where it is not the one that was published.
EXPORTED = {"XLMRoberta": "Roberta", "Camembert": "Roberta", "Electra": "Bert"}
FINE_TUNED = EXPORTED | {"Electra": "Electra"}
PROTOCOL = "settings: {lr: 1.0e-2, epochs: 3, batch_size: 8, max_seq_len: 32, precision: fp32}"
TASK = "name: own\ntexts: [one, two]\nlabels: [bad, good]\nmetrics: [accuracy]\ntrain: own.jsonl\ndev: own.jsonl\n"


def run(script: str, *arguments: object) -> str:
    done = run_command([sys.executable, script, *map(str, arguments)])
    assert done.code == 0, done.output
    return done.output


def follow_advice(command: list[str]) -> str:
    """Run a training; after a refusal, again with the flags that it names, until it runs. Returns its output."""
    for _ in range(5):
        done = run_command([sys.executable, "launch/pretrain.py", *command])
        if done.code == 0:
            return done.output
        advice = done.output.splitlines()[-1]
        flags = re.findall(r"--model\.\w+=\S+?(?=\.?(?:\s|$))", advice)
        flags += [
            f"--model.{name}={value}" for name, value in re.findall(r"Set model\.(\w+) to (\S+?)(?:,|\.?$)", advice)
        ]
        assert flags, done.output
        names = tuple(flag.partition("=")[0] + "=" for flag in flags)
        command = [word for word in command if not word.startswith(names)] + flags
    raise AssertionError(f"refused five times, last: {done.output}")


@pytest.mark.nightly
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_published_model_is_continued_exported_and_fine_tuned(kind, corpus: Corpus, tmp_path):
    published, imported, out = tmp_path / "published", tmp_path / "imported", tmp_path / "out"
    tokenizer, tokens = tmp_path / "tokenizer", tmp_path / "tokens"
    write_published_folder(published, kind, corpus.texts)
    run("data_prep/train_tokenizer.py", "--existing", published, "--out", tokenizer)
    run(
        "data_prep/write_shards.py", "--source", corpus.jsonl, "--tokenizer", tokenizer, "--out", tokens,
        "--heldout", 0.05, "--chunk_tokens", 2048, "--max-unknown", 0.9,
    )  # fmt: skip
    assert "initialized: none" in run("launch/convert_from_hf.py", published, imported)
    flags = [f"--data.train={tokens}", f"--run.output_dir={tmp_path / 'run'}", f"--model.init_from={imported}"]
    recipe = ["--ds_config=ds_configs/zero2.json", f"--recipe={RECIPES.get(kind, 'bert-base')}", *SHAPE, *RUN, *flags]
    assert "step 2: saved" in follow_advice(recipe)
    assert "loads in transformers" in run("launch/convert_to_hf.py", tmp_path / "run", out)
    loaded = AutoModelForMaskedLM.from_pretrained(out)
    assert type(loaded).__name__ == f"{EXPORTED.get(kind, kind)}ForMaskedLM"
    assert_same_ids(published, out, corpus.texts)
    check_continued(published, loaded, kind)
    check_fine_tuned(imported, published, tmp_path, kind)


def assert_same_ids(published: Path, out: Path, texts: list[str]) -> None:
    theirs, ours = load_auto_tokenizer(published), load_auto_tokenizer(out)
    lines = [*lines_of_every_script(), *texts[:100], "", " a", f"a {theirs.mask_token} b"]
    assert ours(lines)["input_ids"] == theirs(lines)["input_ids"]
    for role in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(ours, f"{role}_token") == getattr(theirs, f"{role}_token")


def check_continued(published: Path, loaded: transformers.PreTrainedModel, kind: str) -> None:
    """The exported weights are near the published ones, but changed."""
    before = AutoModelForMaskedLM.from_pretrained(published)
    new, old = (next(model.get_input_embeddings().parameters()).detach() for model in (loaded, before))
    assert 0 < (new - old).abs().max() < 0.05
    if kind not in EXPORTED:
        assert loaded.state_dict().keys() == before.state_dict().keys()
    else:
        assert len(loaded.state_dict()) >= len(before.state_dict())


def check_fine_tuned(imported: Path, published: Path, folder: Path, kind: str) -> None:
    rows = [("the list of values", "returns a number", "good"), ("an error", "raises it", "bad")] * 12
    (folder / "own.jsonl").write_text(
        "".join(json.dumps(dict(zip(("one", "two", "label"), row, strict=True))) + "\n" for row in rows)
    )
    (folder / "own.yaml").write_text(TASK)
    (folder / "protocol.yaml").write_text(PROTOCOL)
    run(
        "launch/finetune_glue.py", "--checkpoint", imported, "--task-file", folder / "own.yaml", "--data", folder,
        "--protocol", folder / "protocol.yaml", "--out", folder / "glue", "--keep-models", "--workers", 1,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(folder / "glue/models/own").eval()
    assert type(model).__name__ == f"{FINE_TUNED.get(kind, kind)}ForSequenceClassification"
    tokenizer = load_auto_tokenizer(folder / "glue/models/own")
    theirs = load_auto_tokenizer(published)
    first, second = [row[0] for row in rows], [row[1] for row in rows]
    inputs = tokenizer(first, second, padding=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == theirs(first, second, padding=True)["input_ids"]
    with torch.no_grad():
        predictions = model(**inputs).logits.argmax(-1).tolist()
    right = [model.config.id2label[number] == row[2] for number, row in zip(predictions, rows, strict=True)]
    results = [json.loads(path.read_text()) for path in (folder / "glue/jobs").glob("*.json")]
    assert max(result["score"] for result in results) == sum(right) / len(right)
