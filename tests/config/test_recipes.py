"""Each recipe builds the published model with the published settings."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import GteConfig, GteForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from megabert.config.ds_config import ResolvedDsConfig
from megabert.convert.hf.native import to_gte_config, to_modernbert_config
from megabert.data.shards.manifest import TokenizerInfo
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.architecture import architecture_of
from megabert.training.run_schedule import lr_factor
from megabert.training.updates.unsupported_optimizers import why_not_optimizer
from tests.helpers.recipes import read_recipe

SPECIAL = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
MODERNBERT_SPECIAL = {"unk": 50_280, "cls": 50_281, "sep": 50_282, "pad": 50_283, "mask": 50_284}
MODERNBERT_TOKENIZER = TokenizerInfo("ModernBERT", 50_368, MODERNBERT_SPECIAL, tuple(MODERNBERT_SPECIAL.values()))
BERT_TOKENIZER = TokenizerInfo("bert-base-uncased", 30_522, SPECIAL, tuple(SPECIAL.values()))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mosaicbert-base", 137_400_384),
        ("mosaicbert-large", 435_221_312),
        ("mosaicbert-rope-base", 137_400_384),
        ("bert-base", 109_514_298),
        ("bert-large", 335_174_458),
    ],
)
def test_parameter_counts_at_berts_vocabulary(name, parameters):
    recipe = read_recipe("--recipe", name)
    with torch.device("meta"):
        model = MegaBertForMaskedLM(architecture_of(recipe.model, BERT_TOKENIZER.vocab_size))
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_settings_are_those_of_the_paper():
    """mosaicml/examples v0.0.4, examples/bert/yamls/main/mosaic-bert-base-uncased.yaml."""
    recipe = read_recipe("--recipe", "mosaicbert-base")
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (5e-4, (0.9, 0.98), 1e-6)
    # Composer multiplies weights by 1 - (lr / lr_0) * 1e-5, torch by 1 - lr * weight_decay.
    assert optimizer.lr * optimizer.weight_decay == pytest.approx(1e-5)
    assert optimizer.decay_norms_and_biases
    assert optimizer.max_grad_norm == 0
    assert recipe.run.max_steps == 70_000
    assert lr_factor(70_000, 70_000, optimizer) == pytest.approx(0.02)
    assert (recipe.masking.mlm_probability, recipe.masking.eval_mlm_probability) == (0.3, 0.15)
    assert (recipe.data.max_seq_len, recipe.data.documents, recipe.run.seed) == (128, "truncate", 17)


def test_the_baseline_differs_only_where_the_paper_says():
    mosaic, bert = (read_recipe("--recipe", name) for name in ("mosaicbert-base", "bert-base"))
    assert bert.optimizer == mosaic.optimizer
    assert bert.data == mosaic.data
    assert bert.masking.mlm_probability == 0.15
    different = {
        field.name
        for field in dataclasses.fields(bert.model)
        if getattr(bert.model, field.name) != getattr(mosaic.model, field.name)
    }
    assert different == {
        "position",
        "ffn",
        "layer_norm_dtype",
        "attention_dropout",
        "padding",
        "pad_vocab_to_multiple_of",
    }


@pytest.mark.parametrize("name", ["mosaicbert-rope-base", "modernbert-base", "modernbert-large", "modernbert-continue"])
def test_parameter_counts_are_those_of_transformers_classes(name):
    tokenizer = BERT_TOKENIZER if name.startswith("mosaic") else MODERNBERT_TOKENIZER
    recipe = read_recipe("--recipe", name)
    config = architecture_of(recipe.model, tokenizer.vocab_size, tokenizer.special_ids["pad"])
    make, cls, model_cls = (
        (to_gte_config, GteConfig, GteForMaskedLM)
        if name.startswith("mosaic")
        else (to_modernbert_config, ModernBertConfig, ModernBertForMaskedLM)
    )
    with torch.device("meta"):
        ours, theirs = MegaBertForMaskedLM(config), model_cls(cls(**make(config, {})))
    counts = []
    for model in (ours, theirs):
        model.tie_weights()
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    assert counts[0] == counts[1]
    # Published: 149 M, 395 M.
    if name == "modernbert-base":
        assert round(counts[0] / 1e6) == 150
    if name == "modernbert-large":
        assert round(counts[0] / 1e6) == 396


def test_the_architecture_of_modernbert_is_the_default_of_transformers():
    recipe = read_recipe("--recipe", "modernbert-base")
    config = architecture_of(recipe.model, MODERNBERT_TOKENIZER.vocab_size, MODERNBERT_SPECIAL["pad"])
    made = ModernBertConfig(**to_modernbert_config(config, {})).to_dict()
    published = ModernBertConfig().to_dict()
    own = {"max_position_embeddings", "architectures", "dtype", "global_rope_theta", "local_rope_theta"}
    # layer_norm_eps repeats norm_eps for vLLM.
    own |= {"global_attn_every_n_layers", "classifier_dropout", "layer_norm_eps"}
    different = {name for name in published.keys() | made.keys() if made.get(name) != published.get(name)}
    assert different <= own


def test_modernbert_continue_is_modernbert_base():
    base, more = (read_recipe("--recipe", f"modernbert-{name}") for name in ("base", "continue"))
    assert dataclasses.replace(more.model, init_from=None) == base.model
    assert lr_factor(1000, 1000, more.optimizer) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("path", sorted(Path("megabert/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_runs_at_zero_2(path):
    recipe = read_recipe("--recipe", path.stem)
    assert why_not_optimizer(recipe.optimizer, ResolvedDsConfig({"zero_optimization": {"stage": 2}})) is None
