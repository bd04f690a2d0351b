"""A BERT of transformers that takes milliseconds, and the made-up data."""

import multiprocessing
import multiprocessing.forkserver
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from megabert.finetune.options import Request
from tests.finetune.layouts import write_tsv

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "sat",
    "on",
    "and",
    "so",
    "side",
    "mat",
    "good",
    "bad",
]
WORDS += [str(number) for number in range(12)] + ["##s", '"', ",", "'"]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="session", autouse=True)
def jobs_have_torch() -> None:
    """Jobs fork from a server that has imported torch, as in the command, and not from one that other tests have started without."""
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    multiprocessing.set_forkserver_preload(["megabert.finetune.jobs.runner"])


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **SHAPE)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture(scope="session")
def glue(tmp_path_factory) -> Path:
    return write_tsv(tmp_path_factory.mktemp("glue"))


PROTOCOL = """
seeds: [1, 2]
settings: {lr: 1.0e-3, epochs: 1, batch_size: 8, max_seq_len: 32}
tasks:
  mnli: {seeds: [1]}
  rte: {start: mnli}
  stsb: {start: mnli, seeds: [1], metrics: [spearman]}
  cola: {seeds: [1], sweep: {lr: [1.0e-4, 1.0e-3]}}
"""


@pytest.fixture
def request_for(bert, glue, tmp_path):
    """A Request on the small model; its protocol is a file to edit."""
    (tmp_path / "tiny.yaml").write_text(PROTOCOL)
    same = {"checkpoint": str(bert), "data": str(glue), "protocol": str(tmp_path / "tiny.yaml"), "ops": "torch"}
    return lambda **more: Request(**(same | {"out": str(tmp_path / "out")} | more))
