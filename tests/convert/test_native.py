"""ModernBERT and GTE folders of transformers: read, trained models written as them, and back without a changed bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, GteConfig, GteForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from megabert.convert import from_hf, to_hf
from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.convert.hf.config import from_their_config
from megabert.convert.hf.native import layer_types, native_kind
from megabert.convert.hf.resize import change_rope_theta
from megabert.model.configuration_megabert import MegaBertConfig
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.small_model import SHAPE, small_model
from tests.model.helpers.architectures import ARCHITECTURES

EVEN = {"num_attention_heads": 2}
SIZES = {name: SHAPE[name] for name in SHAPE if name != "max_position_embeddings"} | EVEN
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
# Parts of published config.json files: ModernBERT's and Ettin's of transformers 4, mmBERT's, and those of transformers
# 5. Both give the same model.
MODERNBERT_4 = {
    "attention_bias": False, "classifier_activation": "gelu", "classifier_pooling": "mean", "decoder_bias": True,
    "embedding_dropout": 0.0, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "hidden_activation": "gelu", "initializer_cutoff_factor": 2.0, "layer_norm_eps": 1e-05, "local_attention": 6,
    "local_rope_theta": 10000.0, "mlp_bias": False, "mlp_dropout": 0.0, "norm_bias": False, "norm_eps": 1e-05,
    "position_embedding_type": "absolute", "sparse_prediction": False, "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0",
}  # fmt: skip
MMBERT = MODERNBERT_4 | {
    "local_rope_theta": 160000.0,
    "position_embedding_type": "sans_pos",
    "classifier_pooling": "cls",
}


def randomized(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.3)
    return model.eval()


def logits_of(model):
    ids = torch.randint(5, 800, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def assert_same_logits(folder, theirs):
    read = from_hf.read_model(folder)
    model = to_hf.export_check.build_model(read.weights, read.config)
    torch.testing.assert_close(logits_of(model), logits_of(theirs), rtol=1e-5, atol=2e-5)
    return read


@pytest.mark.parametrize("layout", ["of transformers 5", "of transformers 4", "mmBERT", "every layer global"])
def test_modernbert_folders_are_read(tmp_path, layout):
    old = {"of transformers 4": MODERNBERT_4, "mmBERT": MMBERT}.get(layout)
    settings = SIZES | IDS | {"num_hidden_layers": 4, "local_attention": 6}
    every = 1 if layout == "every layer global" else 3
    if old is not None:
        settings |= old
    theirs = randomized(ModernBertForMaskedLM(ModernBertConfig(**settings | {"global_attn_every_n_layers": every})))
    theirs.save_pretrained(tmp_path)
    if old is not None:
        raw = {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], **settings}
        (tmp_path / "config.json").write_text(json.dumps(raw))
    read = assert_same_logits(tmp_path, theirs)
    assert read.initialized == read.unused == []
    assert read.config.global_attention_every == every
    assert read.config.reach == (None if every == 1 else 3)


PARTS = ("full_attention", "sliding_attention")
THETAS = [
    {},
    {"global_rope_theta": 5e4, "local_rope_theta": 3e4},
    {"rope_theta": 160_000.0},
    {"rope_parameters": {part: {"rope_theta": theta} for part, theta in zip(PARTS, (9e4, 8e4), strict=True)}},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 9e4}}, "local_rope_theta": 123.0},
    {"rope_parameters": None, "global_rope_theta": 10_000},
    {"layer_types": ["full_attention", "sliding_attention"], "global_attn_every_n_layers": 3},
    {"global_attn_every_n_layers": 50},
    {"local_attention": 7, "sliding_window": 3, "rope_scaling": None},
    {"sparse_prediction": True, "deterministic_flash_attn": True, "reference_compile": True, "torch_dtype": "bfloat16"},
]


@pytest.mark.parametrize("settings", THETAS)
def test_settings_mean_what_they_mean_to_transformers(tmp_path, settings):
    raw = {"model_type": "modernbert", **SIZES, **IDS, "num_hidden_layers": 2, **settings}
    ours = from_their_config(tmp_path, raw, "modernbert")
    theirs = ModernBertConfig(**json.loads(json.dumps(raw)))
    every = ours.global_attention_every
    assert layer_types(2, every) == theirs.layer_types
    thetas = [(theirs.rope_parameters or {})[part]["rope_theta"] for part in PARTS]
    assert [ours.rope_theta, ours.local_rope_theta] == thetas
    assert ours.reach == theirs.local_attention // 2


def test_a_theta_of_local_layers_that_is_null_is_the_global_one(tmp_path):
    """As in transformers 4; transformers 5 cannot load such a folder."""
    raw = {"model_type": "modernbert", **SIZES, **IDS, "global_rope_theta": 5e4, "local_rope_theta": None}
    assert from_their_config(tmp_path, raw, "modernbert").local_rope_theta == 5e4


def test_another_theta_changes_global_layers_only(tmp_path):
    """No weight changes, and the model is the one that transformers has with this theta."""
    config = ModernBertConfig(**SIZES | IDS | {"num_hidden_layers": 4, "local_attention": 6})
    theirs = randomized(ModernBertForMaskedLM(config))
    theirs.save_pretrained(tmp_path)
    read = from_hf.read_and_resize(tmp_path, from_hf.ImportOptions(rope_theta=2e3))
    assert (read.config.rope_theta, read.config.local_rope_theta) == (2e3, 1e4)
    thetas = {"rope_parameters": None, "global_rope_theta": 2e3, "local_rope_theta": 1e4}
    changed = ModernBertForMaskedLM(ModernBertConfig(**config.to_dict() | thetas))
    changed.load_state_dict(theirs.state_dict())
    changed.save_pretrained(tmp_path / "changed")
    again = assert_same_logits(tmp_path / "changed", changed)
    assert again.config.to_dict() == read.config.to_dict()
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in read.weights.items())
    one_theta = read._replace(config=MegaBertConfig(**read.config.to_dict() | {"local_rope_theta": None}))
    found = change_rope_theta(one_theta, 5e4).config
    assert (found.rope_theta, found.local_rope_theta) == (5e4, 2e3), "local layers keep theirs"
    with pytest.raises(ValueError, match="--rope-theta: the model's position is alibi, not rope"):
        change_rope_theta(read._replace(config=MegaBertConfig()), 2e3)


def test_a_bare_modernbert_gets_a_head(tmp_path):
    config = ModernBertConfig(**SIZES | IDS)
    ModernBertForMaskedLM(config).model.save_pretrained(tmp_path)
    read = from_hf.read_model(tmp_path)
    assert read.initialized == ["decoder.bias", "transform.dense.weight", "transform.norm.weight"]


@pytest.mark.parametrize("types", [0, 1, 2])
def test_gte_folders_are_read(tmp_path, types):
    config = GteConfig(
        **SIZES, pad_token_id=0, type_vocab_size=types, rope_parameters={"rope_type": "default", "rope_theta": 2e4}
    )
    theirs = randomized(GteForMaskedLM(config))
    theirs.save_pretrained(tmp_path)
    read = assert_same_logits(tmp_path, theirs)
    assert (read.config.rope_theta, read.config.type_vocab_size) == (2e4, types)
    native = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items() if "decoder.weight" not in name}
    save_file(native, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = from_hf.read_model(tmp_path)
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in read.weights.items()), "names of the class"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_bias": True}, "attention_bias is True; this model supports only False"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'; this model supports only 'gelu'"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types is .* the first and then every k-th"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "RoPE is .* supports only rope_type 'default'"),
        ({"architectures": ["ModernBertForCausalLM"]}, "is a ModernBertForCausalLM, .* Convert the model that"),
        ({"local_attention": 1}, "local_attention_window is 1, expected a number from 2"),
        ({"mlp_dropout": 0.1}, "mlp_dropout 0.1; this model has one dropout for both. Set them to the same"),
        ({"global_attn_every_n_layers": 0, "layer_types": None}, "global_attn_every_n_layers is 0, expected a number"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False; this model supports only True"),
        ({"is_causal": True}, "is_causal is True; this model supports only False"),
        ({"causal_mask": True}, "causal_mask is True; this model supports only False"),
        ({"rope_theta": 7e4}, "rope_theta is 70000.0, which ModernBERT does not read: .* Set global_rope_theta"),
        ({"rope_parameters": {"rope_theta": 7e4}}, "rope_parameters has rope_theta, expected objects for full_att"),
        ({"rope_scaling": {"rope_theta": 7e4}}, "rope_scaling has a rope_theta. Set global_rope_theta there instead"),
        ({"sliding_window": 5}, "sliding_window is 5, but half of local_attention is 64.* Set local_attention"),
    ],
)  # fmt: skip
def test_what_this_model_cannot_compute_is_refused(modernbert_folder, tmp_path, change, reason):
    shutil.copytree(modernbert_folder, tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"config.json: .*{reason}"):
        from_hf.read_model(tmp_path / "in")


@pytest.fixture(scope="module")
def modernbert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modernbert")
    ModernBertForMaskedLM(ModernBertConfig(**SIZES | IDS)).save_pretrained(folder)
    return folder


def check_export(architecture, corpus, tmp_path):
    """Export a checkpoint; read the folder with transformers and with ours, and write the result again."""
    kind, cls = {"modernbert": ("modernbert", ModernBertForMaskedLM), "rope-mosaicbert": ("gte", GteForMaskedLM)}[
        architecture
    ]
    changes = EVEN | ARCHITECTURES[architecture] | {"attention_output_dropout_prob": 0.1}
    model = small_model(**changes)
    assert native_kind(model.config) == kind
    write_checkpoint(tmp_path / "run", model, corpus.tokenizer)
    to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf")
    folder = tmp_path / "hf"
    theirs, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs) is cls
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not list(folder.glob("*.py"))
    assert "trust_remote_code" not in (folder / "README.md").read_text()
    read = assert_same_logits(folder, theirs.eval())
    weights = read_checkpoint(tmp_path / "run")[0]
    assert weights.keys() == read.weights.keys()
    assert all(torch.equal(weights[name], read.weights[name]) for name in weights), "ours -> transformers' -> ours"
    written = tmp_path / "again"
    written.mkdir()
    shutil.copy(folder / "tokenizer.json", written)
    to_hf.write_model(written, read.weights, read.config, "5GB")
    first, second = (load_file(path / "model.safetensors") for path in (folder, written))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first), "transformers' -> ours -> transformers'"


@pytest.mark.usefixtures("skipped_checks")
@pytest.mark.parametrize("architecture", ["modernbert", "rope-mosaicbert"])
def test_models_become_transformers_own_and_come_back_bit_for_bit(architecture, corpus, tmp_path):
    check_export(architecture, corpus, tmp_path)


def test_a_roberta_names_its_bias_twice_since_transformers_4_needs_the_other_name(corpus, tmp_path):
    """check_transformers_versions.sh loads it with 4.50.3, which took zeros."""
    model = small_model(**EVEN | ARCHITECTURES["roberta"])
    shutil.copy(corpus.tokenizer / "tokenizer.json", tmp_path)
    named = to_hf.write_model(tmp_path, dict(model.state_dict()), model.config, "5GB")
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() - named.keys() == {"lm_head.decoder.bias"}
    assert torch.equal(weights["lm_head.decoder.bias"], model.decoder.bias)
    theirs, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(assert_same_logits(tmp_path, theirs.eval()).weights["decoder.bias"], model.decoder.bias)


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ["modernbert", "rope-mosaicbert"])
def test_the_check_in_a_foreign_process_passes(architecture, corpus, tmp_path):
    check_export(architecture, corpus, tmp_path)
    measured = json.loads((tmp_path / "hf/export.json").read_text())["measured"]
    assert measured["max_difference"] < 1e-4
    assert measured["largest_logit"] > 0.1
