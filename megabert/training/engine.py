"""Build the model and its DeepSpeed engine from the plan, and optionally restore them from a checkpoint."""

from pathlib import Path

import deepspeed
import torch

from megabert.config.ds_config import ResolvedDsConfig
from megabert.config.recipe import Recipe
from megabert.data.masking import masked_count
from megabert.data.shards.manifest import TokenizerInfo
from megabert.data.shards.source import Corpus
from megabert.kernels.fp8 import use_fp8
from megabert.kernels.resolve import resolve
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.architecture import architecture_of
from megabert.training.checkpointing import resume, universal
from megabert.training.checkpointing.initial_weights import load_initial_weights
from megabert.training.checkpointing.resume import Checkpoint
from megabert.training.distributed.deepspeed_compat import (
    gate_optimizer_step,
    install_norm_reader,
    optimizer_partitions,
    skip_compiler_of_muon_on_cpus,
    skip_reduction_of_one_rank,
)
from megabert.training.distributed.heartbeat import watch_compiler
from megabert.training.plan import RunPlan
from megabert.training.updates.guard import UpdateGate
from megabert.training.updates.optimizers import Partition, StableAdamW, parameter_groups


def start_engine(
    plan: RunPlan, corpus: Corpus, gate: UpdateGate, checkpoint: Checkpoint | None
) -> deepspeed.DeepSpeedEngine:
    """Build the model and its engine, with initial weights or with the state of a checkpoint."""
    model = build_model(plan.recipe, corpus.tokenizer, plan.device, plan.ds_config.bf16)
    # The folder may not fit the recipe, so it is read before operations are compiled, which takes a minute.
    if plan.recipe.model.init_from and checkpoint is None:
        load_initial_weights(model, Path(plan.recipe.model.init_from), corpus.sources[0])
    if plan.device.type == "cpu":
        compile_operations(plan, model)
    ds_config = plan.ds_config
    if checkpoint is not None and universal.needs_conversion(checkpoint.state, ds_config.zero_stage, plan.world_size):
        ds_config = ds_config.with_universal_loading()
    engine = build_engine(plan, model, ds_config, gate)
    watch_compiler()
    if checkpoint is not None:
        resume.load(engine, checkpoint.path, plan.rank, plan.world_size)
    return engine


def compile_operations(plan: RunPlan, model: MegaBertForMaskedLM) -> None:
    """Compile the operations that the model uses on a CPU, if they are compiled ones."""
    # Imported here because the import loads inductor, which GPUs do without.
    from megabert.kernels.cpu.ahead import compile_ahead

    tokens = plan.recipe.data.bin_tokens
    masked = masked_count(tokens, plan.schedule.masking.highest)
    compile_ahead(model.config, model.decoder.ops, plan.ds_config.bf16, tokens, masked)


def build_model(recipe: Recipe, tokenizer: TokenizerInfo, device: torch.device, bf16: bool) -> MegaBertForMaskedLM:
    """Build the model with its initial weights, which depend on the seed only, not on rank or device."""
    config = architecture_of(recipe.model, tokenizer.vocab_size, tokenizer.special_ids["pad"])
    ops = resolve(recipe.run.ops, device, config, bf16)
    torch.manual_seed(recipe.run.seed)
    model = MegaBertForMaskedLM(config)
    model.bert.encoder.checkpoint_every = recipe.model.checkpoint_every
    set_ops(model, ops)
    if recipe.run.fp8 == "torchao":
        use_fp8(model, device)
    return model


def build_engine(
    plan: RunPlan, model: MegaBertForMaskedLM, ds_config: ResolvedDsConfig, gate: UpdateGate
) -> deepspeed.DeepSpeedEngine:
    """Wrap the model for training. The training loop sets the learning rate before every step.

    ds_config: the plan's, or the plan's with what loading a universal checkpoint needs.
    """
    config = plan.recipe.optimizer
    if config.name == "muon" and ds_config.zero_stage > 0:
        skip_compiler_of_muon_on_cpus()
    # On a CPU PyTorch's is as fast as DeepSpeed's CPUAdam (6 ms for 12 M parameters), which compiles for 44 s first.
    optimizer = plan.optimizer.make(
        parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0
    )
    gate_optimizer_step(optimizer, gate.allows_step)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config.settings)
    if isinstance(optimizer, StableAdamW) and plan.ds_config.zero_stage > 0:
        optimizer.partitions = {flat: Partition(*held) for flat, held in optimizer_partitions(engine).items()}
    if plan.recipe.run.compile:
        model.bert.encoder.keep_slopes(next(model.parameters()).device)
        # In place, so that the names of the weights stay the same. Shapes are fixed within a phase of the run; torch
        # makes dynamic what changes. With dynamic=True it would do so with the numbers that the Triton kernels take,
        # and then cannot trace those (torch 2.13: "lift_tracked_freevar_to_input").
        engine.compile()
    # At stage 0 the guard computes the gradient's norm and clips; above, ZeRO does.
    if plan.ds_config.zero_stage == 0:
        gate.parameters_to_clip = list(engine.parameters())
        if plan.world_size == 1:
            skip_reduction_of_one_rank(engine)
    else:
        gate.read_zero_norm = install_norm_reader(engine)
    return engine


def model_of(engine: deepspeed.DeepSpeedEngine) -> MegaBertForMaskedLM:
    """Return the model inside the engine."""
    model = engine.module
    assert isinstance(model, MegaBertForMaskedLM), (
        f"the engine holds a {type(model).__name__}, expected a MegaBertForMaskedLM"
    )
    return model
