"""Training on mixtures, with changing lengths, on text, from pipes, and on damaged shards."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from data_prep import write_shards
from megabert.config.data_section import DataConfig, LengthPhase
from megabert.config.recipe_parser import RecipeParser
from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.data.bin_shape import four_medians
from megabert.data.shards.source import open_corpus
from megabert.files.checkpoint_format import State, read_state
from megabert.process.exit_codes import EXIT_PEER_LOST
from megabert.training.corpora import choose_max_documents
from megabert.training.telemetry.reporter import read_metrics
from tests.helpers.runs import TINY, Corpus, last_of_each, patched, pretrain_command, run_command


def recorded(out: Path, key: str) -> list[float]:
    return [record[key] for record in read_metrics(out / "metrics.jsonl") if key in record]


@pytest.fixture(scope="module")
def text(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_shards.main([f"--source={corpus.jsonl}", f"--out={folder}", "--heldout=0.1", "--chunk_tokens=8192"])
    return folder


def test_phases_with_other_data_length_and_masking_resume_bitwise_inside_either(corpus: Corpus, tmp_path):
    """One corpus, then it twice, 3 to 1, with longer pieces. Resumed from steps 2, 4 (the border) and 6.

    The resumed runs compute activations again, which changes no result.
    """
    parts = [{"shards": str(corpus.tokens), "weight": 3}, {"shards": str(corpus.tokens)}]
    phases = [{"until": 0.5}, {"until": 1.0, "train": parts, "max_seq_len": 64, "mlm_probability": 0.15}]
    settings = [
        f"--data.phases={json.dumps(phases)}",
        "--run.max_steps=8",
        "--run.save_every_steps=2",
    ]
    settings += ["--run.keep_checkpoints=9"]
    whole = tmp_path / "whole"
    done = run_command(pretrain_command(corpus, whole, *settings))
    assert done.code == 0, done.output
    assert len(recorded(whole, "loss")) == 8
    shares = recorded(whole, "masked_share")
    assert min(shares[:4]) > 0.2 > max(shares[4:])
    for step in (2, 4, 6):
        out = tmp_path / f"from-{step}"
        shutil.copytree(whole / "checkpoints" / f"step-{step:08d}", out / "checkpoints" / f"step-{step:08d}")
        done = run_command(pretrain_command(corpus, out, *settings, "--model.gradient_checkpointing=every_layer"))
        assert done.code == 0, done.output
        assert f"step {step} of 8" in done.output
        assert recorded(out, "loss") == recorded(whole, "loss")[step:]
        first, second = (read_checkpoint(folder)[0] for folder in (whole, out))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_state(whole / "checkpoints" / "step-00000008").max_seq_len == 64


def test_text_from_a_pipe_is_tokenized_while_training(corpus: Corpus, text: Path, tmp_path):
    command = f"pipe:cat {text}/train-{{00000..00023}}.tar"
    settings = [
        f"--data.train={command}",
        f"--data.tokenizer={corpus.tokenizer}",
        f"--data.cache_dir={tmp_path / 'cache'}",
    ]
    done = run_command(
        pretrain_command(corpus, tmp_path / "run", *settings, "--run.max_steps=3", "--data.num_workers=2")
    )
    assert done.code == 0, done.output
    assert len(recorded(tmp_path / "run", "heldout_loss")) == 1
    [(loss, unigram, gain, word)] = re.findall(
        r"held-out loss ([\d.]+) \(unigram ([\d.]+), ([\d.]+) nats (better|worse)\)", done.output
    )
    assert float(gain) == pytest.approx(abs(float(unigram) - float(loss)), abs=2e-3)
    assert word == ("better" if float(loss) < float(unigram) else "worse")
    assert (tmp_path / "run/checkpoints/step-00000003/tokenizer.json").is_file()
    assert list((tmp_path / "cache").glob("*.tar"))


def damaged(corpus: Corpus, folder: Path) -> Path:
    """Every chunk of the first eight shards with one bit flipped."""
    shutil.copytree(corpus.tokens, folder)
    for number in range(8):
        path = folder / f"train-{number:05d}.tar"
        data = bytearray(path.read_bytes())
        for place in range(700, len(data) - 2048, 1024):
            data[place] ^= 1
        path.write_bytes(bytes(data))
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_stops_the_run_with_one_line(corpus: Corpus, tmp_path, workers):
    folder = damaged(corpus, tmp_path / "tokens")
    settings = [f"--data.train={folder}", "--run.max_steps=12", f"--data.num_workers={workers}"]
    done = run_command(pretrain_command(corpus, tmp_path / "run", *settings))
    assert done.code == 2
    assert "damaged: its checksum differs from the manifest's" in done.output
    assert "Traceback" not in done.output


def test_a_damaged_shard_can_be_skipped_and_is_counted(corpus: Corpus, tmp_path):
    folder = damaged(corpus, tmp_path / "tokens")
    settings = [f"--data.train={folder}", "--data.on_bad_shard=skip", "--run.max_steps=12"]
    done = run_command(pretrain_command(corpus, tmp_path / "run", *settings))
    assert done.code == 0, done.output
    assert "skipped: " in done.output
    skipped = recorded(tmp_path / "run", "skipped_chunks")
    assert skipped == sorted(skipped)
    assert skipped[-1] > 0
    assert all(0 <= share < 1 for share in recorded(tmp_path / "run", "loader_wait"))


def recipe_of(*argv: str):
    return RecipeParser("pretrain", "").read(last_of_each([*TINY, "--run.max_steps=10", *argv]))[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('--data.max_seq_len=[{"max_seq_len": 32, "until": 0.9}]', "expected rising shares, the last of them 1"),
        ("--data.max_seq_len=[]", "expected rising shares"),
        ('--data.train=[{"shards": "a", "weight": 0}]', "--data.train.0.weight is 0"),
        ('--data.train=[{"shard": "a"}]', "Did you mean --data.train.0.shards?"),
        ("--data.train=[]", "data.train is an empty list"),
        ("--data.cache_gb=0", "data.cache_gb is 0, expected a number in [1, 1048576]"),
        ("--data.on_bad_shard=ignore", "ignore"),
    ],
)
def test_impossible_settings_are_refused(capsys, setting, message):
    with pytest.raises(SystemExit):
        recipe_of(setting)
    assert message in capsys.readouterr().err


def test_one_position_table_serves_every_phase():
    with pytest.raises(ValueError, match="expected at least data.max_seq_len"):
        DataConfig(max_seq_len=[LengthPhase(max_seq_len=128, until=1.0)], micro_batch_tokens=64)


START = """
import sys, time
from megabert.data.shards.source import open_corpus
from megabert.data.shards.storage import LocalFolder
print(LocalFolder(sys.argv[1]).size("manifest.json") > 0, "torch" in sys.modules)
"""


def test_reading_shards_needs_no_torch(corpus: Corpus):
    """So that data preparation and checks start quickly."""
    done = run_command([sys.executable, "-c", START, str(corpus.tokens)])
    assert done.output.split()[-2:] == ["True", "False"]


def test_a_loader_that_gives_nothing_ends_the_run_with_its_name(corpus: Corpus, tmp_path):
    patch = "import time; from megabert.data import stream; stream.LOADER_TIMEOUT_S = 2\n"
    patch += "stream.open_stream = lambda *_: time.sleep(600)\n"
    # So long PyTorch waits for each worker to end before it kills it.
    patch += "import torch.utils.data; torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2"
    command = patched(pretrain_command(corpus, tmp_path, "--run.max_steps=3", "--data.num_workers=2"))
    done = run_command(command, PATCH=patch)
    assert done.code == EXIT_PEER_LOST, "no error of the user: another attempt may succeed"
    last = done.output.strip().splitlines()[-1]
    assert "data.train: rank 0 gets no more batches: DataLoader timed out after 2 seconds" in last
    assert "Traceback" not in done.output


def test_training_under_a_long_tmpdir_has_batches(corpus: Corpus, tmp_path):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    command = pretrain_command(corpus, tmp_path / "run", "--run.max_steps=3", "--data.num_workers=2")
    done = run_command(command, timeout_s=120, TMPDIR=str(folder))
    assert done.code == 0, done.output
    assert len(recorded(tmp_path / "run", "loss")) == 3


def test_a_resumed_run_keeps_the_places_for_documents_of_its_bins(corpus: Corpus):
    opened = open_corpus([(str(corpus.tokens), 1.0)])
    data = DataConfig(train=str(corpus.tokens), max_seq_len=32, micro_batch_tokens=1024)
    first = choose_max_documents(data, opened, None)
    assert 40 <= first[32] <= 64
    saved = State(**dict.fromkeys(field.name for field in dataclasses.fields(State)) | {"max_documents": {32: 99}})
    assert choose_max_documents(data, opened, saved) == {32: 99}
    before_version_3 = dataclasses.replace(saved, max_documents=None)
    assert choose_max_documents(data, opened, before_version_3) == {32: four_medians(opened, 1024, 32)} != first
    assert choose_max_documents(dataclasses.replace(data, max_documents=70), opened, saved) == {32: 70}


# Prints the tokens that the layer computes in each forward pass, and the slots that the bin's documents need.
COUNT_SLOTS = """
from megabert.data.batch import PackedBatch
from megabert.model.layers import PostNormBlock
forward, inputs = PostNormBlock.forward, PackedBatch.model_inputs
def counting(block, hidden, *arguments):
    print("SLOTS", hidden.shape[0], flush=True)
    return forward(block, hidden, *arguments)
def showing(batch, device):
    print("BIN", int((batch.cu_seqlens.diff() > 0).sum()) * batch.max_seqlen, flush=True)
    return inputs(batch, device)
PostNormBlock.forward, PackedBatch.model_inputs = counting, showing
"""


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.nightly), 3])
def test_a_padded_baseline_computes_the_slots_of_its_documents_only(corpus: Corpus, tmp_path, stage):
    settings = ["--model.padding=padded", "--model.num_hidden_layers=1", "--run.max_steps=1", "--run.eval_tokens=256"]
    command = patched(pretrain_command(corpus, tmp_path, *settings, ds_config=f"zero{stage}"))
    done = run_command(command, PATCH=COUNT_SLOTS)
    assert done.code == 0, done.output
    slots, needed = ([int(n) for n in re.findall(rf"{word} (\d+)", done.output)] for word in ("SLOTS", "BIN"))
    assert len(slots) == len(needed) >= 3
    assert all(computed <= 1.1 * least for computed, least in zip(slots, needed, strict=True))
