"""A BERT of transformers that takes milliseconds, and the made-up data."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from tests.glue.layouts import write_tsv

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
