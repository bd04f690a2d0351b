"""Exports in the published MosaicBERT layout, and back without changing a bit."""

import json

import pytest
import torch

from megabert.convert import to_mosaicbert as module
from megabert.convert.from_hf import MLM_HEAD, ImportOptions, import_model, read_model
from megabert.convert.to_mosaicbert import export_mosaicbert
from megabert.model.modeling_megabert import (
    MegaBertForMultipleChoice,
    MegaBertForQuestionAnswering,
    MegaBertForSequenceClassification,
    MegaBertForTokenClassification,
    MegaBertModel,
)
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
    assert export_mosaicbert(tmp_path / "run", tmp_path / "out").missing == []
    back = read_model(tmp_path / "out")
    assert all(torch.equal(back.weights[name], parameter) for name, parameter in model.named_parameters())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (corpus.tokenizer / "tokenizer.json").read_bytes()
    assert export_mosaicbert(tmp_path / "run", tmp_path / "out").reused
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out: is not empty, and not this export; choose another folder"):
        export_mosaicbert(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_what_the_published_code_would_compute_differently_is_refused(tmp_path):
    small_model(layer_norm_eps=1e-5).save_pretrained(tmp_path / "eps")
    with pytest.raises(ValueError, match="eps: has layer_norm_eps 1e-05, but the published MosaicBERT's head always"):
        export_mosaicbert(tmp_path / "eps", tmp_path / "out")
    small_model(cls=MegaBertForSequenceClassification, classifier_pooling="mean").save_pretrained(tmp_path / "mean")
    with pytest.raises(ValueError, match="mean: its classifier pools the mean of all tokens, but .* the first token"):
        export_mosaicbert(tmp_path / "mean", tmp_path / "out")
    small_model(embedding_neighbors=1).save_pretrained(tmp_path / "mixed")
    with pytest.raises(ValueError, match="mixed: has embedding_neighbors 1, but the published .* supports only 0"):
        export_mosaicbert(tmp_path / "mixed", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eps", "mean", "mixed"]


@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        (MegaBertForTokenClassification, "tokens"),
        (MegaBertForMultipleChoice, "choices"),
        (MegaBertForQuestionAnswering, "answers"),
    ],
)
def test_a_head_that_the_published_code_lacks_is_refused(tmp_path, cls, kind):
    small_model(cls=cls).save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match=f"in: has a head for {kind}, but the published MosaicBERT has heads for mask"):
        export_mosaicbert(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_head_that_nothing_has_trained_is_left_out_and_named_directly_and_after_an_import(run_launcher, tmp_path):
    """Whoever reads the folder finds out too, which a head of random numbers would hide."""
    classifier = small_model(cls=MegaBertForSequenceClassification, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    import_model(tmp_path / "classifier", tmp_path / "imported", ImportOptions(seed=5))
    for source in ("classifier", "imported"):
        done = run_launcher("convert_to_hf.py", tmp_path / source, tmp_path / f"{source}-out", "--layout", "published")
        assert done.code == 0, done.output
        assert "not in the original source, and not there: transform.dense.weight, " in done.output
        assert "and not here: transform.dense.weight" in (tmp_path / f"{source}-out" / "README.md").read_text()
        config = json.loads((tmp_path / f"{source}-out" / "config.json").read_text())
        assert config["architectures"] == ["BertForSequenceClassification"]
        assert sorted(read_model(tmp_path / f"{source}-out").initialized) == sorted(MLM_HEAD)
        state = torch.load(tmp_path / f"{source}-out" / "pytorch_model.bin", weights_only=True)
        weights = classifier.state_dict()
        assert torch.equal(state["classifier.weight"], weights["classifier.weight"])
        assert torch.equal(state["bert.pooler.dense.bias"], weights["pre_classifier.dense.bias"])
        assert not any(name.startswith(("pre_classifier", "cls.")) for name in state)


def test_the_longest_text_of_an_export_is_chosen_with_a_flag(run_launcher, corpus, tmp_path):
    write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer)
    for flags, length in (((), 512), (("--max-length", "2048"), 2048), (("--max-length", "64"), 64)):
        out = tmp_path / f"{length}"
        done = run_launcher("convert_to_hf.py", tmp_path / "run", out, "--layout", "published", *flags)
        assert done.code == 0, done.output
        assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == length
        assert json.loads((out / "config.json").read_text())["alibi_starting_size"] == length


def test_other_architectures_are_refused_and_initialized_parameters_are_named(corpus, tmp_path):
    write_checkpoint(tmp_path / "run", small_model(**BERT), corpus.tokenizer)
    with pytest.raises(
        ValueError, match="has learned and gelu, but the published MosaicBERT layout supports only alibi and geglu"
    ):
        export_mosaicbert(tmp_path / "run", tmp_path / "out")
    small_model(cls=MegaBertModel).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="is a folder with one model; --average needs a run"):
        export_mosaicbert(tmp_path / "encoder", tmp_path / "out", average=2)
    assert export_mosaicbert(tmp_path / "encoder", tmp_path / "out").missing == MLM_HEAD
    assert sorted(read_model(tmp_path / "out").initialized) == sorted(MLM_HEAD)


def test_a_folder_that_does_not_read_back_is_removed(tmp_path, monkeypatch):
    small_model().save_pretrained(tmp_path / "in")
    from_megabert = module.from_megabert

    def changed(*given):
        state = from_megabert(*given)
        return state | {"cls.predictions.decoder.bias": state["cls.predictions.decoder.bias"] + 1}

    monkeypatch.setattr(module, "from_megabert", changed)
    with pytest.raises(ValueError, match=r"/out: does not read back as it was written: decoder\.bias"):
        export_mosaicbert(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("no space left")))
    message = "/out/pytorch_model.bin: cannot be written: no space left. If the disk is full, free"
    with pytest.raises(OSError, match=message):
        export_mosaicbert(tmp_path / "in", tmp_path / "out")


def test_the_layout_is_one_file_without_other_targets(run_launcher, tmp_path):
    done = run_launcher("convert_to_hf.py", tmp_path, tmp_path / "out", "--layout=published", "--for=onnx")
    assert done.code == 2
    assert "--layout published writes one pickle" in done.output
