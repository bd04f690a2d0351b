import dataclasses

import pytest
import torch

from megabert.config.recipe import Recipe, RunConfig
from megabert.data.shards.source import open_source
from megabert.kernels.resolve import resolve, why_not_flash
from megabert.model.attention import PLANNERS
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.ops import TORCH_OPS
from megabert.training.engine import build_model, why_not_compile


def test_the_vocabulary_is_rounded_up(corpus):
    tokenizer = open_source(str(corpus.tokens)).tokenizer
    recipe = Recipe(run=RunConfig(max_steps=1))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_hidden_layers=1))
    assert tokenizer.vocab_size == 800
    assert build_model(recipe, tokenizer, torch.device("cpu"), bf16=False).config.vocab_size == 832


def test_ops_are_resolved_aloud(caplog):
    caplog.set_level("INFO")
    assert resolve("auto", torch.device("cpu"), MegaBertConfig(), bf16=False).attention is not None
    assert "ops: attention by document length; geglu, add_layer_norm" in caplog.text
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


def test_the_whole_model_is_compiled_on_a_gpu_below_stage_3_only():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert "run.ops auto compiles each operation already" in str(why_not_compile(cpu, {}))
    assert "Use ZeRO 2" in str(why_not_compile(cuda, {"zero_optimization": {"stage": 3}}))
    for stage in range(3):
        assert why_not_compile(cuda, {"zero_optimization": {"stage": stage}}) is None
