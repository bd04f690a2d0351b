"""GGUF files hold the model, a port of llama.cpp's equations computes its states, and damage is found."""

import json
from pathlib import Path

import numpy as np
import pytest

from megabert.convert import to_hf
from megabert.convert.targets import gguf_file, registry
from megabert.convert.targets.gguf_vocabulary import CONTROL, NORMAL, UNKNOWN, UNUSED, check_vocabulary
from megabert.convert.targets.gguf_vocabulary import describe_vocabulary as describe
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.small_model import BERT, small_model
from tests.convert.hf.test_resize import WORDPIECE, wordpiece


@pytest.fixture(scope="module")
def unigram(corpus) -> dict:
    return json.loads((corpus.tokenizer / "tokenizer.json").read_text())


def test_a_unigram_vocabulary_is_sentencepieces_own(unigram):
    vocabulary = describe(unigram, 832, ["The \uff21 of \u1e9e", "Caf\u00e9 \u2460"])
    assert (vocabulary.model, len(vocabulary.tokens), len(set(vocabulary.tokens))) == ("t5", 832, 832)
    assert vocabulary.types[:3] == [CONTROL, UNKNOWN, CONTROL]
    assert vocabulary.types[800:] == [UNUSED] * 32
    assert vocabulary.tokens[5:8] == [token for token, _ in unigram["model"]["vocab"][5:8]]
    assert vocabulary.scores[5:8] == [score for _, score in unigram["model"]["vocab"][5:8]]
    assert len(vocabulary.charsmap) > 200_000, "that of nmt_nfkc_cf, not the part of it in tokenizer.json"
    assert vocabulary.settings == dict.fromkeys(vocabulary.settings, True)
    assert vocabulary.specials["cls"] == 2


def test_a_wordpiece_vocabulary_marks_the_beginnings_of_words():
    raw = json.loads(wordpiece(WORDPIECE).to_str())
    raw["normalizer"] = {
        "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
        "lowercase": False,
    }  # fmt: skip
    check_vocabulary(raw)
    vocabulary = describe(raw, len(WORDPIECE) + 1, [])
    assert vocabulary.model == "bert"
    assert vocabulary.tokens[5:] == ["\u2581the", "\u2581model", "s", "\u2581learn", "ing", "\u2581s", "[unused11]"]
    assert vocabulary.types[-2:] == [NORMAL, UNUSED]
    assert vocabulary.settings == {"normalizer.lowercase": False, "normalizer.strip_accents": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "BPE"}}, "the tokenizer is BPE. llama.cpp knows such vocabularies by a list of hashes"),
        ({"model": {"type": "Unigram", "byte_fallback": True}}, "falls back to bytes"),
        ({"model": {"type": "WordPiece"}}, "does not split words as BERT's does"),
    ],
)
def test_vocabularies_that_llama_cpp_cannot_have_are_refused(unigram, changes, message):
    with pytest.raises(ValueError, match=message):
        check_vocabulary(unigram | changes | {"normalizer": None})


@pytest.fixture
def files(checkpoint, tmp_path, skipped_checks) -> Path:
    to_hf.export_checkpoint(checkpoint, tmp_path / "hf", to_hf.ExportOptions(targets=("gguf",)))
    return tmp_path / "hf"


@pytest.mark.serving
def test_the_files_hold_the_model(files):
    outcome = registry.read_outcomes(files)["gguf"]
    assert outcome["opened"]["difference"] <= 1e-4
    exact = gguf_file.read_file(files / "gguf/model-f32.gguf")
    for kind, tolerance in (("f16", 1e-3), ("q8_0", 2e-2)):
        rounded = gguf_file.read_file(files / f"gguf/model-{kind}.gguf")
        assert rounded.tensors.keys() == exact.tensors.keys()
        for name, tensor in exact.tensors.items():
            np.testing.assert_allclose(rounded.tensors[name], tensor, rtol=0, atol=tolerance)


def swap_halves(name: str, tensor: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(tensor, 2)[::-1]) if name.endswith("0.ffn_up.weight") else tensor


def change_weight(name: str, tensor: np.ndarray) -> np.ndarray:
    return tensor * np.float32(1.01) if name.endswith("1.attn_output.bias") else tensor


def shift_rows(name: str, tensor: np.ndarray) -> np.ndarray:
    return np.roll(tensor, 1, 0) if name == "token_embd.weight" else tensor


@pytest.mark.serving
@pytest.mark.parametrize("damage", [swap_halves, change_weight, shift_rows])
def test_damage_is_found(checkpoint, tmp_path, skipped_checks, monkeypatch, damage):
    quantize = gguf_file._quantize
    monkeypatch.setattr(
        gguf_file, "_quantize", lambda name, tensor, kind: quantize(name, damage(name, tensor).copy(), kind)
    )
    to_hf.export_checkpoint(checkpoint, tmp_path / "hf", to_hf.ExportOptions(targets=("gguf",)))
    assert "embeddings" in registry.read_outcomes(tmp_path / "hf")["gguf"]["failed"]
    assert not (tmp_path / "hf/gguf").exists()


@pytest.mark.serving
def test_a_bert_needs_llama_cpp_itself(corpus, tmp_path, skipped_checks, monkeypatch):
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    write_checkpoint(tmp_path / "run", small_model(**BERT), corpus.tokenizer)
    to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf", to_hf.ExportOptions(targets=("gguf",)))
    outcome = registry.read_outcomes(tmp_path / "hf")["gguf"]
    assert outcome["not_opened"].startswith("not opened here: needs llama-cpp-python")
    names = gguf_file.read_file(tmp_path / "hf/gguf/model-f32.gguf").tensors.keys()
    assert {"position_embd.weight", "encoder.layer.1.mlp.gated_layers.bias"} <= names
