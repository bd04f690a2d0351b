"""From a recipe to a DeepSpeed engine: process group, device, model, parameter groups, schedule.

The only file beside kernels/resolve.py that asks what device this is.
"""

import ctypes
import logging
import os
import resource
import socket
import warnings
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from megabert.config.recipe import ModelConfig, Recipe
from megabert.data.shards.manifest import TokenizerInfo
from megabert.kernels.resolve import Implementation, resolve
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.distributed.gloo import gather_in_place
from megabert.training.optim import optimizers
from megabert.training.optim.guard import Verdict, hold_back

log = logging.getLogger(__name__)

# A rank waits this long for the others: while rank 0 prepares the quickstart's corpus, nothing moves for a minute or two.
# A rank that dies is noticed at once all the same (roll_call.py).
TIMEOUT = timedelta(minutes=30)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h; see mallopt(3)


def start_process() -> tuple[int, int]:
    """Join the process group, from whatever launched this process. Returns (rank, world size).

    Understands the deepspeed launcher, torchrun and srun; alone, a process is rank 0 of 1.
    """
    # DeepSpeed 0.19.8 calls collectives by names that PyTorch is about to change: nothing for a user to do.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed would compile this operation, which training does not use, for over a minute at every first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    if "SLURM_STEP_ID" in os.environ:  # inside srun; the batch script's own shell has SLURM_PROCID too
        for ours, theirs in slurm.items():
            os.environ.setdefault(ours, os.environ[theirs])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()) if os.environ["WORLD_SIZE"] == "1" else "29500")
    if "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    deepspeed.init_distributed(timeout=TIMEOUT, verbose=False)
    if training_device().type == "cpu":  # asked on a GPU too: it sets the device that NCCL sends objects from
        keep_freed_memory()
        gather_in_place()
    return deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()


def keep_freed_memory() -> None:
    """Let malloc keep what is freed for the next allocation, as the allocators of GPUs do. Does nothing without glibc.

    By default every large tensor is mapped anew, and each 4 kB of it costs a page fault when they are first written to: a
    tenth of a step's time. What the process has used once it now holds to its end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def training_device() -> torch.device:
    """The accelerator of this rank."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(accelerator.current_device_name())


def device_name(device: torch.device) -> str:
    """As torch calls the card, or cpu."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def device_event() -> Any:
    """The accelerator's class of events, or None for a CPU."""
    return get_accelerator().Event


def peak_memory(device: torch.device) -> int:
    """Bytes, the most that this process has used so far: of the device, as its allocator says; on a CPU resident memory."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return get_accelerator().max_memory_allocated()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively. On a CPU that does not, bf16 is several times slower than fp32."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return get_accelerator().is_bf16_supported()


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
    model: nn.Module, recipe: Recipe, ds_config: dict[str, Any], verdict: Verdict
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
    hold_back(optimizer, verdict.allowed)
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


def attach_guard(engine: deepspeed.DeepSpeedEngine, verdict: Verdict) -> None:
    """Tell the guard where the gradient's norm is: ZeRO computes it; at stage 0 it is the guard who clips."""
    if engine.zero_optimization_stage() == 0:
        verdict.parameters = list(engine.parameters())
    else:
        optimizer: Any = engine.optimizer
        verdict.norm_of_zero = lambda: optimizer._global_grad_norm
