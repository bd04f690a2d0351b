"""Each recipe builds the published model with the published settings."""

import dataclasses

import pytest
import torch

from megabert.config.parser import RecipeParser
from megabert.data.shards.manifest import TokenizerInfo
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.engine import model_config
from megabert.training.schedule import lr_factor

SPECIAL = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
BERT_TOKENIZER = TokenizerInfo("bert-base-uncased", 30_522, SPECIAL, tuple(SPECIAL.values()))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mosaicbert-base", 137_400_384),
        ("mosaicbert-large", 435_221_312),
        ("bert-base", 109_514_298),
        ("bert-large", 335_174_458),
    ],
)
def test_parameter_counts_at_berts_vocabulary(name, parameters):
    recipe, _ = RecipeParser("pretrain", "").read(["--recipe", name])
    with torch.device("meta"):
        model = MegaBertForMaskedLM(model_config(recipe.model, BERT_TOKENIZER))
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_settings_are_those_of_the_paper():
    """mosaicml/examples v0.0.4, examples/bert/yamls/main/mosaic-bert-base-uncased.yaml."""
    recipe, _ = RecipeParser("pretrain", "").read(["--recipe", "mosaicbert-base"])
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
    mosaic, bert = (
        RecipeParser("pretrain", "").read(["--recipe", name])[0] for name in ("mosaicbert-base", "bert-base")
    )
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
