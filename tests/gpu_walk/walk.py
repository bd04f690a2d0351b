"""Take steps of the real training loop on a fake CUDA device and print what happened there, as one line of JSON.

    LD_PRELOAD=LIBRARY python tests/gpu_walk/walk.py RECIPE ZERO_STAGE RANKS MICRO_BATCHES LAYERS FP8

It is rank 0 of RANKS, whose collectives do nothing. The first step warms up, the second is the one that is described,
and an evaluation after it; then, where run.cuda_graphs can be true, the capture of a micro-batch and a step of replays;
then updates that the guard refuses, saving, and a run that resumes from there with run.compile.
"""

import contextlib
import json
import math
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megabert.config.ds_config import read_ds_config
from megabert.config.recipe_parser import ds_config_path, load_recipe
from megabert.data.batch import Bin, PackedBatch, Shapes, lay_out
from megabert.data.masking import masked_count
from megabert.data.shards.manifest import TokenizerInfo
from megabert.data.stream import MASKING, Position, philox
from megabert.kernels.resolve import triton_ops
from megabert.model.layers import Block
from megabert.training import engine as engine_module
from megabert.training import loop
from megabert.training.checkpointing import resume
from megabert.training.checkpointing.writer import copy_to_host
from megabert.training.distributed import deepspeed_compat, device
from megabert.training.distributed.deepspeed_compat import capture_checkpoint
from megabert.training.evaluate import evaluate
from megabert.training.micro_batch.graph import WARM_UPS, MicroBatchGraph
from megabert.training.plan import make_plan
from megabert.training.run import TrainState
from megabert.training.telemetry.flops import step_flops
from megabert.training.telemetry.reporter import Meter
from megabert.training.telemetry.timers import TimeBudget
from megabert.training.unsupported import why_not_cuda_graphs
from megabert.training.updates.guard import MIN_NORMS, Guard, UpdateGate
from tests.gpu_walk import fake_cuda
from tests.gpu_walk.fake_cuda import LOG

# Of BERT's own tokenizer.
VOCAB = 30_522
TOKENIZER = TokenizerInfo("f" * 64, VOCAB, {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}, (0, 100, 101))
# Of a micro-batch, where the recipe leaves it open.
TOKENS = 14_720
# Of C4's documents, truncated to 128 tokens.
MAX_SEQ_LEN, MEAN_PIECE = 128, 115
# Where the host reads the gradient's norm, at ZeRO 1 and 2, and at stage 0.
READS_NORM = (
    "megabert/training/distributed/deepspeed_compat.py:__call__",
    "megabert/training/updates/guard.py:allows_step",
)

# StableAdamW's number of the step, which it keeps on the host.
STEP_NUMBER = {"megabert/training/updates/optimizers.py:_stable_adamw_step": 2.0}


def make_batch(index: int, bin_tokens: int, probability: float) -> PackedBatch:
    """Make a full bin of pieces, most of which have MAX_SEQ_LEN tokens."""
    rng = np.random.default_rng(index)
    lengths = np.where(rng.random(bin_tokens) < 0.75, MAX_SEQ_LEN, rng.integers(20, MAX_SEQ_LEN, bin_tokens))
    count = int(np.searchsorted(lengths.cumsum(), bin_tokens))
    lengths = np.append(lengths[:count], bin_tokens - lengths[:count].sum())
    ids = rng.integers(1000, VOCAB, bin_tokens)
    shapes = Shapes(bin_tokens, -(-5 * bin_tokens // (4 * MEAN_PIECE)), masked_count(bin_tokens, probability))
    return lay_out(
        Bin([ids], lengths),
        shapes,
        index=index,
        max_seq_len=MAX_SEQ_LEN,
        mlm_probability=probability,
        tokenizer=TOKENIZER,
        rng=philox(17, MASKING, index),
    )


def put_on_device(model: nn.Module) -> nn.Module:
    """Replace the parameters by fake ones on "cuda"; Module.to() cannot move fake tensors."""
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in moved:
                    moved[parameter] = nn.Parameter(torch.empty(parameter.shape, device="cuda"))
                module._parameters[name] = moved[parameter]
    nn.Module.to = lambda module, *arguments, **options: module  # pyrefly: ignore[bad-assignment]
    return model


def start_ranks(ranks: int) -> None:
    """Become rank 0 of so many."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    deepspeed_compat.skip_shm_comm_build()
    deepspeed.init_distributed(dist_backend="fake", verbose=False)


def start(
    recipe_name: str, stage: int, ranks: int, micro_batches: int, layers: int, fp8: str, compiled: bool = False
) -> types.SimpleNamespace:
    """Build what training/loop.py needs of a Run: the real plan, engine, gate and meter."""
    given = load_recipe(recipe_name).data.micro_batch_tokens
    tokens = TOKENS if given == "auto" else given
    recipe = load_recipe(
        recipe_name,
        data={
            "micro_batch_tokens": tokens,
            "global_batch_tokens": micro_batches * ranks * tokens,
            "batch_warmup": 0,
            "batch_warmup_from": None,
        },
        model={"num_hidden_layers": layers},
        run={"cuda_graphs": False, "compile": compiled, "fp8": fp8},
    )
    plan = make_plan(recipe, read_ds_config(ds_config_path(f"zero{stage}")), 0, ranks)
    engine_module.resolve = lambda *arguments: triton_ops()  # pyrefly: ignore[bad-assignment]
    use_fp8 = engine_module.use_fp8
    engine_module.use_fp8 = lambda model, _: use_fp8(model, torch.device("cuda"))  # pyrefly: ignore[bad-assignment]
    model: Any = put_on_device(
        engine_module.build_model(plan.recipe, TOKENIZER, torch.device("cpu"), plan.ds_config.bf16)
    )
    state = TrainState(Guard(recipe.run.max_norm_ratio), TimeBudget(None))
    gate = UpdateGate(state.guard, recipe.optimizer.max_grad_norm)
    made = [make_batch(index, tokens, recipe.masking.mlm_probability) for index in range(micro_batches)]
    return types.SimpleNamespace(
        plan=plan,
        state=state,
        engine=engine_module.build_engine(plan, model, plan.ds_config, gate),
        graph=None,
        gate=gate,
        batches=made,
        meter=Meter(fake_cuda.Event),
        signals=types.SimpleNamespace(reason=None, interrupting=contextlib.nullcontext, first_step_done=lambda: None),
        writer=types.SimpleNamespace(problem=None),
        reporter=None,
    )


class Kept:
    """Counts the bytes that autograd keeps for the backward pass, without the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.device.type == "cuda" and storage._cdata not in self.parameters:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def describe(run: types.SimpleNamespace) -> dict[str, Any]:
    """Describe the logged step."""
    model = run.engine.module
    batch, count = run.batches[0], len(run.batches)
    tokens = batch.shapes.bin_tokens
    # A padded baseline needs its padding.
    slots = batch.num_documents * batch.max_seqlen if model.config.padding == "padded" else tokens
    masked = len(batch.masked_positions)
    needed = step_flops(model.config, slots, masked, 0)
    # Its last layer computes every slot.
    if model.config.padding == "padded":
        width = model.config.hidden_size
        needed += 6 * (slots - masked) * (width * width + 2 * width * model.config.intermediate_size)
    # The loss is one operation.
    in_operations = 6 * masked * model.config.hidden_size * model.config.vocab_size
    return {
        "waits": dict(LOG.waits),
        "launches_per_micro_batch": sum(LOG.launches.values()) / count,
        "launches": dict(LOG.launches.most_common()),
        "flops_over_needed": LOG.flops / count / (needed - in_operations),
        "wide_products": LOG.wide_products,
        "tokens": tokens,
        "masked": masked,
        "slots": slots,
        "vocabulary": model.config.vocab_size,
        "layers": model.config.num_hidden_layers,
        "weights": sum(parameter.numel() for parameter in model.parameters()),
    }


def walk(run: types.SimpleNamespace) -> dict[str, Any]:
    """Take two steps and describe the second."""
    model = run.engine.module
    residual: set[str] = set()
    reduced: set[str] = set()
    gradients: set[str] = set()

    def described(tensor: torch.Tensor) -> str:
        return f"{tensor.dtype} {tensor.device.type}"

    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda module, inputs, out: residual.update(map(described, out)))
    all_reduce = torch.distributed.all_reduce

    def reducing(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if LOG.on and tensor.numel() > 16:
            reduced.add(str(tensor.dtype))
        return all_reduce(tensor, *arguments, **options)

    torch.distributed.all_reduce = reducing
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradients.add(described(gradient)))
    run.feed = ((batch, 0, Position()) for _ in range(3) for batch in run.batches)
    loop.train_step(run)
    states, LOG.peak = LOG.live, 0
    LOG.on = True
    loop.train_step(run)
    LOG.on = False
    found = describe(run) | {"state_bytes": states, "peak_bytes": LOG.peak, "updates": updates()}
    kept = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        output = run.engine(**run.batches[0].model_inputs(run.engine.device))
    found |= {"kept_bytes": kept.bytes, "loss_dtype": str(output.loss_sum.dtype), "steps_applied": run.meter.steps}
    return found | {"residual": sorted(residual), "reduced": sorted(reduced), "gradients": sorted(gradients)}


def walk_graph(run: types.SimpleNamespace) -> dict[str, Any]:
    """Take steps with a CUDA graph and describe the last, which only replays it."""
    device.warm_up, device.capture = lambda work: work(), fake_cuda.capture
    run.graph = MicroBatchGraph(run.engine.module, run.plan.ds_config.bf16)
    steps = -(-(WARM_UPS + 1) // len(run.batches))
    run.feed = ((batch, 0, Position()) for _ in range(steps + 1) for batch in run.batches)
    LOG.reset()
    for _ in range(steps):
        loop.train_step(run)
    found = {"captured": LOG.captured, "not_captured": {name: n for name, n in LOG.not_captured.items() if n}}
    LOG.on = True
    loop.train_step(run)
    LOG.on = False
    return found | {"waits": dict(LOG.waits), "launches_per_micro_batch": sum(LOG.launches.values()) / len(run.batches)}


def refused_updates(run: types.SimpleNamespace) -> list[dict[str, Any]]:
    """Take a step whose norm is infinite, and one whose norm is far above those before it; describe both."""
    run.state.guard.norms.extend([1.0] * MIN_NORMS)
    found = []
    for norm in (math.inf, 1000.0):
        run.feed = ((batch, 0, Position()) for batch in run.batches)
        LOG.answers = STEP_NUMBER | dict.fromkeys(READS_NORM, norm)
        LOG.reset()
        LOG.on = True
        loop.train_step(run)
        LOG.on = False
        found.append({"waits": dict(LOG.waits), "updates": updates(), "in_a_row": run.state.guard.skipped_in_a_row})
    LOG.answers = STEP_NUMBER
    return found


def updates() -> int:
    """Count the launches of the optimizer's update: AdamW's, or StableAdamW's of the first moment."""
    return sum(count for name, count in LOG.launches.items() if "adamw" in name or "lerp" in name)


def save_and_resume(
    run: types.SimpleNamespace, arguments: tuple[str, int, int, int, int, str], folder: Path
) -> dict[str, Any]:
    """Save, load that into the engine of another run, which is compiled as a whole, and take two steps there."""
    LOG.reset()
    LOG.on = True
    files = capture_checkpoint(run.engine, copy_to_host)
    LOG.on = False
    found: dict[str, Any] = {"saving": dict(LOG.waits), "saved_bytes": 0}
    # Their content is not written, only its size.
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        for name, content in files.items():
            torch.save(content, folder / name)
            found["saved_bytes"] += (folder / name).stat().st_size
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_module: Any = nn.Module.compile
    # Inductor would make code for the device.
    nn.Module.compile = lambda module, **options: compile_module(module, **(options | {"backend": backend}))
    resumed = start(*arguments, compiled=True)
    LOG.reset()
    LOG.on = True
    resume.load(resumed.engine, folder, resumed.plan.rank, resumed.plan.world_size)
    LOG.on = False
    found["resuming"] = dict(LOG.waits)
    resumed.feed = ((batch, 0, Position()) for _ in range(2) for batch in resumed.batches)
    loop.train_step(resumed)
    LOG.reset()
    LOG.on = True
    loop.train_step(resumed)
    LOG.on = False
    return found | {"compiled": dict(LOG.waits), "graphs": len(graphs), "compiled_updates": updates()}


def main() -> None:
    fake_cuda.install()
    arguments = (sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6])
    with fake_cuda.fake_device(), LOG, tempfile.TemporaryDirectory() as folder:
        start_ranks(arguments[2])
        run = start(*arguments)
        LOG.answers = STEP_NUMBER
        found = walk(run)
        LOG.reset()
        # A count to divide by.
        LOG.on, LOG.answer = True, 1.0
        evaluate(run.engine, run.batches)
        found["evaluation_waits"] = dict(LOG.waits)
        LOG.on, LOG.answer = False, 0.0
        if why_not_cuda_graphs(run.plan.recipe, run.plan.ds_config, "cuda") is None:
            found["graph"] = walk_graph(run)
            run.graph = None
        found["refused"] = refused_updates(run)
        found |= save_and_resume(run, arguments, Path(folder))
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Not by the interpreter's own end: a thread of autograd's device that waits for the GIL then is ended by force, and
    # C++ answers with std::terminate.
    os._exit(0)
