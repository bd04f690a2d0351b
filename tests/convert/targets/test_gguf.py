"""GGUF files hold the model, llama.cpp or what stands for it computes its states, and damage is found."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep import train_tokenizer
from megabert.convert import to_hf
from megabert.convert.targets import compared_texts, registry
from megabert.convert.targets.llama import gguf_native, gguf_proof, gguf_writer
from megabert.convert.targets.llama.gguf_vocabulary import CONTROL, NORMAL, UNKNOWN, UNUSED, check_vocabulary, composes
from megabert.convert.targets.llama.gguf_vocabulary import describe_vocabulary as describe
from megabert.convert.targets.target import DiffersError, Proof
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.small_model import small_model
from tests.convert.helpers.wordpiece import WORDPIECE, wordpiece
from tests.model.helpers.architectures import ARCHITECTURES


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
        ({"model": {"type": "WordLevel"}}, "the tokenizer is WordLevel, which llama.cpp does not know"),
        ({"model": {"type": "BPE"}}, "does not split words into bytes as GPT-2's and ModernBERT's do"),
        ({"model": {"type": "Unigram", "byte_fallback": True}}, "falls back to bytes"),
        ({"model": {"type": "WordPiece"}}, "does not split words as BERT's does"),
    ],
)
def test_vocabularies_that_llama_cpp_cannot_have_are_refused(unigram, changes, message):
    with pytest.raises(ValueError, match=message):
        check_vocabulary(unigram | changes | {"normalizer": None})


BYTE_BPE: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": {"[UNK]": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"], "unk_token": "[UNK]"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "added_tokens": [],
}


def test_a_byte_level_vocabulary_keeps_its_merges():
    raw = BYTE_BPE | {"normalizer": {"type": "NFC"}}
    assert "ids are equal for texts that are composed already" in check_vocabulary(raw)[0]
    assert composes(raw)
    assert check_vocabulary(BYTE_BPE) == []
    assert not composes(BYTE_BPE)
    # As tokenizer.json may write them.
    for merges in (["a b"], [["a", "b"]]):
        vocabulary = describe(raw | {"model": raw["model"] | {"merges": merges}}, 5, [])
        assert (vocabulary.model, vocabulary.splits, vocabulary.merges) == ("gpt2", "modern-bert", ["a b"])
        assert vocabulary.tokens == ["[UNK]", "a", "b", "ab", "[unused4]"]
        assert vocabulary.types == [UNKNOWN, NORMAL, NORMAL, NORMAL, UNUSED]


def test_a_byte_level_vocabulary_without_case_is_refused():
    steps = [{"type": "NFC"}, {"type": "Lowercase"}]
    with pytest.raises(ValueError, match="normalizes texts by Lowercase, NFC, .* a tokenizer with --lowercase false"):
        check_vocabulary(BYTE_BPE | {"normalizer": {"type": "Sequence", "normalizers": steps}})


@pytest.fixture
def files(checkpoint, tmp_path, skipped_checks) -> Path:
    to_hf.export_checkpoint(checkpoint, tmp_path / "hf", to_hf.ExportOptions(targets=("gguf",)))
    return tmp_path / "hf"


@pytest.mark.serving
def test_the_files_hold_the_model(files):
    outcome = registry.read_outcomes(files)["gguf"]
    assert outcome["opened"]["difference"] <= 1e-4
    exact = gguf_proof.read_content(files / "gguf/model-f32.gguf")
    for kind, tolerance in (("f16", 1e-3), ("q8_0", 2e-2)):
        rounded = gguf_proof.read_content(files / f"gguf/model-{kind}.gguf")
        assert rounded.tensors.keys() == exact.tensors.keys()
        for name, tensor in exact.tensors.items():
            np.testing.assert_allclose(rounded.tensors[name], tensor, rtol=0, atol=tolerance)


@pytest.mark.serving
@pytest.mark.parametrize("content", [b"", b"GGU", b"GGUF\x03\0\0\0"])
def test_a_cut_file_is_named(content, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(content)
    with pytest.raises(DiffersError, match="cut.gguf cannot be read"):
        gguf_proof.read_content(tmp_path / "cut.gguf")


def swap_halves(name: str, tensor: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(tensor, 2)[::-1]) if name.endswith("0.ffn_up.weight") else tensor


def change_weight(name: str, tensor: np.ndarray) -> np.ndarray:
    return tensor * np.float32(1.01) if name.endswith(("1.attn_output.bias", "1.attn_output.weight")) else tensor


def shift_rows(name: str, tensor: np.ndarray) -> np.ndarray:
    return np.roll(tensor, 1, 0) if name == "token_embd.weight" else tensor


def query_for_key(name: str, tensor: np.ndarray) -> np.ndarray:
    return tensor[::-1] if name.endswith("0.attn_k.weight") else tensor


TENSOR_DAMAGES = {"a wrong weight": change_weight, "swapped halves": swap_halves, "shifted rows": shift_rows}
SETTING_DAMAGES = {
    "other slopes": ("add_head_count", lambda heads: heads - 1),
    "another pooling": ("add_pooling_type", lambda pooling: type(pooling)(pooling + 1)),
    "shifted ids": ("add_token_list", lambda tokens: [*tokens[:5], tokens[-1], *tokens[5:-1]]),
}


def damage_writer(monkeypatch, name: str, kinds=("f32", "f16", "q8_0")) -> None:
    """Let the files be written with an error: in a tensor of these kinds of files, or in a setting."""
    if name in SETTING_DAMAGES:
        import gguf

        method, change = SETTING_DAMAGES[name]
        add = getattr(gguf.GGUFWriter, method)
        monkeypatch.setattr(gguf.GGUFWriter, method, lambda self, value: add(self, change(value)))
        return
    quantize, change = gguf_writer._quantize, (TENSOR_DAMAGES | {"query for key": query_for_key})[name]

    def damaged(tensor_name: str, tensor: np.ndarray, kind: str) -> object:
        changed = change(tensor_name, tensor) if kind in kinds else tensor
        return quantize(tensor_name, np.ascontiguousarray(changed), kind)

    monkeypatch.setattr(gguf_writer, "_quantize", damaged)


def failure_of(checkpoint: Path, out: Path) -> str:
    to_hf.export_checkpoint(checkpoint, out, to_hf.ExportOptions(targets=("gguf",)))
    assert not (out / "gguf").exists()
    return registry.read_outcomes(out)["gguf"]["failed"]


@pytest.mark.serving
@pytest.mark.parametrize("name", [*TENSOR_DAMAGES, "other slopes", "another pooling"])
def test_damage_is_found_without_llama_cpp(checkpoint, tmp_path, skipped_checks, monkeypatch, name):
    monkeypatch.setattr(gguf_proof, "find_spec", lambda package: None)
    damage_writer(monkeypatch, name)
    expected = {"another pooling": "pooling_type is 2, expected 1"}
    assert expected.get(name, "embeddings of 200 texts by model-f32.gguf differ") in failure_of(
        checkpoint, tmp_path / "hf"
    )


# Of a MosaicBERT and of a ModernBERT: the method of GGUFWriter, what it gets instead, and the reason.
WRONG_SETTINGS = {
    "causal": ("add_causal_attention", lambda _: True, "attention.causal is True, expected False"),
    "context": ("add_context_length", lambda _: 3, "context_length is 3, expected"),
    "width of the MLP": ("add_feed_forward_length", lambda size: 2 * size, "has shape|tensors are not those"),
    "width": ("add_embedding_length", lambda size: 2 * size, "has shape|tensors are not those"),
    "fewer tokens": ("add_token_list", lambda tokens: tokens[:-50], "has shape|tensors are not those"),
}


@pytest.mark.serving
@pytest.mark.parametrize("architecture", ["mosaicbert", pytest.param("modernbert", marks=pytest.mark.nightly)])
def test_a_wrong_setting_is_found_without_llama_cpp(architecture, checkpoint, export_native, tmp_path, monkeypatch):
    import gguf

    monkeypatch.setattr(gguf_proof, "find_spec", lambda name: None)
    monkeypatch.setattr(compared_texts, "NUM_LINES", 200)
    base = tmp_path / "base"
    if architecture == "mosaicbert":
        with monkeypatch.context() as patch:
            patch.setattr(
                to_hf.export_check, "run_in_subprocess", lambda _: {"max_difference": 0.0, "transformers": "0"}
            )
            to_hf.export_checkpoint(checkpoint, base, to_hf.ExportOptions(targets=("sentence-transformers",)))
    else:
        shutil.copytree(export_native(architecture), base)
    for name, (method, change, reason) in WRONG_SETTINGS.items():
        folder = shutil.copytree(base, tmp_path / name)
        with monkeypatch.context() as patch:
            add = getattr(gguf.GGUFWriter, method)
            patch.setattr(gguf.GGUFWriter, method, lambda self, value, add=add, change=change: add(self, change(value)))
            assert re.search(reason, registry.write_targets(folder, ("gguf",))["gguf"]["failed"]), name


@pytest.mark.serving
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_damage_in_a_rounded_file_is_found(checkpoint, tmp_path, skipped_checks, monkeypatch, kind):
    damage_writer(monkeypatch, "a wrong weight", kinds=(kind,))
    reason = failure_of(checkpoint, tmp_path / "hf")
    assert f"model-{kind}.gguf: blk.1.attn_output." in reason
    assert "more than rounding does" in reason


@pytest.fixture
def sharp(corpus, tmp_path) -> Path:
    """A checkpoint with large weights: with small ones keys hardly matter, and the GLU's halves are nearly alike."""
    model = small_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.qkv.weight", "mlp.up.weight")):
                parameter.mul_(5)
    write_checkpoint(tmp_path / "run", model, corpus.tokenizer)
    return tmp_path / "run"


@pytest.mark.llama_cpp
@pytest.mark.serving
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["swapped halves", "query for key", "shifted rows", *SETTING_DAMAGES])
def test_llama_cpp_finds_what_only_it_can_see(sharp, tmp_path, skipped_checks, monkeypatch, name):
    """The other half of the proof counts as passed here, as if llama.cpp read the file in another way."""
    passed = Proof("a port", "1", 0.0, "")
    monkeypatch.setattr(gguf_proof, "_prove_by_port", lambda content, expected, length: passed)
    monkeypatch.setattr(compared_texts, "NUM_TEXTS", 200)
    monkeypatch.setattr(compared_texts, "NUM_LINES", 300)
    damage_writer(monkeypatch, name)
    expected = {"shifted ids": "of 300 lines have other ids"}
    assert expected.get(name, "texts by model-f32.gguf") in failure_of(sharp, tmp_path / "hf")


@pytest.mark.llama_cpp
@pytest.mark.serving
@pytest.mark.nightly
def test_llama_cpps_own_message_is_shown(checkpoint, tmp_path, skipped_checks, monkeypatch):
    """llama.cpp stops the process when it finds an error, and by default prints a stack of calls after the message."""
    monkeypatch.setattr(gguf_proof, "CONTEXT", 100)
    monkeypatch.setattr(compared_texts, "LONGEST", 290)
    options = to_hf.ExportOptions(targets=("gguf",), max_length=290)
    to_hf.export_checkpoint(checkpoint, tmp_path / "hf", options)
    assert "cannot be opened" in (reason := registry.read_outcomes(tmp_path / "hf")["gguf"]["failed"])
    assert "GGML_ASSERT" in reason


@pytest.fixture(params=["bert", "roberta", "distilbert", "electra", "modernbert"])
def native(request, export_native, tmp_path, monkeypatch) -> Path:
    """An export of a model that transformers has, too, without the target. llama.cpp counts as missing."""
    monkeypatch.setattr(gguf_proof, "find_spec", lambda name: None)
    monkeypatch.setattr(compared_texts, "NUM_LINES", 200)
    return shutil.copytree(export_native(request.param), tmp_path / "hf")


@pytest.mark.serving
def test_transformers_own_model_computes_the_same_with_what_the_file_holds(native, monkeypatch):
    outcome = registry.write_targets(native, ("gguf",))["gguf"]
    assert outcome["opened"]["program"] == "transformers' own model in fp64, not llama.cpp itself,"
    assert outcome["opened"]["difference"] <= 1e-5
    content = gguf_proof.read_content(native / "gguf/model-f32.gguf")
    assert content.tensors["token_embd.weight"].shape == (832, 24)
    expected = compared_texts.read_expected(native, 40)
    least = {"rope.freq_base": 1e3, "rope.freq_base_swa": 1e3, "attention.sliding_window": 2}
    settings = least if content.architecture == "modern-bert" else {"attention.layer_norm_epsilon": 1e-2}
    for name, value in settings.items():
        assert name in content.settings
        wrong = content._replace(settings=content.settings | {name: value})
        pooled = gguf_native.embed(wrong, expected.ids[:20])
        assert np.abs(pooled - expected.pooled[:20]).max() > gguf_proof.TOLERANCE, name
    for name in TENSOR_DAMAGES:
        with monkeypatch.context() as patch:
            damage_writer(patch, name)
            shutil.rmtree(native / "gguf", ignore_errors=True)
            assert "differ by" in registry.write_targets(native, ("gguf",))["gguf"]["failed"]
        assert not (native / "gguf").exists()


@pytest.mark.serving
@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_a_model_for_shorter_texts_than_its_positions_has_the_positions_of_its_context(
    architecture, corpus, tmp_path, skipped_checks, monkeypatch
):
    monkeypatch.setattr(gguf_proof, "find_spec", lambda name: None)
    monkeypatch.setattr(compared_texts, "NUM_LINES", 200)
    monkeypatch.setattr(compared_texts, "NUM_TEXTS", 200)
    model = small_model(**ARCHITECTURES[architecture] | {"num_attention_heads": 2})
    write_checkpoint(tmp_path / "run", model, corpus.tokenizer)
    to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf", to_hf.ExportOptions(targets=("gguf",), max_length=20))
    assert registry.read_outcomes(tmp_path / "hf")["gguf"]["opened"]["difference"] <= 1e-5
    content = gguf_proof.read_content(tmp_path / "hf/gguf/model-f32.gguf")
    assert content.settings["context_length"] == len(content.tensors[gguf_writer.POSITIONS]) == 20 < 40


@pytest.mark.llama_cpp
@pytest.mark.serving
@pytest.mark.nightly
@pytest.mark.parametrize("model", ["byte_bpe", "unigram", "wordpiece"])
@pytest.mark.parametrize("architecture", ["mosaicbert", "bert", "roberta", "distilbert", "modernbert"])
def test_llama_cpp_gives_our_ids_and_embeddings(architecture, model, corpus, tmp_path, skipped_checks):
    train_tokenizer.main(
        [f"--source={corpus.jsonl}", f"--out={tmp_path / 'tokenizer'}", "--vocab_size=800", f"--model={model}"]
        + ["--lowercase=false"] * (model == "byte_bpe")
    )
    changes = {"num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 300}
    write_checkpoint(tmp_path / "run", small_model(**ARCHITECTURES[architecture] | changes), tmp_path / "tokenizer")
    options = to_hf.ExportOptions(targets=("gguf",), max_length=300)
    to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf", options)
    outcome = registry.read_outcomes(tmp_path / "hf")["gguf"]
    assert outcome["opened"]["program"] == "llama.cpp by llama-cpp-python", outcome
    assert outcome["opened"]["difference"] <= 1e-4
    assert "the ids of 10,000 lines are equal" in outcome["opened"]["measure"]
