"""Imports of Hugging Face folders: what is read, what is refused, and that nothing in them is executed."""

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
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    GteConfig,
    ModernBertConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.convert.from_hf import ImportOptions, import_model, read_model
from megabert.convert.hf.config import SHARED_SETTINGS, from_their_config
from megabert.convert.weight_names import from_megabert, to_megabert
from megabert.model.modeling_megabert import (
    MegaBertForMaskedLM,
    MegaBertForQuestionAnswering,
    MegaBertForSequenceClassification,
    MegaBertModel,
)
from tests.convert.helpers.folders import MakesFolder, edit_json, write_published_mosaicbert
from tests.convert.helpers.small_model import SHAPE, small_model
from tests.helpers.runs import pretrain_command, run_command

HEAD = [
    "decoder.bias",
    "transform.dense.bias",
    "transform.dense.weight",
    "transform.norm.bias",
    "transform.norm.weight",
]


def test_the_published_mosaicbert_comes_back_bitwise(tmp_path):
    state = write_published_mosaicbert(tmp_path / "in")
    model = import_model(tmp_path / "in", tmp_path / "out")
    assert model.initialized == model.unused == []
    assert (model.config.position, model.config.ffn, model.config.layer_norm_dtype) == ("alibi", "geglu", "bfloat16")
    again = from_megabert(load_file(tmp_path / "out" / "model.safetensors"), "mosaicbert")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    loaded, info = MegaBertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)  # type: ignore[misc]
    assert not any(info.values())
    ids = torch.randint(5, 800, (2, 9))
    assert torch.equal(loaded.eval()(ids).logits, small_model().eval()(ids).logits)


@pytest.mark.parametrize(
    ("cls", "missing", "unused"),
    [
        (BertModel, HEAD, []),
        (BertForMaskedLM, [], []),
        (BertForPreTraining, [], ["cls.seq_relationship.bias", "cls.seq_relationship.weight"]),
        (BertForSequenceClassification, HEAD, []),
        (BertForQuestionAnswering, HEAD, []),
    ],
)
def test_bert_with_any_head_is_imported_and_missing_parameters_are_named(tmp_path, cls, missing, unused):
    labels = {0: "a", 1: "b"} if cls is BertForQuestionAnswering else {0: "a", 1: "b", 2: "c"}
    theirs = cls(BertConfig(**SHAPE, id2label=labels)).eval()
    theirs.save_pretrained(tmp_path / "in")
    model = import_model(tmp_path / "in", tmp_path / "out")
    assert sorted(model.initialized) == missing
    assert model.unused == unused
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


def test_legacy_names_of_layer_norm_and_buffers_are_accepted():
    state = from_megabert(small_model(position="learned", ffn="gelu").state_dict(), "bert")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(40)[None]
    assert to_megabert(old, "bert").weights.keys() == to_megabert(state, "bert").weights.keys()


def test_our_own_folder_is_imported_unchanged_and_the_launcher_names_what_is_missing(tmp_path):
    model = small_model(cls=MegaBertModel)
    model.save_pretrained(tmp_path / "in")
    command = [sys.executable, "launch/convert_from_hf.py", str(tmp_path / "in"), str(tmp_path / "out")]
    done = run_command(command)
    assert done.code == 0, done.output
    assert "not in the source folder, initialized: transform.dense.weight, transform.dense.bias" in done.output
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weights[f"bert.{name}"], tensor) for name, tensor in model.state_dict().items())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(ValueError, match="other: is not empty; choose another folder"):
        import_model(tmp_path / "in", tmp_path / "other")


def test_a_folder_whose_name_is_no_utf8_is_refused_with_the_remedy(tmp_path):
    command = [sys.executable, "launch/convert_from_hf.py"]
    small_model().save_pretrained(tmp_path / "in")
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    (tmp_path / "in").rename(odd)
    done = run_command([*command, str(odd), str(tmp_path / "out")])
    assert done.code == 1
    assert "caf\\udce9/model.safetensors: its name is not UTF-8, so safetensors cannot open it. Rename" in done.output
    odd.rename(tmp_path / "in")
    done = run_command([*command, str(tmp_path / "in"), str(tmp_path / "out")])
    assert done.code == 0, done.output


def test_untied_embeddings_in_our_own_folder_are_refused(tmp_path):
    small_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    untied = weights["bert.embeddings.word_embeddings.weight"] + 1
    save_file(weights | {"decoder.weight": untied}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="decoder.weight differs from bert.embeddings.word_embeddings.weight"):
        read_model(tmp_path)


ROBERTA = {"position": "learned", "ffn": "gelu", "position_offset": 1, "type_vocab_size": 1}


@pytest.mark.parametrize("changes", [{}, ROBERTA], ids=["mosaicbert", "roberta"])
def test_pretraining_continues_from_the_folder(corpus, tmp_path, changes):
    """With a learning rate near zero, the first checkpoint has the folder's weights."""
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    small_model(**shape, **changes).save_pretrained(tmp_path / "in")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in" / name).write_bytes((corpus.tokenizer / name).read_bytes())
    import_model(tmp_path / "in", tmp_path / "start")
    settings = [f"--model.init_from={tmp_path / 'start'}", "--run.max_steps=1", "--optimizer.lr=1e-30"]
    settings += [f"--model.{name}={value}" for name, value in changes.items()]
    settings += ["--model.max_position_embeddings=40"] if changes else []
    done = run_command(pretrain_command(corpus, tmp_path / "run", *settings))
    assert done.code == 0, done.output
    weights, _, _ = read_checkpoint(tmp_path / "run")
    start = load_file(tmp_path / "start" / "model.safetensors")
    assert all(torch.equal(weights[name], start[name]) for name in weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "has weights of 2 layers, but its config.json has 3"),
        ({"hidden_size": 48}, r"word_embeddings.weight has shape \(832, 24\), but its config.json implies \(832, 48\)"),
        ({"vocab_size": 800}, r"word_embeddings.weight has shape \(832, 24\), but its config.json implies \(800, 24\)"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000, expected a number from 1 to 65,536"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a number from 1 to 1,000"),
        (
            {"vocab_size": 10_000_000, "hidden_size": 60_000},
            r"has shape \(832, 24\), but its config.json implies \(10000000, 60000\)",
        ),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"hidden_size": "24"}, "hidden_size is '24'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; this model supports only 'gelu'"),
        ({"is_decoder": True}, "is_decoder is True; this model supports only False"),
        (
            {"layer_norm_eps": 1e-5},
            r"layer_norm_eps is 1e-05, but MosaicBERT's .* head always has 1e-12, .* set layer_norm_eps to 1e-12 there",
        ),
        ({"layer_norm_eps": "tiny"}, "config.json: model config: layer_norm_eps is 'tiny', expected a number"),
        ({"hidden_dropout_prob": 7}, "hidden_dropout_prob is 7, expected a number from 0 to 1"),
        ({"pad_token_id": 832}, "pad_token_id is 832, expected one of the 832 rows"),
        ({"id2label": {"yes": "1"}}, "id2label has the keys yes, expected numbers"),
        (
            {"model_type": "gpt2"},
            "model_type is 'gpt2', expected 'bert', 'roberta', .*'modernbert', 'gte' or 'megabert'",
        ),
    ],
)
def test_a_config_that_does_not_match_the_weights_is_refused(tmp_path, changes, message):
    write_published_mosaicbert(tmp_path / "in")
    edit_json(tmp_path / "in" / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra", "modernbert", "gte"])
def test_a_model_may_have_no_padding_token(kind):
    """transformers then trains the embedding of token 0 as any other."""
    more = {"electra": {"embedding_size": SHAPE["hidden_size"]}, "distilbert": {"hidden_dim": 40}}.get(kind, {})
    raw = {**SHAPE, **more, "model_type": kind, "pad_token_id": None}
    config = from_their_config(Path("in"), raw, kind)
    assert config.pad_token_id is None
    assert MegaBertForMaskedLM(config).bert.embeddings.word_embeddings.padding_idx is None


DEFAULTS = [
    ("bert", BertConfig), ("roberta", RobertaConfig), ("roberta", XLMRobertaConfig), ("roberta", CamembertConfig),
    ("distilbert", DistilBertConfig), ("electra", ElectraConfig), ("modernbert", ModernBertConfig), ("gte", GteConfig),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "cls"), DEFAULTS)
def test_settings_that_a_config_leaves_out_have_the_defaults_of_transformers(kind, cls):
    sizes = (
        SHAPE | {"vocab_size": 60_000} | ({"hidden_size": 128, "num_attention_heads": 2} if kind == "electra" else {})
    )
    del sizes["max_position_embeddings"]
    if kind == "distilbert":
        sizes["hidden_dim"] = sizes.pop("intermediate_size")
    ours, theirs = from_their_config(Path("in"), {**sizes, "model_type": cls.model_type}, kind), cls(**sizes)
    other_names = {
        "layer_norm_eps": ["norm_eps"],
        "hidden_dropout_prob": ["mlp_dropout", "dropout"],
        "attention_probs_dropout_prob": ["attention_dropout"],
        "intermediate_size": ["hidden_dim"],
        "classifier_dropout": ["seq_classif_dropout"],
    }
    for name in (*SHARED_SETTINGS, "classifier_pooling"):
        found = next((other for other in (name, *other_names.get(name, ())) if hasattr(theirs, other)), None)
        if found is not None:
            got = ours.position_rows if (name, kind) == ("max_position_embeddings", "roberta") else getattr(ours, name)
            assert got == getattr(theirs, found), name


def test_relative_positions_and_a_config_without_sizes_are_refused(tmp_path):
    BertModel(BertConfig(**SHAPE)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit_json(tmp_path / "config.json", position_embedding_type="relative_key")
    with pytest.raises(
        ValueError, match="position_embedding_type is 'relative_key'; this model supports only 'absolute'"
    ):
        read_model(tmp_path)
    del config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: lacks num_attention_heads"):
        read_model(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "part.bin"])
def test_a_pickle_in_a_weights_file_is_never_executed(tmp_path, name):
    witness = tmp_path / "witness"
    write_published_mosaicbert(tmp_path / "in", evil=MakesFolder(witness))
    if name == "part.bin":
        os.rename(tmp_path / "in" / "pytorch_model.bin", tmp_path / "in" / name)
        index = {"weight_map": {"bert.embeddings.word_embeddings.weight": name}}
        (tmp_path / "in" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{name}: was not read, because it does not contain only tensors"):
        import_model(tmp_path / "in", tmp_path / "out")
    assert not witness.exists()


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin", 7])
def test_an_index_cannot_lead_out_of_the_folder(tmp_path, file):
    write_published_mosaicbert(tmp_path / "in")
    save_file({"x": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = {"weight_map": {"x": file}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "in" / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="expected one directly in this folder|has no weight_map"):
        read_model(tmp_path / "in")


def test_a_link_cannot_lead_out_of_the_folder_but_the_hubs_cache_is_made_of_links(tmp_path):
    write_published_mosaicbert(tmp_path / "in")
    weights = tmp_path / "in" / "pytorch_model.bin"
    (tmp_path / "elsewhere").mkdir()
    weights.rename(tmp_path / "elsewhere" / "secret")
    weights.symlink_to(tmp_path / "elsewhere" / "secret")
    with pytest.raises(ValueError, match="is a link to .*secret, outside its folder"):
        read_model(tmp_path / "in")
    hub = tmp_path / "models--x"
    (hub / "snapshots").mkdir(parents=True)
    (tmp_path / "in").rename(hub / "snapshots" / "0123")
    (tmp_path / "elsewhere").rename(hub / "blobs")
    weights = hub / "snapshots" / "0123" / "pytorch_model.bin"
    weights.unlink()
    weights.symlink_to("../../blobs/secret")
    assert read_model(hub / "snapshots" / "0123").unused == []


def test_weights_that_are_not_finite_and_too_large_tokenizers_are_refused(tmp_path):
    write_published_mosaicbert(tmp_path / "in")
    (tmp_path / "in" / "vocab.txt").write_text("".join(f"piece{number}\n" for number in range(897)))
    with pytest.raises(ValueError, match=r"vocab.txt: has no \[CLS\] and no \[SEP\] and no \[UNK\]"):
        import_model(tmp_path / "in", tmp_path / "out")
    with open(tmp_path / "in" / "vocab.txt", "a") as file:
        file.write("[UNK]\n[CLS]\n[SEP]\n")
    with pytest.raises(ValueError, match="its tokenizer has the id 899, but its model only 832 rows"):
        import_model(tmp_path / "in", tmp_path / "out")
    path = tmp_path / "in" / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    weights["bert.encoder.layer.1.mlp.wo.bias"][3] = torch.inf
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down\.bias has values that are not finite"):
        read_model(tmp_path / "in")


def test_damaged_and_inconsistent_files_are_refused(tmp_path):
    write_published_mosaicbert(tmp_path / "in")
    # One number with the shape of 40 TB.
    huge = torch.zeros(1).expand(10**7, 10**6)
    torch.save({"bert.embeddings.word_embeddings.weight": huge}, tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more data than the file contains"):
        read_model(tmp_path / "in")
    torch.save([1, 2], tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="does not contain a state dict of tensors"):
        read_model(tmp_path / "in")
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    (tmp_path / "in" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
        read_model(tmp_path / "in")
    save_file({"bert.x": torch.zeros(3, dtype=torch.int64)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ValueError, match="bert.x is torch.int64, expected floating-point weights"):
        read_model(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    (tmp_path / "in" / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors and no pytorch_model.bin"):
        read_model(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="it holds a list, expected an object"):
        read_model(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="it is not JSON"):
        read_model(tmp_path / "in")


def test_a_changed_length_keeps_the_logits_of_short_texts(tmp_path):
    model = small_model(position="learned", ffn="gelu").eval()
    model.save_pretrained(tmp_path / "in")
    ids = torch.randint(5, 800, (2, 25))
    for length in (25, 96):
        import_model(tmp_path / "in", tmp_path / f"{length}", ImportOptions(max_length=length))
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
    import_model(tmp_path / "alibi", tmp_path / "alibi-96", ImportOptions(max_length=96))
    changed = MegaBertForMaskedLM.from_pretrained(tmp_path / "alibi-96").eval()
    assert changed.config.max_position_embeddings == 96
    assert torch.equal(changed(ids).logits, alibi(ids).logits)
    with pytest.raises(ValueError, match="the maximum length is 2, expected at least 3"):
        import_model(tmp_path / "in", tmp_path / "2", ImportOptions(max_length=2))


@pytest.mark.parametrize(
    ("add", "message"),
    [
        ({"bert.embeddings.LayerNorm.gamma": "bert.embeddings.LayerNorm.weight"}, "by two names. Remove one of them"),
        ({"module.bert.embeddings.LayerNorm.weight": "bert.embeddings.LayerNorm.weight"}, "is there twice"),
        ({"embeddings.LayerNorm.weight": "bert.embeddings.LayerNorm.weight"}, "by two names. Remove one of them"),
        ({"bert.encoder.layer.7.output.dense.bias": "bert.encoder.layer.1.output.dense.bias"}, "none of layer 2"),
    ],
)
def test_a_parameter_by_two_names_is_refused_and_the_folder_is_named(tmp_path, add, message):
    BertForMaskedLM(BertConfig(**(SHAPE | {"num_hidden_layers": 2}))).save_pretrained(tmp_path / "in")
    weights = load_file(tmp_path / "in/model.safetensors")
    weights |= {new: weights[name] + 1 for new, name in add.items()}
    save_file(weights, tmp_path / "in/model.safetensors")
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'in'}: .*{message}"):
        import_model(tmp_path / "in", tmp_path / "out")


def test_a_gte_parameter_by_two_names_is_refused():
    state = {"new.embeddings.LayerNorm.weight": torch.ones(2), "gte.embeddings.LayerNorm.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match="are the same parameter, gte.embeddings"):
        to_megabert(state, "gte")


@pytest.mark.parametrize("name", ["pad_token_id", "hidden_dropout_prob", "initializer_range"])
def test_a_switch_where_a_number_belongs_is_refused(tmp_path, name):
    BertForMaskedLM(BertConfig(**SHAPE)).save_pretrained(tmp_path / "in")
    edit_json(tmp_path / "in/config.json", **{name: True})
    with pytest.raises(ValueError, match=f"config.json: model config: {name} is True, expected a number"):
        import_model(tmp_path / "in", tmp_path / "out")


FILES_THAT_MAY_BE_MISSING = [
    "config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "tokenizer_config.json", "added_tokens.json",
    "special_tokens_map.json", "export.json", "import.json", "adapter_config.json",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES_THAT_MAY_BE_MISSING)
def test_a_link_to_nothing_does_not_count_as_a_missing_file(tmp_path, name):
    BertForMaskedLM(BertConfig(**SHAPE)).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / name).unlink(missing_ok=True)
    (tmp_path / "in" / name).symlink_to("../../blobs/0")
    with pytest.raises(ValueError, match=f"{name}: is a link to ../../blobs/0, where no file is. Copy the folder"):
        import_model(tmp_path / "in", tmp_path / "out")
