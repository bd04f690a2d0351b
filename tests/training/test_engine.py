import dataclasses

import pytest
import torch

from megabert.config import OptimizerConfig, Recipe, RunConfig
from megabert.data.shards import open_source
from megabert.kernels.resolve import resolve, why_not_flash
from megabert.model.attention import PLANNERS
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.ops import TORCH_OPS
from megabert.training.engine import build_model, lr_factor, parameter_groups


def test_the_learning_rate_is_the_papers():
    """6 % warm-up, then linear to 2 % of the peak, over 70,000 steps."""
    config = OptimizerConfig()
    steps = 70_000
    factors = [lr_factor(step, steps, config) for step in (0, 4199, 4200, 37_100, 70_000)]
    assert factors == pytest.approx([1 / 4200, 1.0, 1.0, 0.51, 0.02])
    assert lr_factor(0, 1, dataclasses.replace(config, warmup=0.0)) == 1.0


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
