"""Folders as they are published: their config.json with small sizes, and every way in which weights are stored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megabert.convert.folder_to_hf import build_head, select_weights
from megabert.convert.from_hf import import_model, read_model
from megabert.convert.hf.reader import read_config
from megabert.convert.hf.tokenizer import copy_tokenizer
from megabert.convert.to_hf import write_model
from tests.convert.helpers.folders import edit_json
from tests.helpers.cases import cases

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 832,
}  # fmt: skip
SHARED: dict[str, Any] = SIZES | {
    "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "initializer_range": 0.02,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "type_vocab_size": 2,
}  # fmt: skip
BERT = SHARED | {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "gradient_checkpointing": False, "pad_token_id": 0,
    "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0", "use_cache": True,
}  # fmt: skip
ROBERTA = SHARED | {
    "model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "bos_token_id": 0, "eos_token_id": 2,
    "layer_norm_eps": 1e-5, "max_position_embeddings": 514, "pad_token_id": 1, "type_vocab_size": 1,
}  # fmt: skip
XLM = ROBERTA | {
    "model_type": "xlm-roberta", "architectures": ["XLMRobertaForMaskedLM"], "output_past": True,
    "position_embedding_type": "absolute", "transformers_version": "4.17.0.dev0", "use_cache": True,
}  # fmt: skip
CAMEMBERT = ROBERTA | {
    "model_type": "camembert", "architectures": ["CamembertForMaskedLM"], "bos_token_id": 5, "eos_token_id": 6,
    "output_past": True,
}  # fmt: skip
DISTILBERT = {
    "model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "activation": "gelu",
    "attention_dropout": 0.1, "dim": 32, "dropout": 0.1, "hidden_dim": 48, "initializer_range": 0.02,
    "max_position_embeddings": 512, "n_heads": 2, "n_layers": 2, "pad_token_id": 0, "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 832,
}  # fmt: skip
ELECTRA = SHARED | {"model_type": "electra", "architectures": ["ElectraForPreTraining"], "embedding_size": 32}
MODERNBERT = SIZES | {
    "model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 50281, "classifier_activation": "gelu", "classifier_bias": False,
    "classifier_dropout": 0.0, "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": True,
    "deterministic_flash_attn": False, "embedding_dropout": 0.0, "eos_token_id": 50282,
    "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "gradient_checkpointing": False,
    "hidden_activation": "gelu", "initializer_cutoff_factor": 2.0, "initializer_range": 0.02, "layer_norm_eps": 1e-05,
    "local_attention": 128, "local_rope_theta": 10000.0, "max_position_embeddings": 8192, "mlp_bias": False,
    "mlp_dropout": 0.0, "norm_bias": False, "norm_eps": 1e-05, "num_hidden_layers": 4, "pad_token_id": 3,
    "position_embedding_type": "absolute", "sep_token_id": 50282, "tie_word_embeddings": True,
    "torch_dtype": "float32", "transformers_version": "4.47.0.dev0",
}  # fmt: skip
ETTIN = MODERNBERT | {
    "causal_mask": False, "is_causal": False, "num_hidden_layers": 7, "repad_logits_with_grad": False,
    "sparse_pred_ignore_index": -100, "sparse_prediction": False, "reference_compile": None,
}  # fmt: skip
MMBERT = MODERNBERT | {
    "bos_token_id": 2, "cls_token_id": 1, "eos_token_id": 1, "local_rope_theta": 160000.0, "mask_token_id": 4,
    "pad_token_id": 0, "position_embedding_type": "sans_pos", "sep_token_id": 1, "sparse_pred_ignore_index": -100,
    "sparse_prediction": False,
}  # fmt: skip
MINILM = BERT | {"architectures": ["BertModel"], "_name_or_path": "nreimers/MiniLM-L6-H384-uncased"}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base-uncased": ("BertForPreTraining", BERT),
    "roberta-base": ("RobertaForMaskedLM", ROBERTA),
    "xlm-roberta-base": ("XLMRobertaForMaskedLM", XLM),
    "camembert-base": ("CamembertForMaskedLM", CAMEMBERT),
    "distilbert-base": ("DistilBertForMaskedLM", DISTILBERT),
    "electra-base-discriminator": ("ElectraForPreTraining", ELECTRA),
    "ModernBERT-base": ("ModernBertForMaskedLM", MODERNBERT),
    "ettin-encoder": ("ModernBertForMaskedLM", ETTIN),
    "mmBERT": ("ModernBertForMaskedLM", MMBERT),
    "all-MiniLM-L6-v2": ("BertModel", MINILM),
}
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
    "vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight",
    "decoder.weight": "model.embeddings.tok_embeddings.weight",
}
IDS = torch.randint(5, 800, (2, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 12:] = 0


def rename_norms(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in weights.items():
        end = next((end for end in ends if name.endswith(end)), None)
        renamed[name if end is None else name.removesuffix(end) + ends[end]] = tensor
    return renamed


def add_buffers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add what BERT's classes saved before transformers 4.31; ModernBERT's never had them."""
    if any("tok_embeddings" in name for name in weights):
        return weights
    prefix = next(name for name in weights if "embeddings." in name).split("embeddings.")[0]
    places, types = torch.arange(512)[None], torch.zeros(1, 512, dtype=torch.int64)
    return weights | {f"{prefix}embeddings.position_ids": places, f"{prefix}embeddings.token_type_ids": types}


def repeat_tied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    has_head = any(name.startswith(("cls.", "lm_head.", "vocab_", "decoder.", "head.")) for name in weights)
    return weights | {new: weights[old].clone() for new, old in TIED.items() if has_head and old in weights}


# The names in which the published files of a class may be.
NAMES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "as saved": dict,
    "gamma and beta": rename_norms,
    "buffers": add_buffers,
    "tied written": repeat_tied,
    "fp16": lambda weights: {name: tensor.half() for name, tensor in weights.items()},
    "bf16": lambda weights: {name: tensor.bfloat16() for name, tensor in weights.items()},
    "prefix": lambda weights: (
        {f"bert.{name}": tensor for name, tensor in weights.items()} if "pooler.dense.bias" in weights else weights
    ),
}


def save_sharded(weights: dict[str, Tensor], folder: Path) -> None:
    names, files = sorted(weights), [f"pytorch_model-0000{part}-of-00002.bin" for part in (1, 2)]
    index = {name: files[number * 2 // len(names)] for number, name in enumerate(names)}
    for file in files:
        torch.save({name: weights[name] for name in names if index[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


FILES: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "safetensors": lambda weights, folder: save_file(weights, folder / "model.safetensors"),
    "pickle": lambda weights, folder: torch.save(weights, folder / "pytorch_model.bin"),
    "several": save_sharded,
}


def make_model(name: str, folder: Path) -> transformers.PreTrainedModel:
    """Make transformers' class from the published config, with random weights."""
    cls, config = PUBLISHED[name]
    (folder / "config.json").write_text(json.dumps(config))
    kind = getattr(transformers, cls)
    model = kind(kind.config_class.from_pretrained(folder)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.3)
    return model


def outputs(model: transformers.PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Return the states of real tokens, and their logits over the vocabulary if the class has any."""
    with torch.no_grad():
        states = model.base_model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        output = model(input_ids=IDS, attention_mask=MASK)
    logits = output.prediction_logits if "prediction_logits" in output else output.get("logits")
    real = MASK.bool()
    return states[real], logits[real] if logits is not None and logits.shape[-1] == SIZES["vocab_size"] else None


def assert_same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("name", cases([["bert-base-uncased"], ["ModernBERT-base"]], zip(PUBLISHED)))
def test_a_published_folder_gives_the_outputs_of_transformers_however_it_is_stored(name, tmp_path):
    (tmp_path / "source").mkdir()
    model = make_model(name, tmp_path / "source")
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    for number, (stored, change) in enumerate(NAMES.items()):
        folder = tmp_path / stored
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(PUBLISHED[name][1]))
        weights = change(saved)
        list(FILES.values())[number % len(FILES)](weights, folder)
        if stored in ("fp16", "bf16"):
            model.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, strict=False)
        read = read_model(folder)
        wanted, logits = outputs(model)
        ours = build_head(select_weights(read), read.config)
        got, our_logits = outputs(ours)
        assert_same(got, wanted)
        if logits is not None:
            assert_same(our_logits, logits)
            assert read.initialized == []
        model.load_state_dict(saved, strict=False)


@pytest.mark.parametrize("name", [name for name, (cls, _) in PUBLISHED.items() if cls.endswith("MaskedLM")])
def test_a_published_model_comes_back_bit_for_bit(name, corpus, tmp_path):
    for part in ("source", "out"):
        (tmp_path / part).mkdir()
    model = make_model(name, tmp_path / "source")
    save_file({key: x.clone() for key, x in model.state_dict().items()}, tmp_path / "source/model.safetensors")
    read = read_model(tmp_path / "source")
    copy_tokenizer(corpus.tokenizer, tmp_path / "out", 512)
    write_model(tmp_path / "out", select_weights(read), read.config, "5GB")
    back = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out").state_dict()
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in model.state_dict().items())


POOLING = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
MODULES = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")])
]


def test_the_files_of_sentence_transformers_beside_a_model_are_no_part_of_it(corpus, tmp_path):
    folder = tmp_path / "in"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "2_Normalize").mkdir()
    model = make_model("all-MiniLM-L6-v2", folder)
    model.save_pretrained(folder)
    copy_tokenizer(corpus.tokenizer, folder, 512)
    files = {"modules.json": MODULES, "1_Pooling/config.json": POOLING, "data_config.json": [],
             "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False}}  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert len(import_model(folder, tmp_path / "ours").initialized) == 5
    assert not [path for path in (tmp_path / "ours").rglob("*") if path.name in ("modules.json", "1_Pooling")]


NEW = SIZES | {
    "model_type": "new", "architectures": ["NewForMaskedLM"], "hidden_act": "gelu", "layer_norm_type": "layer_norm",
    "auto_map": {"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"}, "pack_qkv": True, "rope_theta": 20000,
    "position_embedding_type": "rope", "rope_scaling": {"factor": 8.0, "type": "ntk"}, "type_vocab_size": 1,
}  # fmt: skip
NOMIC = {
    "model_type": "nomic_bert", "activation_function": "swiglu", "architectures": ["NomicBertModel"], "n_embd": 32,
    "n_head": 2, "n_inner": 48, "n_layer": 2, "n_positions": 8192, "vocab_size": 832,
}  # fmt: skip
REFUSED = {
    "electra-base-generator": (ELECTRA | {"embedding_size": 64}, "embedding_size is 64 and hidden_size 32: this model"),
    "electra-small": (ELECTRA | {"embedding_size": 16}, "embedding_size is 16 and hidden_size 32: this model has no"),
    "gte with its own code": (NEW, "model_type is 'new', expected 'bert', .*"),
    "gte": (NEW | {"model_type": "gte", "architectures": ["GteForMaskedLM"], "auto_map": {}}, "RoPE is .*'ntk'"),
    "nomic-bert": (NOMIC, "model_type is 'nomic_bert', expected 'bert'"),
    "deberta-v3": (SHARED | {"model_type": "deberta-v2", "type_vocab_size": 0}, "model_type is 'deberta-v2', expected"),
    "albert": (SHARED | {"model_type": "albert", "hidden_act": "gelu_new"}, "model_type is 'albert', expected 'bert'"),
    "mpnet": (SHARED | {"model_type": "mpnet"}, "model_type is 'mpnet', expected 'bert'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_folder_of_another_model_is_refused_by_its_config(name, tmp_path):
    config, message = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"encoder.layer.0.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert read_config(tmp_path)["model_type"] == config["model_type"]
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: {message}") as refused:
        read_model(tmp_path)
    assert "\n" not in str(refused.value)
    if name.startswith("gte"):
        # Nothing is computed with a part of its settings either.
        edit_json(tmp_path / "config.json", rope_scaling={"factor": 8.0, "rope_type": "dynamic"}, model_type="gte")
        with pytest.raises(ValueError, match="RoPE is|is a NewForMaskedLM|auto_map names code"):
            read_model(tmp_path)
