"""Hold every import and replacement of DeepSpeed 0.19.8's internals, except Muon, which updates/optimizers.py imports.

files/pickles.py and convert/deepspeed_checkpoint.py know the format of its files.

Each function names its canary: a test of tests/training/test_traps.py that fails once DeepSpeed no longer needs the
function.
"""

import contextlib
import copyreg
import functools
import glob
import io
import math
import os
import re
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from enum import Enum
from importlib import import_module
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import deepspeed.comm.comm
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import nn
from torch.serialization import safe_globals

from megabert.files.pickles import DEEPSPEED_CLASSES, GETATTR

# Keys of a parameter group that are not its settings: DeepSpeed's own list, and what the training loop sets before
# each step.
NOT_SETTINGS = ("params", "lr")
# torch.load reads this environment variable in every call; it outweighs the argument weights_only.
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# A loop of DeepSpeed's: takes a function and all of its arguments, and returns all results.
ShareWork = Callable[[Callable[[Any], Any], list[Any]], list[Any]]
_DEEPSPEED_NAMES = [name.rsplit(".", 1) for name in DEEPSPEED_CLASSES]


def skip_shm_comm_build() -> None:
    """Tell DeepSpeed not to compile its shared-memory collectives, which takes over a minute at the first start.

    Training does not use them. Canary: shm_comm_by_default.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def ignore_deprecated_collectives() -> None:
    """Hide PyTorch's warnings about names of collectives that DeepSpeed still calls. Canary: deprecated_collectives."""
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def pickle_enums_by_value() -> None:
    """Pickle ZeRO's stage as its number, as newer Pythons do. Canary: stage_is_an_enum."""
    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


def enum_member(enumeration: type[Enum], name: str) -> Enum:
    """Return what getattr returns for an enumeration. Raises ValueError for anything else. Canary: stage_is_an_enum."""
    if not (isinstance(enumeration, type) and issubclass(enumeration, Enum) and name in enumeration.__members__):
        raise ValueError(f"a checkpoint asks for the attribute {name!r} of {enumeration!r}, which it does not need.")
    return enumeration[name]


def replace_all_gather(all_gather: Callable[..., object]) -> None:
    """Let ZeRO gather weights with another function than torch.distributed.all_gather_into_tensor; same signature.

    gloo's own implementation allocates buffers in every call. Canary: all_gather_is_an_attribute, which notices that
    the replacement has no effect; two_rank_efficiency of tests/benchmarks/bench_engine.py shows whether it is still
    needed.
    """
    backend: Any = deepspeed.comm.comm.cdb
    backend.all_gather_function = all_gather


def gate_optimizer_step(optimizer: torch.optim.Optimizer, allows_step: Callable[[], bool]) -> None:
    """Make optimizer.step() do nothing whenever allows_step() returns False.

    ZeRO computes the gradient norm inside engine.step() and then calls the wrapped optimizer, once per parameter group;
    so that call is the only point where an update can be stopped at every stage. Canary: nan_at_stage_0.
    """
    step = optimizer.step

    def gated_step(*args: Any, **options: Any) -> Any:
        return step(*args, **options) if allows_step() else None

    optimizer.step = gated_step  # pyrefly: ignore[bad-assignment]


def install_norm_reader(engine: deepspeed.DeepSpeedEngine) -> Callable[[], float]:
    """Return a function that reads the current step's gradient norm while ZeRO 1, 2 or 3 calls the wrapped optimizer.

    engine.get_global_grad_norm() still returns the previous step's norm at that moment. Canary: norm_within_step.
    """
    optimizer: Any = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return lambda: float(optimizer._global_grad_norm)
    check = _NormCheck()
    replace_norm_checks(check)
    # ZeRO may be told not to check the norm before it calls the optimizer (bf16.check_grad_overflow).
    return lambda: check.take() if check.is_new else float(optimizer._global_grad_norm)


class _NormCheck:
    """ZeRO's test of a gradient norm, which reads it from the device once, and keeps it for the guard."""

    def __init__(self) -> None:
        self.norm: object = None
        self.value = math.nan
        self.is_new = False

    def __call__(self, norm: Any) -> bool:
        if norm is not self.norm:
            self.norm, self.value, self.is_new = norm, float(norm), True
        return not math.isfinite(self.value) or self.value < 0

    def take(self) -> float:
        """Return the norm that was read last. Losses are not scaled, so it is the gradient's."""
        self.is_new = False
        return self.value


def replace_norm_checks(is_invalid: Callable[[Any], bool]) -> None:
    """Replace ZeRO 1 and 2's norm check, and overwrite invalid norms without a host-to-device copy.

    ZeRO itself reads the same norm again for every group that it clips, and copies the number -1 to the device for
    every group, which makes the host wait each time. Canary: reads_norm_again.
    """

    def mark_invalid(norm: torch.Tensor, device: object = None, val: float = -1.0) -> None:
        norm.masked_fill_(~torch.isfinite(norm), val)

    internals: Any = stage_1_and_2
    internals.is_invalid_grad_norm = is_invalid
    internals.mask_nan_or_inf_with_val_inplace = mark_invalid


def optimizer_partitions(engine: deepspeed.DeepSpeedEngine) -> dict[torch.Tensor, tuple[list[slice], list[int]]]:
    """Map each flat tensor that ZeRO 1, 2 or 3 passes to the optimizer to the parameters inside it.

    Returns the parts and numels of each one, as in updates/optimizers.py Partition. Canary: flat_partitions.
    """
    optimizer: Any = engine.optimizer
    partitions = {}
    if engine.zero_optimization_stage() == 3:
        groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        for flat, parameters in groups:
            ends = list(accumulate(parameter.partition_numel() for parameter in parameters))
            partitions[flat] = (
                [slice(*pair) for pair in pairwise([0, *ends])],
                [parameter.ds_numel for parameter in parameters],
            )
        return partitions
    for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        begin = dist.get_rank(group=optimizer.real_dp_process_group[index]) * flat.numel()
        numels = [parameter.numel() for parameter in optimizer.round_robin_bit16_groups[index]]
        bounds = zip(optimizer.round_robin_bit16_offsets[index], numels, strict=True)
        ends = [(offset - begin, offset + numel - begin) for offset, numel in bounds]
        parts = [slice(*(min(max(end, 0), flat.numel()) for end in both)) for both in ends]
        partitions[flat] = (parts, numels)
    return partitions


def skip_reduction_of_one_rank(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let a single rank at ZeRO stage 0 keep its gradients where they are.

    DeepSpeed copies all of them into one buffer, "reduces" it over the one rank, and copies them back.
    Canary: one_rank_is_reduced.
    """
    engine.enable_backward_allreduce = False


def free_accumulators(engine: deepspeed.DeepSpeedEngine) -> None:
    """Free the nodes of autograd that collect the parameters' gradients, so that each forward pass makes its own.

    ZeRO 1 and 2 keep a view of each parameter with the graph that led to it, and so a node that was made on the default
    stream. A backward pass waits for a node's stream, which ends the capture of a CUDA graph on another stream.
    Loading a checkpoint makes the views again. Canary: fragments_keep_graphs.
    """
    model: Any = engine.module
    for parameter in model.parameters():
        if (fragment := getattr(parameter, "_hp_mapping", None)) is not None:
            fragment.lp_fragment = fragment.lp_fragment.detach()


def reduce_once(engine: deepspeed.DeepSpeedEngine, gradients: list[torch.Tensor]) -> None:
    """Set the gradients and reduce them once, as the step's last backward does; ZeRO 0 and 1 only.

    gradients: summed over this rank's micro-batches, one for each of the module's parameters; their memory stays the
    caller's. Canary: gradients_move.
    """
    model: Any = engine.module
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        # Another tensor of the same memory: ZeRO lets the tensor that it gets point at a buffer of its own.
        parameter.grad = gradient.detach()
    engine.set_gradient_accumulation_boundary(True)
    if engine.zero_optimization_stage() > 0:
        # It reduces when the block ends.
        with engine.coalesce_grad_reduction():
            pass
    elif engine.enable_backward_allreduce:
        engine.allreduce_gradients()


@functools.cache
def skip_compiler_of_muon_on_cpus() -> None:
    """Let DeepSpeed's compiled function of Muon run without torch.compile on CPU tensors, at all ZeRO stages.

    There the compiler takes as long as many steps of a small model, and nearly all of the function's time is in
    matrix products, which it does not change. Canary: compiles_muon.
    """
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    compiled = original_muon.muon_update

    def muon_update(grad: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        stance = torch.compiler.set_stance("force_eager") if grad.is_cpu else contextlib.nullcontext()
        with stance:
            return compiled(grad, *arguments, **options)

    original_muon.muon_update = muon_optimizer.muon_update = muon_update


def num_parameters(model: nn.Module) -> int:
    """Count the whole model's parameters, also those that ZeRO 3 has partitioned. Canary: numel_at_stage_3."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


@contextlib.contextmanager
def loading_only_weights() -> Iterator[None]:
    """Let every torch.load in the block, all of which are DeepSpeed's, build nothing but tensors and DEEPSPEED_CLASSES.

    DeepSpeed asks torch to run whatever a pickle says. Canary: loads_any_pickle.
    """
    classes: list[Any] = [
        (getattr(import_module(module), name), f"{module}.{name}") for module, name in _DEEPSPEED_NAMES
    ]
    classes.append((enum_member, GETATTR))
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        with safe_globals(classes):
            yield
    finally:
        os.environ.pop(FORCE_WEIGHTS_ONLY)
        if before is not None:
            os.environ[FORCE_WEIGHTS_ONLY] = before


class _CaptureEngine(TorchCheckpointEngine):
    """A checkpoint engine that keeps each file's content in `files`, by file name, and writes nothing."""

    def __init__(self, transform: Callable[[object], object] | None) -> None:
        super().__init__(None)
        self.transform = transform
        self.files: dict[str, object] = {}

    def save(self, state_dict: object, path: str) -> None:
        self.files[os.path.basename(path)] = self.transform(state_dict) if self.transform else state_dict


def capture_checkpoint(
    engine: deepspeed.DeepSpeedEngine, transform: Callable[[object], object] | None = None
) -> dict[str, object]:
    """Return what engine.save_checkpoint would write on this rank, by file name; every rank calls this.

    transform: applied to the content of each file. DeepSpeed writes its files under their final names, so that a crash
    leaves an incomplete checkpoint. Canary: saves_in_place.
    """
    capture, usual = _CaptureEngine(transform), engine.checkpoint_engine
    engine.checkpoint_engine = capture
    try:
        # DeepSpeed also copies its script zero_to_fp32.py into the folder that it saves to.
        with tempfile.TemporaryDirectory() as scratch:
            engine.save_checkpoint(scratch, tag="state", save_latest=False)
    finally:
        engine.checkpoint_engine = usual
    return capture.files


def convert_to_universal(checkpoint: Path, out: Path, share: ShareWork | None = None) -> None:
    """Write a checkpoint in DeepSpeed's universal format, which any number of ranks can load. Call on one rank.

    share: runs the loops over the files, then over the parameters, in place of DeepSpeed. Raises OSError or
    RuntimeError (from torch) if it cannot be written. Canary: refuses_another_world_size; of share: converter_loops.
    """
    options = Namespace(
        input_folder=str(checkpoint),
        output_folder=str(out),
        # No worker processes: a fork would copy gloo's locks in whatever state its threads hold them.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    usual = ds_to_universal._do_parallel_work
    if share is not None:
        ds_to_universal._do_parallel_work = lambda do_work, work_chunks, num_workers: share(do_work, list(work_chunks))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(options)
    finally:
        ds_to_universal._do_parallel_work = usual


def group_settings(engine: deepspeed.DeepSpeedEngine) -> list[dict[str, Any]]:
    """Return the settings of each parameter group, for `repair_universal_load`."""
    optimizer: Any = engine.optimizer
    return [{key: value for key, value in group.items() if key not in NOT_SETTINGS} for group in optimizer.param_groups]


def repair_universal_load(engine: deepspeed.DeepSpeedEngine, settings: list[dict[str, Any]]) -> None:
    """Restore the parameter groups after a universal checkpoint was loaded. settings: `group_settings` before the load.

    At stage 3 every group gets the first group's settings (weight decay on norms and biases), and all share one `step`
    tensor, which then advances once per group. At every stage `step` is in host memory, and PyTorch's fused AdamW
    refuses it where the parameters are on a GPU. Canary: universal_load_at_stage_3.
    """
    optimizer: Any = engine.optimizer
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    fused = any(values.get("fused") for values in settings)
    for parameter, state in optimizer.optimizer.state.items():
        if torch.is_tensor(step := state.get("step")):
            state["step"] = step.to(parameter.device if fused else step.device, copy=True)


@contextlib.contextmanager
def literal_folder(folder: Path) -> Iterator[None]:
    """Let DeepSpeed find and convert files in a folder whose name is no pattern, such as run[1] or lr+1.

    DeepSpeed would find the files of run1, or none, and its converter takes the name for a regular expression, too.
    Canary: folder_is_a_pattern and folder_is_an_expression.
    """
    find, expressions, name = glob.glob, ds_to_universal.re, str(folder)

    def escaped(pattern: str, escape: Callable[[str], str]) -> str:
        return escape(name) + pattern[len(name) :] if pattern.startswith(name) else pattern

    def find_literally(pathname: str, **options: Any) -> list[str]:
        return find(escaped(pathname, glob.escape), **options)

    def compile_literally(pattern: str, flags: int = 0) -> re.Pattern[str]:
        return re.compile(escaped(pattern, re.escape), flags)

    glob.glob = find_literally  # pyrefly: ignore[bad-assignment]
    internals: Any = ds_to_universal
    internals.re = SimpleNamespace(**vars(re) | {"compile": compile_literally})
    try:
        yield
    finally:
        glob.glob, internals.re = find, expressions


def partition_after_load(engine: deepspeed.DeepSpeedEngine) -> None:
    """Partition the small parameters that ZeRO 3 leaves gathered after load_checkpoint; a no-op at other stages.

    Otherwise the first backward may end with "The size of tensor a (0) must match". Canary: gathered_after_load.
    """
    engine.empty_partition_cache()
