"""What people have: each folder is imported with the logits of transformers, or refused with one line that names it."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megabert.convert.folder_to_hf import build_head, select_weights
from megabert.convert.from_hf import read_model
from tests.convert.helpers.folders import edit_json
from tests.helpers.cases import cases

SIZES = {
    "vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
LAYOUTS = {
    "Bert": {},
    "ModernBert": {"local_attention": 8, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    "Gte": {},
    "Roberta": {"type_vocab_size": 1},
    "DistilBert": {},
    "Electra": {"embedding_size": 16},
}
DECODERS = {
    "Bert": ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    "ModernBert": ("decoder.weight", "model.embeddings.tok_embeddings.weight"),
    "Gte": ("lm_head.decoder.weight", "gte.embeddings.word_embeddings.weight"),
    "Roberta": ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    "DistilBert": ("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
    "Electra": ("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),
}
IDS = torch.randint(5, 190, (2, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_fill(1, torch.arange(12, 20), 0)


def randomized(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.3)
    return model.eval()


def make(kind: str, head: str = "MaskedLM", **settings: object) -> transformers.PreTrainedModel:
    sizes = dict(SIZES)
    if kind == "DistilBert":
        sizes["hidden_dim"] = sizes.pop("intermediate_size")
    config = getattr(transformers, f"{kind}Config")(**(sizes | LAYOUTS.get(kind, {}) | settings))
    return randomized(getattr(transformers, f"{kind}For{head}")(config))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, transformers.PreTrainedModel]]:
    """A folder of each layout, and its model. A test that changes a folder must copy it first."""
    made = {kind: (tmp_path_factory.mktemp(kind), make(kind)) for kind in LAYOUTS}
    for folder, model in made.values():
        model.save_pretrained(folder)
    return made


def our_logits(folder: Path) -> Tensor:
    read = read_model(folder)
    with torch.no_grad():
        output = build_head(select_weights(read), read.config)(input_ids=IDS, attention_mask=MASK)
    return output.logits


def their_logits(model: transformers.PreTrainedModel) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=IDS, attention_mask=MASK)
    return output.prediction_logits if hasattr(output, "prediction_logits") else output.logits


def assert_same(got: Tensor, expected: Tensor) -> None:
    real = MASK.bool() if got.dim() == 3 else slice(None)
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=tolerance)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def save(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def to_pickle(folder: Path, name: str = "pytorch_model.bin", content: Callable = dict, **how: bool) -> None:
    torch.save(content(weights_of(folder)), folder / name, **how)
    (folder / "model.safetensors").unlink()


def rename_weights(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


def add(folder: Path, **tensors: Tensor) -> None:
    save(folder, weights_of(folder) | {name.replace("__", "."): tensor for name, tensor in tensors.items()})


def write_sharded(folder: Path) -> None:
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="15KB")


def repeat_decoder(folder: Path, shift: float) -> None:
    """Write the decoder's weights, too, as old checkpoints and untied models have them."""
    weights = weights_of(folder)
    decoder, embeddings = next(names for names in DECODERS.values() if names[1] in weights)
    save(folder, weights | {decoder: weights[embeddings] + shift})


# What is done to a folder of each layout, whose logits stay. Of halves the logits are compared with the same halves.
SAME = {
    "pickle": to_pickle,
    "old pickle": lambda folder: to_pickle(folder, _use_new_zipfile_serialization=False),
    "several files": write_sharded,
    "tied decoder written twice": lambda folder: repeat_decoder(folder, 0.0),
    "torch_dtype": lambda folder: edit_json(folder / "config.json", torch_dtype="float32", dtype=None),
    "dtype": lambda folder: edit_json(folder / "config.json", dtype="float32"),
    "wrapped": lambda folder: save(folder, {f"module.{name}": x for name, x in weights_of(folder).items()}),
    "no architectures": lambda folder: edit_json(folder / "config.json", architectures=None),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_other_files_of_the_same_model_give_its_logits(models, kind, tmp_path):
    source, model = models[kind]
    expected = their_logits(model)
    for name, change in SAME.items():
        folder = shutil.copytree(source, tmp_path / name)
        change(folder)
        assert_same(our_logits(folder), expected)


def test_a_buffer_that_transformers_computes_itself_is_named_as_unused(models, tmp_path):
    folder = shutil.copytree(models["ModernBert"][0], tmp_path / "in")
    add(folder, model__rotary_emb__inv_freq=torch.ones(4))
    assert read_model(folder).unused == ["rotary_emb.inv_freq"]
    assert_same(our_logits(folder), their_logits(models["ModernBert"][1]))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    cases([("Bert", "float16"), ("ModernBert", "bfloat16")], product(LAYOUTS, ["float16", "bfloat16"])),
)
def test_weights_in_half_precision_are_read_exactly(models, kind, dtype, tmp_path):
    folder = shutil.copytree(models[kind][0], tmp_path / "in")
    save(folder, {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights_of(folder).items()})
    edit_json(folder / "config.json", dtype=dtype)
    theirs = type(models[kind][1]).from_pretrained(folder, dtype=torch.float32)
    assert_same(our_logits(folder), their_logits(theirs.eval()))


SETTINGS = [
    ("Bert", "MaskedLM", {"hidden_act": "gelu_python"}),
    ("Bert", "MaskedLM", {"type_vocab_size": 1}),
    ("Bert", "MaskedLM", {"layer_norm_eps": 1e-5, "pad_token_id": 1}),
    ("Bert", "PreTraining", {}),
    ("ModernBert", "MaskedLM", {"hidden_activation": "gelu_python", "classifier_activation": "gelu_python"}),
    ("ModernBert", "MaskedLM", {"norm_eps": 1e-6, "sparse_prediction": True}),
    ("Gte", "MaskedLM", {"hidden_act": "gelu_python", "type_vocab_size": 0}),
    ("Roberta", "MaskedLM", {"pad_token_id": 1, "layer_norm_eps": 1e-5, "type_vocab_size": 2}),
    ("XLMRoberta", "MaskedLM", {"pad_token_id": 3}),
    ("Camembert", "MaskedLM", {"hidden_act": "gelu_python"}),
    ("DistilBert", "MaskedLM", {"activation": "gelu_python", "sinusoidal_pos_embds": True}),
    ("Electra", "MaskedLM", {"embedding_size": 16, "layer_norm_eps": 1e-5}),
]


@pytest.mark.parametrize(("kind", "head", "settings"), SETTINGS)
def test_settings_that_our_model_has_give_the_same_logits(kind, head, settings, tmp_path):
    model = make(kind, head, **settings)
    model.save_pretrained(tmp_path)
    assert_same(our_logits(tmp_path), their_logits(model))


def make_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))


REFUSED = {
    "relu": (lambda f: edit_json(f / "config.json", hidden_act="relu"), "hidden_act is 'relu'"),
    "gelu_new": (lambda f: edit_json(f / "config.json", hidden_act="gelu_new"), "hidden_act is 'gelu_new'"),
    "tanh": (lambda f: edit_json(f / "config.json", hidden_act="gelu_pytorch_tanh"), "hidden_act is 'gelu_pytorch_ta"),
    "relative": (lambda f: edit_json(f / "config.json", position_embedding_type="relative_key"), "'relative_key'"),
    "relative weights": (
        lambda f: add(f, bert__encoder__layer__0__attention__self__distance_embedding__weight=torch.zeros(79, 8)),
        "1 unknown: bert.encoder.layer.0.attention.self.distance_embedding.weight",
    ),
    "decoder": (lambda f: edit_json(f / "config.json", is_decoder=True), "is_decoder is True"),
    "untied": (lambda f: repeat_decoder(f, 1.0), "cls.predictions.decoder.weight differs from bert.embeddings"),
    "its own code": (
        lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "modeling.Other"}),
        "auto_map names code of its own for AutoModel, 'modeling.Other', .* remove auto_map there",
    ),
    "LoRA beside weights": (make_adapter, "this is an adapter of 'a/b', .* Merge it into its model first"),
    "no model_type": (lambda f: edit_json(f / "config.json", model_type=None), "model_type is None, expected 'bert'"),
    "variant": (
        lambda f: rename_weights(f, "model.fp16.safetensors"),
        "It has model.fp16.safetensors: rename it to model.safetensors",
    ),
    "another name": (
        lambda f: rename_weights(f, "weights.safetensors"),
        "It has weights.safetensors: rename it to model.safetensors if it has the whole model",
    ),
    "TensorFlow": (lambda f: rename_weights(f, "tf_model.h5"), "It has tf_model.h5: load it with from_tf=True"),
    "nested pickle": (
        lambda f: to_pickle(f, content=lambda weights: {"state_dict": weights}),
        "does not contain a state dict of tensors. It has 'state_dict'. Save the state dict alone",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_compute_something_else_is_refused_by_name(models, case, tmp_path):
    folder = shutil.copytree(models["Bert"][0], tmp_path / "in")
    change, message = REFUSED[case]
    change(folder)
    with pytest.raises(ValueError, match=f"{folder}.*{message}") as refused:
        read_model(folder)
    assert "\n" not in str(refused.value)


def test_the_advice_about_names_of_files_works(models, tmp_path):
    folder = shutil.copytree(models["Bert"][0], tmp_path / "in")
    rename_weights(folder, "model.fp16.safetensors")
    (folder / "model.fp16.safetensors").rename(folder / "model.safetensors")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "configuration.Other"})
    assert_same(our_logits(folder), their_logits(models["Bert"][1]))


@pytest.mark.parametrize(("kind", "changes", "message"), [
    ("Roberta", {"pad_token_id": None}, "pad_token_id is None and max_position_embeddings 40; RoBERTa's"),
    ("Roberta", {"pad_token_id": 39}, "pad_token_id is 39 and max_position_embeddings 40"),
    ("Roberta", {"position_embedding_type": "relative_key"}, "'relative_key'; this model supports only 'absolute'"),
    ("Roberta", {"is_decoder": True}, "is_decoder is True"),
    ("Roberta", {"auto_map": {"AutoModel": "modeling.Other"}}, "auto_map names code of its own for AutoModel"),
    ("Roberta", {"max_position_embeddings": 41}, r"position_embeddings.weight has shape \(40, 16\), .* \(41, 16\)"),
    ("DistilBert", {"activation": "relu"}, "activation is 'relu'; this model supports only 'gelu'"),
    ("DistilBert", {"n_layers": 10**9}, "n_layers is 1000000000, expected a number from 1 to 1,000"),
    ("DistilBert", {"dim": None}, "lacks dim"),
    ("Electra", {"embedding_size": 8}, "embedding_size is 8 and hidden_size 16: this model has no projection"),
    ("Electra", {"architectures": ["ElectraForMultipleChoice"]}, "is a ElectraForMultipleChoice in its config.json"),
])  # fmt: skip
def test_settings_of_classes_with_berts_layers_are_refused_by_name(models, kind, changes, message, tmp_path):
    folder = shutil.copytree(models[kind][0], tmp_path / "in")
    raw = json.loads((folder / "config.json").read_text()) | changes
    if changes.get("dim", 0) is None:
        del raw["dim"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"{folder}.*{message}") as refused:
        read_model(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("setting", "value"), [
    ("summary_type", "last"), ("summary_use_proj", False), ("summary_activation", None), ("summary_first_dropout", 0.1),
])  # fmt: skip
def test_electras_choices_with_another_summary_are_refused(setting, value, tmp_path):
    make("Electra", "MultipleChoice").save_pretrained(tmp_path)
    read_model(tmp_path)
    edit_json(tmp_path / "config.json", **{setting: value})
    with pytest.raises(ValueError, match=f"config.json: {setting} is {value!r}; this model supports only"):
        read_model(tmp_path)


def test_what_this_model_has_no_place_for_is_named_as_unused(tmp_path):
    """ELECTRA's discriminator, and the pooler that old RoBERTa classifiers have beside their own layer."""
    model = make("Electra", "PreTraining")
    model.save_pretrained(tmp_path / "electra")
    read = read_model(tmp_path / "electra")
    parts = ("dense", "dense_prediction")
    assert read.unused == [f"discriminator_predictions.{part}.{end}" for part in parts for end in ("bias", "weight")]
    assert "decoder.bias" in read.initialized
    with torch.no_grad():
        expected = model.base_model(IDS, attention_mask=MASK).last_hidden_state
        got = build_head(select_weights(read), read.config).base_model(IDS, attention_mask=MASK).last_hidden_state
    assert_same(got, expected)
    classifier = make("Roberta", "SequenceClassification")
    classifier.save_pretrained(tmp_path / "roberta")
    add(tmp_path / "roberta", roberta__pooler__dense__weight=torch.ones(16, 16))
    assert read_model(tmp_path / "roberta").unused == ["roberta.pooler.dense.weight"]
    assert_same(our_logits(tmp_path / "roberta"), their_logits(classifier))


OTHERS = {
    "DebertaV2": "deberta-v2", "Albert": "albert", "MPNet": "mpnet", "NomicBert": "nomic_bert",
    "EuroBert": "eurobert", "ModernBertDecoder": "modernbert-decoder",
}  # fmt: skip
SOME = ("MPNet", "ModernBertDecoder")


@pytest.mark.parametrize("kind", [*SOME, *(pytest.param(kind, marks=pytest.mark.nightly) for kind in OTHERS)])
def test_other_architectures_are_refused_by_name_whatever_they_call_themselves(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    model = getattr(transformers, f"{kind}For{'CausalLM' if 'Decoder' in kind else 'MaskedLM'}")(config)
    save(tmp_path, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    with pytest.raises(ValueError, match=f"config.json: model_type is '{OTHERS[kind]}', expected 'bert'"):
        read_model(tmp_path)
    edit_json(tmp_path / "config.json", model_type="bert")
    with pytest.raises(ValueError, match=f"{tmp_path}.*(unknown|missing|supports only|lacks)"):
        read_model(tmp_path)


@pytest.mark.parametrize("kind", ["Roberta", "DistilBert", "Electra"])
def test_a_model_that_calls_itself_bert_but_is_another_is_refused(models, kind, tmp_path):
    folder = shutil.copytree(models[kind][0], tmp_path / "in")
    sizes = {name: value for name, value in SIZES.items() if kind == "DistilBert"}
    edit_json(folder / "config.json", model_type="bert", **sizes)
    with pytest.raises(ValueError, match=f"{folder}.* (unknown|missing): "):
        read_model(folder)
