"""Folders of others: what is read, named, refused, and never executed."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

from megabert.convert.from_hf import Change, convert, read
from megabert.convert.weight_names import to_published, translate
from megabert.model.modeling_megabert import (
    MegaBertForMaskedLM,
    MegaBertForQuestionAnswering,
    MegaBertForSequenceClassification,
    MegaBertModel,
)
from tests.conftest import pretrain_command, run_command
from tests.convert.small import SHAPE, small_model
from tests.convert.test_zero import Evil

HEAD = [
    "decoder.bias",
    "transform.dense.bias",
    "transform.dense.weight",
    "transform.norm.bias",
    "transform.norm.weight",
]


def published_mosaicbert(folder: Path, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """A folder as it was published: one pickle, and the config that names BERT."""
    folder.mkdir()
    state = to_published(small_model().state_dict(), "mosaicbert")
    torch.save(state | more, folder / "pytorch_model.bin")
    config = SHAPE | {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_act": "gelu"}
    config |= {"alibi_starting_size": 512, "auto_map": {"AutoModelForMaskedLM": "bert_layers.BertForMaskedLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    return state


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_published_mosaicbert_comes_back_bitwise(tmp_path):
    state = published_mosaicbert(tmp_path / "in")
    model = convert(tmp_path / "in", tmp_path / "out")
    assert model.initialized == model.left_out == []
    assert (model.config.position, model.config.ffn, model.config.layer_norm_dtype) == ("alibi", "geglu", "bfloat16")
    again = to_published(load_file(tmp_path / "out" / "model.safetensors"), "mosaicbert")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    loaded, info = MegaBertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ids = torch.randint(5, 800, (2, 9))
    assert torch.equal(loaded.eval()(ids).logits, small_model().eval()(ids).logits)


@pytest.mark.parametrize(
    ("cls", "missing", "left_out"),
    [
        (BertModel, HEAD, []),
        (BertForMaskedLM, [], []),
        (BertForPreTraining, [], ["cls.seq_relationship.bias", "cls.seq_relationship.weight"]),
        (BertForSequenceClassification, HEAD, []),
        (BertForQuestionAnswering, HEAD, []),
    ],
)
def test_bert_with_any_head_is_read_and_says_what_it_lacks(tmp_path, cls, missing, left_out):
    labels = {0: "a", 1: "b"} if cls is BertForQuestionAnswering else {0: "a", 1: "b", 2: "c"}
    theirs = cls(BertConfig(**SHAPE, id2label=labels)).eval()
    theirs.save_pretrained(tmp_path / "in")
    model = convert(tmp_path / "in", tmp_path / "out")
    assert sorted(model.initialized) == missing
    assert model.left_out == left_out
    ids = torch.randint(5, 800, (2, 9))
    heads = {
        BertModel: (MegaBertModel, "last_hidden_state"),
        BertForMaskedLM: (MegaBertForMaskedLM, "logits"),
        BertForPreTraining: (MegaBertForMaskedLM, "prediction_logits"),
        BertForSequenceClassification: (MegaBertForSequenceClassification, "logits"),
        BertForQuestionAnswering: (MegaBertForQuestionAnswering, "start_logits"),
    }
    ours, output = heads[cls]
    with torch.no_grad():
        got = ours.from_pretrained(tmp_path / "out").eval()(ids)
        expected = theirs(ids)[output]
    torch.testing.assert_close(got[output.replace("prediction_", "")], expected, rtol=0, atol=1e-5)
    if cls is BertForSequenceClassification:
        assert model.config.id2label == labels
    if cls is BertModel:
        pooled = MegaBertModel.from_pretrained(tmp_path / "out").eval()(ids).pooler_output
        torch.testing.assert_close(pooled, theirs(ids).pooler_output, rtol=0, atol=1e-5)


def test_old_names_of_layer_norm_and_buffers_are_understood():
    state = to_published(small_model(position="learned", ffn="gelu").state_dict(), "bert")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(40)[None]
    assert translate(old, "bert").weights.keys() == translate(state, "bert").weights.keys()


def test_our_own_folder_is_read_as_it_is_and_the_launcher_names_what_is_missing(tmp_path):
    model = small_model(cls=MegaBertModel)
    model.save_pretrained(tmp_path / "in")
    command = [sys.executable, "launch/convert_from_hf.py", str(tmp_path / "in"), str(tmp_path / "out")]
    done = run_command(command)
    assert done.code == 0, done.output
    assert "initialized, for the folder lacks them: transform.dense.weight, transform.dense.bias" in done.output
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weights[f"bert.{name}"], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="out: is not empty; choose another folder"):
        convert(tmp_path / "in", tmp_path / "out")


def test_untied_embeddings_of_our_own_are_refused(tmp_path):
    small_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    untied = weights["bert.embeddings.word_embeddings.weight"] + 1
    save_file(weights | {"decoder.weight": untied}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="decoder.weight differs from bert.embeddings.word_embeddings.weight"):
        read(tmp_path)


def test_pretraining_continues_from_the_folder(corpus, tmp_path):
    """With a learning rate of nearly nothing, the first checkpoint is the folder."""
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    small_model(**shape).save_pretrained(tmp_path / "in")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in" / name).write_bytes((corpus.tokenizer / name).read_bytes())
    convert(tmp_path / "in", tmp_path / "start")
    settings = [f"--model.init_from={tmp_path / 'start'}", "--run.max_steps=1", "--optimizer.lr=1e-30"]
    done = run_command(pretrain_command(corpus, tmp_path / "run", *settings))
    assert done.code == 0, done.output
    from megabert.convert.zero import read_checkpoint

    weights, _, _ = read_checkpoint(tmp_path / "run")
    start = load_file(tmp_path / "start" / "model.safetensors")
    assert all(torch.equal(weights[name], start[name]) for name in weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "its weights have 2 layers, its config.json says 3"),
        ({"hidden_size": 48}, r"word_embeddings.weight is \(832, 24\), its config.json says \(832, 48\)"),
        ({"vocab_size": 800}, r"word_embeddings.weight is \(832, 24\), its config.json says \(800, 24\)"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000, expected a number from 1 to 65,536"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a number from 1 to 1,000"),
        (
            {"vocab_size": 10_000_000, "hidden_size": 60_000},
            r"is \(832, 24\), its config.json says \(10000000, 60000\)",
        ),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"hidden_size": "24"}, "hidden_size is '24'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; this model has 'gelu' only"),
        ({"is_decoder": True}, "is_decoder is True; this model has False only"),
        ({"layer_norm_eps": "tiny"}, "config.json: model config: layer_norm_eps is 'tiny', expected a number"),
        ({"hidden_dropout_prob": 7}, "hidden_dropout_prob is 7, expected a number from 0 to 1"),
        ({"pad_token_id": 832}, "pad_token_id is 832, expected one of the 832 rows"),
        ({"id2label": {"yes": "1"}}, "id2label has the keys yes, expected numbers"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2', expected 'bert' or 'megabert'"),
    ],
)
def test_a_config_that_does_not_fit_fails_naming_both(tmp_path, changes, message):
    published_mosaicbert(tmp_path / "in")
    edit(tmp_path / "in" / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_relative_positions_and_a_config_without_sizes_are_refused(tmp_path):
    BertModel(BertConfig(**SHAPE)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(tmp_path / "config.json", position_embedding_type="relative_key")
    with pytest.raises(
        ValueError, match="position_embedding_type is 'relative_key'; this model has absolute ones only"
    ):
        read(tmp_path)
    del config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not say num_attention_heads"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "part.bin"])
def test_a_pickle_in_a_weights_file_is_never_executed(tmp_path, name):
    witness = tmp_path / "witness"
    published_mosaicbert(tmp_path / "in", evil=Evil(str(witness)))
    if name == "part.bin":
        os.rename(tmp_path / "in" / "pytorch_model.bin", tmp_path / "in" / name)
        index = {"weight_map": {"bert.embeddings.word_embeddings.weight": name}}
        (tmp_path / "in" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{name}: is not a file of tensors alone, and was not read"):
        convert(tmp_path / "in", tmp_path / "out")
    assert not witness.exists()


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin", 7])
def test_an_index_cannot_lead_out_of_the_folder(tmp_path, file):
    published_mosaicbert(tmp_path / "in")
    save_file({"x": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = {"weight_map": {"x": file}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "in" / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="expected one directly in this folder|has no weight_map"):
        read(tmp_path / "in")


def test_a_link_cannot_lead_out_of_the_folder_but_the_hubs_cache_is_made_of_links(tmp_path):
    published_mosaicbert(tmp_path / "in")
    weights = tmp_path / "in" / "pytorch_model.bin"
    (tmp_path / "elsewhere").mkdir()
    weights.rename(tmp_path / "elsewhere" / "secret")
    weights.symlink_to(tmp_path / "elsewhere" / "secret")
    with pytest.raises(ValueError, match="is a link to .*secret, outside its folder"):
        read(tmp_path / "in")
    hub = tmp_path / "models--x"
    (hub / "snapshots").mkdir(parents=True)
    (tmp_path / "in").rename(hub / "snapshots" / "0123")
    (tmp_path / "elsewhere").rename(hub / "blobs")
    weights = hub / "snapshots" / "0123" / "pytorch_model.bin"
    weights.unlink()
    weights.symlink_to("../../blobs/secret")
    assert read(hub / "snapshots" / "0123").left_out == []


def test_weights_that_are_not_finite_and_tokenizers_that_do_not_fit_are_refused(tmp_path):
    published_mosaicbert(tmp_path / "in")
    (tmp_path / "in" / "vocab.txt").write_text("".join(f"piece{number}\n" for number in range(897)))
    with pytest.raises(ValueError, match=r"vocab.txt: has no \[CLS\] and no \[SEP\] and no \[UNK\]"):
        convert(tmp_path / "in", tmp_path / "out")
    with open(tmp_path / "in" / "vocab.txt", "a") as file:
        file.write("[UNK]\n[CLS]\n[SEP]\n")
    with pytest.raises(ValueError, match="its tokenizer has the id 899, its model only 832 rows"):
        convert(tmp_path / "in", tmp_path / "out")
    path = tmp_path / "in" / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    weights["bert.encoder.layer.1.mlp.wo.bias"][3] = torch.inf
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down\.bias has values that are not finite"):
        read(tmp_path / "in")


def test_damaged_and_lying_files_are_refused(tmp_path):
    published_mosaicbert(tmp_path / "in")
    huge = torch.zeros(1).expand(10**7, 10**6)  # one number that says it is 40 TB
    torch.save({"bert.embeddings.word_embeddings.weight": huge}, tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than the file holds"):
        read(tmp_path / "in")
    torch.save([1, 2], tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds something else than tensors by name"):
        read(tmp_path / "in")
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    (tmp_path / "in" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
        read(tmp_path / "in")
    save_file({"bert.x": torch.zeros(3, dtype=torch.int64)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ValueError, match="bert.x is torch.int64, expected floating-point weights"):
        read(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    (tmp_path / "in" / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors and no pytorch_model.bin"):
        read(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        read(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read(tmp_path / "in")


def test_a_changed_length_keeps_short_texts_as_they_are(tmp_path):
    model = small_model(position="learned", ffn="gelu").eval()
    model.save_pretrained(tmp_path / "in")
    ids = torch.randint(5, 800, (2, 25))
    for length in (25, 96):
        convert(tmp_path / "in", tmp_path / f"{length}", Change(max_length=length))
        changed = MegaBertForMaskedLM.from_pretrained(tmp_path / f"{length}").eval()
        assert changed.bert.embeddings.position_embeddings.num_embeddings == length
        assert torch.equal(changed(ids).logits, model(ids).logits)
        settings = json.loads((tmp_path / f"{length}" / "tokenizer_config.json").read_text())
        assert settings["model_max_length"] == length
    with torch.no_grad():
        longer = changed(torch.randint(5, 800, (1, 96))).logits
    assert longer.isfinite().all()
    alibi = small_model().eval()
    alibi.save_pretrained(tmp_path / "alibi")
    convert(tmp_path / "alibi", tmp_path / "alibi-96", Change(max_length=96))
    changed = MegaBertForMaskedLM.from_pretrained(tmp_path / "alibi-96").eval()
    assert changed.config.max_position_embeddings == 96
    assert torch.equal(changed(ids).logits, alibi(ids).logits)
    with pytest.raises(ValueError, match="the maximum length is 2, expected at least 3"):
        convert(tmp_path / "in", tmp_path / "2", Change(max_length=2))
