"""Measure the time that Python needs to launch a micro-batch: the least time per micro-batch, however fast the GPU is.

    python tests/benchmarks/bench_host.py [--quick] [--json FILE]

The model has the layers of mosaicbert-base and a width of 32, on 16 tokens of the CPU, so that arithmetic takes almost
no time. Triton's kernels go through Triton's own launch path, compiled for an H100, up to a launch that does nothing;
PyTorch's operations run. A step of 4 micro-batches: bare, a loop of PyTorch alone; zero0 to zero2, training/loop.py's
take_step with DeepSpeed. Modes alternate; figures are medians of this process's CPU time on one thread, per
micro-batch. What CUDA itself needs to launch is not in them. Not run on a GPU.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from support.report import read_arguments, write
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from megabert.config.ds_config import ResolvedDsConfig, read_ds_config
from megabert.config.recipe_parser import ds_config_path, load_recipe
from megabert.data.batch import Bin, PackedBatch, Shapes, lay_out
from megabert.data.masking import masked_count
from megabert.data.shards.manifest import TokenizerInfo
from megabert.data.stream import MASKING, philox
from megabert.kernels.resolve import triton_ops
from megabert.model.layers import set_ops
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training import engine as engine_module
from megabert.training import loop
from megabert.training.distributed.process import init_distributed
from megabert.training.plan import RunPlan, make_plan
from megabert.training.telemetry.reporter import Meter
from megabert.training.updates.guard import Guard, UpdateGate
from megabert.training.updates.optimizers import parameter_groups

MICRO_BATCHES = 4
ROUNDS, QUICK_ROUNDS, WARM_UP = 30, 10, 3
TOKENS = 16
TOKENIZER = TokenizerInfo("f" * 64, 512, {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}, (0, 2, 3))
STAGES = (0, 1, 2)
CPU = torch.device("cpu")
# What no kernel has written is 0 with 255 here, so that gradients are finite. glibc reads it as the process starts.
ZEROS = "MALLOC_PERTURB_"


class NoLaunch:
    """Triton's driver of an H100 that is not there: kernels are compiled for it, and launches do nothing."""

    def __init__(self) -> None:
        self.launches = 0
        # Triton asks for the name.
        self.utils = SimpleNamespace(load_binary=lambda *arguments: (1, 1, 0, 0, 1024), get_device_properties=_h100)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.launches += 1

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return CPU


def _h100(device: int) -> dict[str, int]:
    return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}


def make_batch(index: int) -> PackedBatch:
    """Make a bin of two documents."""
    ids = np.random.default_rng(index).integers(5, TOKENIZER.vocab_size, TOKENS)
    shapes = Shapes(TOKENS, 4, masked_count(TOKENS, 0.3))
    return lay_out(
        Bin([ids], np.array([TOKENS // 2, TOKENS // 2])),
        shapes,
        index=index,
        max_seq_len=TOKENS,
        mlm_probability=0.3,
        tokenizer=TOKENIZER,
        rng=philox(17, MASKING, index),
    )


def plan_of(stage: int) -> RunPlan:
    recipe = load_recipe(
        "mosaicbert-base",
        model={"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
        data={
            "max_seq_len": TOKENS,
            "micro_batch_tokens": TOKENS,
            "global_batch_tokens": MICRO_BATCHES * TOKENS,
        },
        run={"ops": "torch"},
    )
    return make_plan(recipe, read_ds_config(ds_config_path(f"zero{stage}")), 0, 1)


def model_of(plan: RunPlan) -> MegaBertForMaskedLM:
    model = engine_module.build_model(plan.recipe, TOKENIZER, CPU, True)
    set_ops(model, triton_ops())
    return model.train()


def bare_step(batches: list[PackedBatch]) -> Callable[[], None]:
    """Return a step of a plain PyTorch loop."""
    plan = plan_of(0)
    model = model_of(plan)
    optimizer = torch.optim.AdamW(parameter_groups(model, plan.recipe.optimizer), lr=1e-4, fused=True)

    def step() -> None:
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(**batch.model_inputs(CPU))
            (output.loss_sum / TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def engine_step(stage: int, batches: list[PackedBatch]) -> Callable[[], None]:
    """Return a step of training/loop.py with DeepSpeed."""
    plan = plan_of(stage)
    model, gate = model_of(plan), UpdateGate(Guard(0.0), plan.recipe.optimizer.max_grad_norm)
    settings: dict[str, Any] = plan.ds_config.settings | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    if stage:
        # As many buckets as mosaicbert-base has with those of ds_configs.
        # An even number.
        bucket = sum(parameter.numel() for parameter in model.parameters()) // 6 * 2 + 2
        buckets = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        settings["zero_optimization"] = settings["zero_optimization"] | buckets
    engine = engine_module.build_engine(plan, model, ResolvedDsConfig(settings), gate)
    run: Any = SimpleNamespace(plan=plan, engine=engine, graph=None, gate=gate, meter=Meter(None))
    num_masked = torch.tensor(float(TOKENS))

    def step() -> None:
        loop.take_step(run, batches, num_masked)
        run.gate.finish_step()

    return step


def main() -> None:
    arguments = read_arguments(__doc__ or "")
    if ZEROS not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {ZEROS: "255"})
    torch.set_num_threads(1)
    # It takes 0.3 ms for the smallest product.
    torch.backends.mkldnn.set_flags(False)
    no_launch = NoLaunch()
    driver.set_active(no_launch)
    init_distributed()
    batches = [make_batch(index) for index in range(MICRO_BATCHES)]
    steps = {"bare": bare_step(batches)} | {f"zero{stage}": engine_step(stage, batches) for stage in STAGES}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    launches = {}
    for round_index in range(WARM_UP + (QUICK_ROUNDS if arguments.quick else ROUNDS)):
        for name, step in steps.items():
            before, began = no_launch.launches, time.process_time()
            step()
            spent = time.process_time() - began
            launches[name] = (no_launch.launches - before) / MICRO_BATCHES
            if round_index >= WARM_UP:
                seconds[name].append(spent / MICRO_BATCHES)
    figures = {f"host_ms_{name}": 1000 * statistics.median(spent) for name, spent in seconds.items()}
    print("| loop | ms per micro-batch | over bare | launches of Triton |\n|---|---|---|---|")
    for name in steps:
        ms = figures[f"host_ms_{name}"]
        print(f"| {name} | {ms:.1f} | {ms / figures['host_ms_bare']:.2f} | {launches[name]:.0f} |")
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
