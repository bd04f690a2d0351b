"""The programs themselves: sentence-transformers, llama.cpp and transformers.js, which most machines lack."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from data_prep import train_tokenizer
from megabert.convert import to_hf
from megabert.convert.targets import js_normalizer, registry, sentence_transformers, transformers_js
from megabert.convert.targets.compared_texts import make_texts, read_expected, read_tokenizer
from megabert.convert.targets.target import DiffersError, NotOpened, Proof
from tests.convert.helpers.architecture_targets import TARGETS_OF
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.small_model import small_model
from tests.model.helpers.architectures import ARCHITECTURES


def lines_with_ids(tokenizer):
    lines = make_texts(tokenizer, 300, 64)
    return [(line, tokenizer.encode(line).ids) for line in lines]


@pytest.fixture
def raw(corpus) -> dict:
    return json.loads((corpus.tokenizer / "tokenizer.json").read_text())


def test_a_map_of_characters_becomes_explicit_steps_with_the_same_ids(corpus, raw, monkeypatch):
    """For the first characters of Unicode; the nightly test takes all."""
    monkeypatch.setattr(js_normalizer, "_characters", lambda: [chr(code) for code in range(1, 0x600)])
    check_steps(corpus, raw)


@pytest.mark.nightly
def test_every_character_has_the_same_ids(corpus, raw):
    check_steps(corpus, raw)


def check_steps(corpus, raw):
    lines = lines_with_ids(read_tokenizer(corpus.tokenizer, 512))
    new = js_normalizer.to_js_tokenizer(raw)
    steps = new["normalizer"]["normalizers"]
    assert {"type": "Lowercase"} in steps
    assert "Precompiled" not in {step["type"] for step in steps}
    js_normalizer.check_same_ids(raw, new, lines)
    without = [step for step in steps if step["type"] != "Lowercase"]
    with pytest.raises(DiffersError, match="the normalizer cannot be written in steps that JavaScript has"):
        js_normalizer.check_same_ids(raw, new | {"normalizer": new["normalizer"] | {"normalizers": without}}, lines)


@pytest.mark.parametrize("normalizer", [{"type": "Lowercase"}, {"type": "BertNormalizer", "lowercase": True}])
def test_a_tokenizer_without_a_map_lowers_sigma_before_javascript_does(raw, normalizer):
    """Which makes another letter of it at the end of a word."""
    bert = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
    plain = raw | {"normalizer": normalizer | (bert if len(normalizer) > 1 else {})}
    new = js_normalizer.to_js_tokenizer(plain)
    assert [step["type"] for step in new["normalizer"]["normalizers"]] == ["Replace", normalizer["type"]]
    before, after = (Tokenizer.from_str(json.dumps(content)).normalizer.normalize_str for content in (plain, new))
    for text in ("\u039f\u03a3 \u03a3\u039f", "I\u0307 \u0130 THE \u00c9", "A"):
        assert after(text) == before(text)
    assert "\u03c2" not in after("\u039f\u03a3")


@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}, {"type": "BertNormalizer", "lowercase": False}])
def test_a_tokenizer_that_keeps_case_stays_as_it_is(raw, normalizer):
    plain = raw | {"normalizer": normalizer}
    assert js_normalizer.to_js_tokenizer(plain) is plain


def test_what_is_missing_is_named(served, monkeypatch):
    monkeypatch.setattr(sentence_transformers, "find_spec", lambda name: None)
    monkeypatch.setattr(transformers_js, "find_node", lambda: None)
    for module, needs in ((sentence_transformers, "megabert[serving]"), (transformers_js, "Node.js, and npm install")):
        outcome = module.prove(served, None)
        assert isinstance(outcome, NotOpened)
        assert needs in outcome.needs


@pytest.mark.serving
@pytest.mark.nightly
def test_sentence_transformers_gives_our_embeddings_and_finds_another_pooling(
    served, checkpoint, tmp_path, monkeypatch
):
    expected = read_expected(served, registry.read_max_length(served))
    target = registry.TARGETS["sentence-transformers"]
    to_hf.export_checkpoint(checkpoint, tmp_path / "hf", to_hf.ExportOptions(targets=(target.name,)))
    proof = target.prove(tmp_path / "hf", expected)
    assert isinstance(proof, Proof)
    assert proof.difference <= sentence_transformers.TOLERANCE

    def write(source, folder):
        wrote = target.write(source, folder)
        pooling = json.loads((folder / "1_Pooling/config.json").read_text())
        pooling |= {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
        return wrote

    monkeypatch.setitem(registry.TARGETS, target.name, replace(target, write=write))
    to_hf.export_checkpoint(checkpoint, tmp_path / "other", to_hf.ExportOptions(targets=(target.name,)))
    assert "embeddings of 1,000 texts differ by" in registry.read_outcomes(tmp_path / "other")[target.name]["failed"]
    assert not (tmp_path / "other/modules.json").exists()


def keep_case(raw):
    new = js_normalizer.to_js_tokenizer(raw)
    steps = [step for step in new["normalizer"]["normalizers"] if step["type"] != "Lowercase"]
    return new | {"normalizer": {"type": "Sequence", "normalizers": steps}}


@pytest.mark.node
@pytest.mark.nightly
def test_transformers_js_gives_our_ids_words_and_embeddings(checkpoint, tmp_path, skipped_checks, monkeypatch):
    options = to_hf.ExportOptions(targets=("onnx", "transformers.js"))
    to_hf.export_checkpoint(checkpoint, tmp_path / "hf", options)
    outcome = registry.read_outcomes(tmp_path / "hf")["transformers.js"]
    assert outcome["opened"]["program"] == "transformers.js", outcome
    monkeypatch.setattr(transformers_js, "to_js_tokenizer", keep_case)
    monkeypatch.setattr(transformers_js, "check_same_ids", lambda *_: None)
    to_hf.export_checkpoint(checkpoint, tmp_path / "other", options)
    assert "lines have other ids" in registry.read_outcomes(tmp_path / "other")["transformers.js"]["failed"]
    assert not (tmp_path / "other/transformers.js").exists()


@pytest.mark.serving
@pytest.mark.llama_cpp
@pytest.mark.node
@pytest.mark.nightly
@pytest.mark.parametrize("model", ["byte_bpe", "unigram", "wordpiece"])
@pytest.mark.parametrize("architecture", TARGETS_OF)
def test_every_program_opens_every_architecture(architecture, model, corpus, tmp_path, skipped_checks):
    """int8 needs models of a usual width, and weights of a usual size: with larger ones it costs more.

    They cost a simulation of the same rounding in torch as much, so no fault hides in the smaller ones.
    """
    train_tokenizer.main(
        [f"--source={corpus.jsonl}", f"--out={tmp_path / 'tokenizer'}", "--vocab_size=800", f"--model={model}"]
        + ["--lowercase=false"] * (model == "byte_bpe")
    )
    changes = {"num_attention_heads": 4, "hidden_size": 256, "intermediate_size": 256, "max_position_embeddings": 300}
    weights = small_model(**ARCHITECTURES[architecture] | changes)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.mul_(0.4 if parameter.dim() > 1 else 1)
    write_checkpoint(tmp_path / "run", weights, tmp_path / "tokenizer")
    targets = TARGETS_OF[architecture]
    to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf", to_hf.ExportOptions(targets=targets, max_length=300))
    outcomes = registry.read_outcomes(tmp_path / "hf")
    assert {name for name, outcome in outcomes.items() if "opened" in outcome} == set(targets), outcomes
    if "gguf" in targets:
        assert outcomes["gguf"]["opened"]["program"] == "llama.cpp by llama-cpp-python"


REFUSED = [
    (architecture, name) for architecture in TARGETS_OF for name in {*registry.TARGETS} - {*TARGETS_OF[architecture]}
]


@pytest.mark.parametrize(("architecture", "name"), sorted(REFUSED))
def test_what_a_program_cannot_compute_is_refused_before_anything_is_written(architecture, name):
    with pytest.raises(ValueError, match=f"--for {name}: .* Leave {name} out"):
        registry.TARGETS[name].check(small_model(**ARCHITECTURES[architecture]).config, {}, 40)
