"""The race's texts, and the function that scores the models of both sides."""

import importlib.util
import json
import runpy
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from race import command as race_command
from race import scoring
from race.sides.baseline import Rows
from race.texts import corpora, prose
from race.texts.corpora import Corpus
from transformers import BertConfig, BertForMaskedLM

from megabert.convert.from_hf import import_model
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from tests.helpers.runs import REPOSITORY


@pytest.fixture(scope="module")
def text(corpus):
    return Corpus("text", corpus.tokens)


def test_the_held_out_tokens_are_fixed_and_never_special(text):
    rows, special = text.held_out, text.train.tokenizer.is_special
    labels = np.concatenate([row.labels for row in rows])
    maskable = sum(np.count_nonzero(~special[row.input_ids]) for row in rows)
    assert not special[labels].any()
    # A row rounds its share, and a [MASK] that hides a label is special itself.
    assert len(labels) == pytest.approx(0.15 * (maskable + 0.8 * len(labels)), rel=0.1)
    assert max(len(row.input_ids) for row in rows) <= corpora.MAX_SEQ_LEN
    again = Corpus("text", text.tokens)
    assert again.hash == text.hash
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(rows, again.held_out, strict=True))


def test_the_baseline_sees_every_training_token(text):
    ids = np.concatenate(list(corpora.documents(text.train)))
    windows = [row[1:-1] for row in corpora.windows(text.train)]
    assert (np.concatenate(windows) == ids).all()
    blocks = corpora.blocks(text.train)
    special = text.train.tokenizer.is_special
    # Without [UNK].
    words = ids[~special[ids]]
    assert (blocks[~special[blocks]] == words[: (~special[blocks]).sum()]).all()
    assert blocks.shape[1] == corpora.MAX_SEQ_LEN
    row = Rows(text, "blocks")[0]
    assert row["input_ids"] == blocks[0].tolist()
    assert row["special_tokens_mask"] == special[blocks[0]].astype(int).tolist()


def test_one_function_scores_both_sides_alike(text, tmp_path):
    """transformers' BERT and its import into our layout have the same held-out loss and logits of length 1 too."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=text.train.tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=corpora.MAX_SEQ_LEN, initializer_range=0.3,
    )  # fmt: skip
    theirs = BertForMaskedLM(config)
    theirs.save_pretrained(tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).write_bytes((text.tokens / name).read_bytes())
    import_model(tmp_path / "hf", tmp_path / "ours")
    ours = MegaBertForMaskedLM.from_pretrained(tmp_path / "ours")
    loss = scoring.held_out_loss(theirs, text)
    assert scoring.held_out_loss(ours, text) == pytest.approx(loss, abs=1e-4)
    with torch.no_grad():
        theirs.cls.predictions.bias.fill_(float("nan"))
    assert scoring.held_out_loss(theirs, text) == float("inf")


def test_prose_is_read_without_r_and_sword(tmp_path):
    def serialized(lines):
        vector = b"".join(struct.pack(">ii", 0x40009, len(line)) + line for line in lines)
        header = b"X\n" + struct.pack(">iiii", 3, 262402, 197888, 5) + b"UTF-8"
        return header + struct.pack(">ii", 16, len(lines)) + vector

    rdb = tmp_path / "Rdata.rdb"
    chunks = [serialized([b"EMMA", b"", b"One line", b"and another."]), serialized(["Caf\u00e9".encode()])]
    rdb.write_bytes(b"".join(struct.pack(">I", len(chunk)) + zlib.compress(chunk) for chunk in chunks))
    assert list(prose.novels(rdb)) == ["EMMA", "One line and another.", "Caf\u00e9"]
    block = zlib.compress(
        b'<title>T</title> <div sID="1" type="x-p"/> a &amp; b <hi>c</hi> <div eID="1" type="x-p"/> d'
    )
    (tmp_path / "ot.czz").write_bytes(b"skip" + block)
    (tmp_path / "ot.czs").write_bytes(struct.pack("<IIIIII", 0, 0, 0, 4, len(block), 99))
    assert list(prose.commentary(tmp_path / "ot")) == ["T", "a & b c", "d"]
    parts = list(prose.documents(["a" * 1000, "", "b" * 600, "c"]))
    assert parts == ["a" * 1000 + "\n\n" + "b" * 600, "c"]


def test_packages_that_cannot_be_had(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package p\n")
    monkeypatch.setattr(prose.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(prose.UnreachableError, match="apt-get download p: E: Unable to locate package p"):
        prose.extract("p", "0", tmp_path)
    (tmp_path / "p_1_all.deb").write_bytes(b"another version")
    with pytest.raises(ValueError, match=r"p_1_all.deb: sha256 .*, expected 0: another version. Remove it"):
        prose.extract("p", "0", tmp_path)


@pytest.mark.parametrize("script", ["run.py", "ablation.py"])
def test_the_commands_name_accelerate_if_it_is_missing(script, monkeypatch, capsys):
    folder, find = REPOSITORY / "tests/benchmarks", importlib.util.find_spec
    monkeypatch.setattr("sys.path", [str(folder / "race"), *sys.path])
    monkeypatch.setattr("sys.argv", [script])
    missing = lambda name, *rest: None if name == "accelerate" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    monkeypatch.setattr(race_command, "find_spec", missing)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(folder / "race" / script), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("transformers' Trainer needs accelerate: pip install accelerate\n")


def test_tasks_without_data_say_how_to_get_them(tmp_path):
    tasks, missing = scoring.available_tasks(tmp_path)
    assert tasks == []
    assert len(missing) == len(scoring.TASKS) == 2
    assert all("Run python data_prep/fetch_tasks.py" in line for line in missing)


@pytest.mark.nightly
def test_quick_runs_to_its_end(tmp_path):
    """It prepares the quickstart's corpus, in a copy of the repository."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    for folder in ("launch", "data_prep", "ds_configs", "megabert", "tests/benchmarks"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "tests/benchmarks/race/run.py", "--quick", "--fresh", "--json=figures.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stderr
    assert "it is no result" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figures.keys() >= {"seeds", "same_size_loss_speedup"}
