"""The model and its kernels, as the recipe and the device determine them."""

import dataclasses

import pytest
import torch

from megabert.config.recipe import Recipe, RunConfig
from megabert.data.shards.source import open_source
from megabert.kernels.resolve import resolve, why_not_flash
from megabert.model.attention import PLANNERS
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.ops import TORCH_OPS
from megabert.training.engine import build_model


def test_the_vocabulary_is_rounded_up(corpus):
    tokenizer = open_source(str(corpus.tokens)).tokenizer
    recipe = Recipe(run=RunConfig(max_steps=1))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_hidden_layers=1))
    assert tokenizer.vocab_size == 800
    assert build_model(recipe, tokenizer, torch.device("cpu"), bf16=False).config.vocab_size == 832


def test_the_choice_of_ops_is_logged(caplog):
    caplog.set_level("INFO")
    assert resolve("auto", torch.device("cpu"), MegaBertConfig(), bf16=False).attention is not None
    assert "ops: attention by document length; geglu, add_layer_norm" in caplog.text
    assert resolve("torch", torch.device("cpu"), MegaBertConfig(), bf16=False) == TORCH_OPS._replace(
        attention=PLANNERS["sdpa"]
    )
    with pytest.raises(ValueError, match="run.ops is fused, but flash-attn needs a CUDA device"):
        resolve("fused", torch.device("cpu"), MegaBertConfig(), bf16=True)


def test_flash_attention_is_refused_where_it_cannot_run():
    """As far as can be tested without a GPU."""
    assert (
        why_not_flash(torch.device("cpu"), MegaBertConfig(), bf16=True) == "flash-attn needs a CUDA device, this is cpu"
    )
