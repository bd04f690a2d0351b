"""The bare encoder is what transformers computes with and what TEI and vLLM read; every kind of damage is found.

The tables are those of TEI's candle backend (models/gte.rs, modernbert.rs) and of vLLM (bert_with_rope.py with its
SnowflakeGteNewModel, modernbert.py), which stops at any other tensor.
"""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from megabert.convert.targets import compared_texts, encoder, registry
from megabert.convert.targets.target import DiffersError
from tests.convert.helpers.folders import damages_of_server_files, edit_json
from tests.convert.helpers.small_model import SHAPE, small_model

V, E, F = SHAPE["vocab_size"], SHAPE["hidden_size"], SHAPE["intermediate_size"]
GTE = {
    "embeddings.word_embeddings.weight": (V, E),
    "embeddings.token_type_embeddings.weight": (2, E),
    "embeddings.LayerNorm.weight": (E,),
    "embeddings.LayerNorm.bias": (E,),
}
GTE_LAYER = {
    "attention.qkv_proj.weight": (3 * E, E),
    "attention.qkv_proj.bias": (3 * E,),
    "attention.o_proj.weight": (E, E),
    "attention.o_proj.bias": (E,),
    "mlp.up_gate_proj.weight": (2 * F, E),
    "mlp.down_proj.weight": (E, F),
    "mlp.down_proj.bias": (E,),
} | {f"{norm}.{part}": (E,) for norm in ("attn_ln", "mlp_ln") for part in ("weight", "bias")}
MODERNBERT = {"embeddings.tok_embeddings.weight": (V, E), "embeddings.norm.weight": (E,), "final_norm.weight": (E,)}
MODERNBERT_LAYER = {
    # The first layer has none.
    "attn_norm.weight": (E,),
    "attn.Wqkv.weight": (3 * E, E),
    "attn.Wo.weight": (E, E),
    "mlp_norm.weight": (E,),
    "mlp.Wi.weight": (2 * F, E),
    "mlp.Wo.weight": (E, F),
}
TENSORS = {
    "rope-mosaicbert": GTE
    | {f"encoder.layer.{i}.{name}": shape for i in range(2) for name, shape in GTE_LAYER.items()},
    "modernbert": MODERNBERT
    | {
        f"layers.{layer}.{name}": shape
        for layer in range(4)
        for name, shape in MODERNBERT_LAYER.items()
        if (layer, name) != (0, "attn_norm.weight")
    },
}
# Settings that a server's parser requires, with the types that it takes.
SIZES = dict.fromkeys(
    ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
     "max_position_embeddings", "pad_token_id"), int,
)  # fmt: skip
NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in ("roberta", "electra")]
SETTINGS = {
    "rope-mosaicbert": SIZES | {
        "hidden_act": str, "type_vocab_size": int, "layer_norm_type": str, "layer_norm_eps": float,
        "position_embedding_type": str, "rope_theta": float, "architectures": list,
    },
    "modernbert": SIZES | {
        "hidden_activation": str, "initializer_range": float, "initializer_cutoff_factor": float, "norm_eps": float,
        "norm_bias": bool, "eos_token_id": int, "bos_token_id": int, "cls_token_id": int, "sep_token_id": int,
        "global_rope_theta": float, "attention_bias": bool, "attention_dropout": float,
        "global_attn_every_n_layers": int, "local_attention": int, "local_rope_theta": float,
        "classifier_activation": str, "mlp_bias": bool, "classifier_pooling": str, "classifier_bias": bool,
        "layer_norm_eps": float, "deterministic_flash_attn": bool, "architectures": list,
    },
}  # fmt: skip
# What vLLM asserts before it maps the model.
VALUES = {
    "rope-mosaicbert": {"model_type": "gte", "hidden_act": "gelu", "position_embedding_type": "rope",
                        "layer_norm_type": "layer_norm", "architectures": ["GteModel"]},
    "modernbert": {"model_type": "modernbert", "hidden_activation": "gelu", "classifier_activation": "gelu",
                   "architectures": ["ModernBertModel"]},
}  # fmt: skip


@pytest.mark.parametrize("architecture", TENSORS)
def test_the_servers_find_the_tensors_and_settings_that_they_read(architecture, export_native):
    folder = export_native(architecture) / "encoder"
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert shapes == TENSORS[architecture]
    settings = json.loads((folder / "config.json").read_text())
    for name, kind in SETTINGS[architecture].items():
        assert type(settings.get(name)) is kind, name
    assert settings | VALUES[architecture] == settings
    assert settings.get("rope_scaling") is None
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling",
        "sentence_bert_config.json", "config_sentence_transformers.json",
    }  # fmt: skip


@pytest.mark.parametrize("architecture", ["modernbert", "rope-mosaicbert", "bert", "distilbert", *NIGHTLY])
def test_transformers_computes_the_same_with_the_bare_encoder(architecture, export_native):
    opened = registry.read_outcomes(export_native(architecture))["encoder"]["opened"]
    assert opened["program"] == "transformers"
    assert opened["difference"] <= encoder.TOLERANCE


@pytest.mark.parametrize("architecture", ["distilbert", pytest.param("electra", marks=pytest.mark.nightly)])
def test_what_vllm_lacks_is_written_as_a_bert(architecture, export_native):
    folder = export_native(architecture) / "encoder"
    settings = json.loads((folder / "config.json").read_text())
    assert settings | {"model_type": "bert", "architectures": ["BertModel"], "type_vocab_size": 2} == settings
    types = load_file(folder / "model.safetensors")["embeddings.token_type_embeddings.weight"]
    assert types.shape == (2, E)
    assert bool(types.any()) is (architecture == "electra")


def lose_a_tensor(folder):
    path = folder / "encoder/model.safetensors"
    tensors = load_file(path)
    del tensors["final_norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(**changes):
    return lambda folder: edit_json(folder / "encoder/config.json", **changes)


def cut_the_end(folder):
    path = folder / "encoder/model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


# test_mutations.py has the other kinds of damage.
DAMAGES = {
    "another window": (lambda folder: edit_json(folder / "encoder/config.json", local_attention=2), "differ by"),
    "a lost tensor": (lose_a_tensor, "1 missing: model.final_norm.weight"),
    "cut weights": (cut_the_end, "^encoder/model.safetensors: damaged"),
    "a broken config": (
        lambda folder: (folder / "encoder/config.json").write_text("{"),
        "^encoder/config.json: damaged",
    ),
    "a broken tokenizer": (
        lambda folder: (folder / "encoder/tokenizer.json").write_text("{"),
        "encoder/tokenizer.json",
    ),
    "another theta for servers": (edit_config(global_rope_theta=5.0), "rope_theta differs"),
    "other global layers for servers": (edit_config(global_attn_every_n_layers=1), "global_attention_every differs"),
    "another class for vLLM": (edit_config(architectures=["ModernBertForMaskedLM"]), "architectures is"),
    **damages_of_server_files("encoder"),
    "no pooling": (lambda folder: (folder / "encoder/1_Pooling/config.json").unlink(), "config.json: no such file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(name, export_native, tmp_path):
    damage, reason = DAMAGES[name]
    folder = shutil.copytree(export_native("modernbert"), tmp_path / "hf")
    damage(folder)
    with pytest.raises(DiffersError, match=reason):
        registry.prove(encoder.TARGET, folder, compared_texts.read_expected(folder, registry.read_max_length(folder)))


def test_another_theta_of_a_gte_for_servers_is_found(export_native, tmp_path):
    folder = shutil.copytree(export_native("rope-mosaicbert"), tmp_path / "hf")
    edit_json(folder / "encoder/config.json", rope_theta=5.0)
    with pytest.raises(DiffersError, match="rope_theta differs"):
        registry.prove(encoder.TARGET, folder, compared_texts.read_expected(folder, registry.read_max_length(folder)))


def test_a_mosaicbert_is_sent_to_jina():
    with pytest.raises(ValueError, match="which are those of no class of transformers'. .* --for jina"):
        registry.check_targets(("encoder",), small_model().config, {}, 40)
