"""From a recipe to a model and its DeepSpeed engine."""

import logging
from typing import Any

import deepspeed
import torch
from torch import nn

from megabert.config.recipe import ModelConfig, Recipe
from megabert.data.shards.manifest import TokenizerInfo
from megabert.kernels.resolve import Implementation, resolve
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.deepspeed_compat import gate_optimizer_step, zero_norm_reader
from megabert.training.distributed.device import training_device
from megabert.training.optim import optimizers
from megabert.training.optim.guard import UpdateGate

log = logging.getLogger(__name__)


def model_config(config: ModelConfig, tokenizer: TokenizerInfo) -> MegaBertConfig:
    """The architecture for one tokenizer: its vocabulary, rounded up."""
    multiple = config.pad_vocab_to_multiple_of
    return MegaBertConfig(
        vocab_size=-(-tokenizer.vocab_size // multiple) * multiple,
        pad_token_id=tokenizer.special_ids["pad"],
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        position=config.position,
        ffn=config.ffn,
        layer_norm_dtype=config.layer_norm_dtype,
        layer_norm_eps=config.layer_norm_eps,
        hidden_dropout_prob=config.hidden_dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        initializer_range=config.initializer_range,
        z_loss=config.z_loss,
        padding=config.padding,
    )


def build_model(recipe: Recipe, tokenizer: TokenizerInfo, device: torch.device, bf16: bool) -> MegaBertForMaskedLM:
    """The model with its initial weights: the same for one seed, on any rank and any device."""
    torch.manual_seed(recipe.run.seed)
    model = MegaBertForMaskedLM(model_config(recipe.model, tokenizer))
    model.bert.encoder.checkpoint_every = recipe.model.checkpoint_every
    set_ops(model, resolve(recipe.run.ops, device, model.config, bf16))
    return model


def build_engine(
    model: nn.Module, recipe: Recipe, ds_config: dict[str, Any], verdict: UpdateGate
) -> deepspeed.DeepSpeedEngine:
    """Wrap the model for training under the filled ds_config. Its learning rate is set before every step.

    Raises ValueError for an optimizer or a compilation that would not work.
    """
    config = recipe.optimizer
    if recipe.run.compile and (reason := why_not_compile(training_device(), ds_config)):
        raise ValueError(reason)
    # On a CPU PyTorch's is as fast as DeepSpeed's CPUAdam (6 ms for 12 M parameters), which takes 44 s to compile first.
    optimizer = choose(recipe, ds_config).make(
        optimizers.parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0
    )
    gate_optimizer_step(optimizer, verdict.allows_step)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    if recipe.run.compile:
        engine.compile(compile_kwargs={"dynamic": True})  # in place: the names of the weights stay
    return engine


def why_not_compile(device: torch.device, ds_config: dict[str, Any]) -> str | None:
    """Say why torch.compile would not do for the whole model, or None. Not run on a GPU yet."""
    if device.type == "cpu":
        return (
            "run.compile true on a CPU: there run.ops auto compiles each operation already, and attention, which goes by the "
            "lengths of the documents, would compile anew at every step. Leave it false."
        )
    if ds_config.get("zero_optimization", {}).get("stage", 0) == 3:
        return "run.compile true at ZeRO 3: fetching weights breaks the graph in every layer. Use ZeRO 2, or leave it false."
    return None


def choose(recipe: Recipe, ds_config: dict[str, Any]) -> Implementation:
    """The recipe's optimizer for this device. Raises ValueError for one that would be wrong under this ds_config."""
    return optimizers.choose(recipe, ds_config, training_device())


def attach_guard(engine: deepspeed.DeepSpeedEngine, verdict: UpdateGate) -> None:
    """Tell the guard where the gradient's norm is: ZeRO computes it; at stage 0 it is the guard who clips."""
    if engine.zero_optimization_stage() == 0:
        verdict.clipped_parameters = list(engine.parameters())
    else:
        verdict.zero_norm = zero_norm_reader(engine)
