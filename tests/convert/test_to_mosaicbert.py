"""Exports in the published MosaicBERT layout, and back without changing a bit."""

import json

import pytest
import torch

from megabert.convert import to_mosaicbert as module
from megabert.convert.from_hf import import_model, read_model
from megabert.convert.to_mosaicbert import export_mosaicbert
from megabert.model.modeling_megabert import MegaBertModel
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.folders import write_published_mosaicbert
from tests.convert.helpers.small_model import BERT, small_model


def test_published_to_ours_to_published_changes_no_bit(run_launcher, tmp_path):
    state = write_published_mosaicbert(tmp_path / "in")
    import_model(tmp_path / "in", tmp_path / "ours")
    done = run_launcher("convert_to_hf.py", tmp_path / "ours", tmp_path / "again", "--layout", "published")
    assert done.code == 0, done.output
    assert f"again: {len(state)} tensors in the published MosaicBERT layout, read back bit for bit" in done.output
    again = torch.load(tmp_path / "again" / "pytorch_model.bin", weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "again"))
    assert {name: after[name] for name in before.keys() - {"auto_map", "alibi_starting_size"}} == {
        name: before[name] for name in before.keys() - {"auto_map", "alibi_starting_size"}
    }
    assert after["auto_map"]["AutoModelForMaskedLM"] == "mosaicml/mosaic-bert-base--bert_layers.BertForMaskedLM"


def test_a_checkpoint_is_exported_with_its_tokenizer(corpus, tmp_path):
    model = small_model()
    write_checkpoint(tmp_path / "run", model, corpus.tokenizer, stage=3, world_size=2)
    assert export_mosaicbert(tmp_path / "run", tmp_path / "out").initialized == []
    back = read_model(tmp_path / "out")
    assert all(torch.equal(back.weights[name], parameter) for name, parameter in model.named_parameters())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (corpus.tokenizer / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="out: is not empty; choose another folder"):
        export_mosaicbert(tmp_path / "run", tmp_path / "out")


def test_other_architectures_are_refused_and_initialized_parameters_are_named(corpus, tmp_path):
    write_checkpoint(tmp_path / "run", small_model(**BERT), corpus.tokenizer)
    with pytest.raises(
        ValueError, match="has learned and gelu, but the published MosaicBERT layout supports only alibi and geglu"
    ):
        export_mosaicbert(tmp_path / "run", tmp_path / "out")
    small_model(cls=MegaBertModel).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="is a folder with one model; --average needs a run"):
        export_mosaicbert(tmp_path / "encoder", tmp_path / "out", average=2)
    assert "decoder.bias" in export_mosaicbert(tmp_path / "encoder", tmp_path / "out").initialized
    assert read_model(tmp_path / "out").initialized == []


def test_a_folder_that_does_not_read_back_is_removed(tmp_path, monkeypatch):
    small_model().save_pretrained(tmp_path / "in")
    from_megabert = module.from_megabert

    def changed(*given):
        state = from_megabert(*given)
        return state | {"cls.predictions.decoder.bias": state["cls.predictions.decoder.bias"] + 1}

    monkeypatch.setattr(module, "from_megabert", changed)
    with pytest.raises(ValueError, match=r"does not read back as it was written: decoder\.bias"):
        export_mosaicbert(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("no space left")))
    with pytest.raises(OSError, match="pytorch_model.bin: cannot be written: no space left"):
        export_mosaicbert(tmp_path / "in", tmp_path / "out")


def test_the_layout_is_one_file_without_onnx(run_launcher, tmp_path):
    done = run_launcher("convert_to_hf.py", tmp_path, tmp_path / "out", "--layout=published", "--onnx")
    assert done.code == 2
    assert "--layout published writes one pickle" in done.output
