"""ours -> the published MosaicBERT layout, by the command, and there and back without a changed bit."""

import json
import sys

import pytest
import torch

from megabert.convert import to_mosaicbert as module
from megabert.convert.from_hf import convert, read
from megabert.convert.to_mosaicbert import publish
from megabert.model.modeling_megabert import MegaBertModel
from tests.conftest import run_command
from tests.convert.checkpoints import write_checkpoint
from tests.convert.small import BERT, small_model
from tests.convert.test_from_hf import published_mosaicbert

LAUNCHER = [sys.executable, "launch/convert_to_hf.py"]


def test_published_to_ours_to_published_changes_no_bit(tmp_path):
    state = published_mosaicbert(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "ours")
    done = run_command([*LAUNCHER, str(tmp_path / "ours"), str(tmp_path / "again"), "--layout", "published"])
    assert done.code == 0, done.output
    assert f"again: {len(state)} tensors of the published MosaicBERT, read back bit for bit" in done.output
    again = torch.load(tmp_path / "again" / "pytorch_model.bin", weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "again"))
    assert {name: after[name] for name in before.keys() - {"auto_map", "alibi_starting_size"}} == {
        name: before[name] for name in before.keys() - {"auto_map", "alibi_starting_size"}
    }
    assert after["auto_map"]["AutoModelForMaskedLM"] == "mosaicml/mosaic-bert-base--bert_layers.BertForMaskedLM"


def test_a_checkpoint_is_published_with_its_tokenizer(corpus, tmp_path):
    model = small_model()
    write_checkpoint(tmp_path / "run", model, corpus.tokenizer, stage=3, world_size=2)
    assert publish(tmp_path / "run", tmp_path / "out").initialized == []
    back = read(tmp_path / "out")
    assert all(torch.equal(back.weights[name], parameter) for name, parameter in model.named_parameters())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (corpus.tokenizer / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="out: is not empty; choose another folder"):
        publish(tmp_path / "run", tmp_path / "out")


def test_what_the_layout_cannot_hold_is_refused_and_what_was_missing_is_named(corpus, tmp_path):
    write_checkpoint(tmp_path / "run", small_model(**BERT), corpus.tokenizer)
    with pytest.raises(ValueError, match="is learned and gelu, and the published layout holds alibi and geglu only"):
        publish(tmp_path / "run", tmp_path / "out")
    small_model(cls=MegaBertModel).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="is a folder with one model; --average is for a run's checkpoints"):
        publish(tmp_path / "encoder", tmp_path / "out", average=2)
    assert "decoder.bias" in publish(tmp_path / "encoder", tmp_path / "out").initialized
    assert read(tmp_path / "out").initialized == []


def test_what_does_not_read_back_is_removed(tmp_path, monkeypatch):
    small_model().save_pretrained(tmp_path / "in")
    written = module.to_published

    def other(*given):
        state = written(*given)
        return state | {"cls.predictions.decoder.bias": state["cls.predictions.decoder.bias"] + 1}

    monkeypatch.setattr(module, "to_published", other)
    with pytest.raises(ValueError, match=r"does not read as what was written: decoder\.bias"):
        publish(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("no space left")))
    with pytest.raises(OSError, match="pytorch_model.bin: cannot be written: no space left"):
        publish(tmp_path / "in", tmp_path / "out")


def test_the_layout_is_one_file_and_no_onnx(tmp_path):
    done = run_command([*LAUNCHER, str(tmp_path), str(tmp_path / "out"), "--layout=published", "--onnx"])
    assert done.code == 2
    assert "--layout published is one pickle" in done.output
