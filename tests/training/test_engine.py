import dataclasses

import pytest
import torch

from megabert.config import Recipe, RunConfig
from megabert.data.shards import open_source
from megabert.kernels.resolve import resolve, why_not_flash
from megabert.model.attention import PLANNERS
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.ops import TORCH_OPS
from megabert.training.engine import build_model, parameter_groups


def test_every_parameter_lands_in_one_group(corpus):
    tokenizer = open_source(str(corpus.tokens)).tokenizer
    recipe = Recipe(run=RunConfig(max_steps=1))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_hidden_layers=1))
    model = build_model(recipe, tokenizer, torch.device("cpu"), bf16=False)
    decay, rest = parameter_groups(model, recipe.optimizer)
    assert decay["weight_decay"] == recipe.optimizer.weight_decay
    assert rest["weight_decay"] == 0.0
    assert all(p.dim() > 1 for p in decay["params"])
    assert all(p.dim() == 1 for p in rest["params"])
    whole = parameter_groups(model, dataclasses.replace(recipe.optimizer, decay_norms_and_biases=True))
    assert len(whole) == 1
    assert len(whole[0]["params"]) == len(list(model.parameters()))


def test_the_vocabulary_is_rounded_up(corpus):
    tokenizer = open_source(str(corpus.tokens)).tokenizer
    recipe = Recipe(run=RunConfig(max_steps=1))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_hidden_layers=1))
    assert tokenizer.vocab_size == 800
    assert build_model(recipe, tokenizer, torch.device("cpu"), bf16=False).config.vocab_size == 832


def test_ops_are_resolved_aloud(caplog):
    caplog.set_level("INFO")
    assert resolve("auto", torch.device("cpu"), MegaBertConfig(), bf16=False).attention is not None
    assert "ops: attention by document length, the rest fused by torch.compile" in caplog.text
    assert resolve("torch", torch.device("cpu"), MegaBertConfig(), bf16=False) == TORCH_OPS._replace(
        attention=PLANNERS["sdpa"]
    )
    with pytest.raises(ValueError, match="run.ops is fused, but flash-attn needs a CUDA device"):
        resolve("fused", torch.device("cpu"), MegaBertConfig(), bf16=True)


def test_flash_attention_is_left_to_models_it_can_compute():
    """As far as can be asked without a GPU: the reasons, in the order they are found."""
    assert (
        why_not_flash(torch.device("cpu"), MegaBertConfig(), bf16=True) == "flash-attn needs a CUDA device, this is cpu"
    )
