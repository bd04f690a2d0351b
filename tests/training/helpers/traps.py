"""Provoke DeepSpeed's traps one after the other in one process, and print what happened as one line of JSON.

test_traps.py lists the traps and what in MegaBERT avoids them.
"""

import json
import os
import shutil
import sys
import tempfile
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm.comm
import torch
from deepspeed.runtime.torch_autocast import get_comm_dtype
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.muon.original_muon import muon_update
from deepspeed.runtime.zero.utils import ZeRORuntimeException

from megabert.training.distributed.deepspeed_compat import convert_to_universal
from tests.training.helpers import path_traps

# The process that this one is forked from has changed it; without it, DeepSpeed makes it again.
vars(deepspeed.ops).pop("__compatible_ops__", None)
COMPATIBLE_BY_DEFAULT = bool(deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"])
# It would take a minute to build.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
BATCH = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": None}


def engine_with(**config: Any) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    groups = [{"params": [model.weight], "weight_decay": 0.5}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=BATCH | config)[0]


def step(engine: Any, factor: float = 1.0) -> None:
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(torch.ones(1, 8, dtype=dtype)).sum() * factor)
    engine.step()


def weights(engine: Any) -> torch.Tensor:
    return next(engine.module.parameters()).detach().float().clone()


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


def bf16_at_stage_0() -> int:
    """Return Adam's step count before the first step."""
    engine = engine_with(bf16={"enabled": True}, **zero(0))
    states = engine.optimizer.optimizer.state.values()
    return max((int(state["step"]) for state in states), default=0)


def nan_at_stage(stage: int) -> bool:
    """Return whether a gradient that is not a number reaches the weights."""
    engine = engine_with(**zero(stage))
    step(engine, float("nan"))
    return bool(weights(engine).isnan().any())


def norm_at_stage_0() -> bool:
    """Return whether DeepSpeed reports the norm that it clipped."""
    engine = engine_with(gradient_clipping=1.0, **zero(0))
    step(engine)
    return engine.get_global_grad_norm() is not None


def mistyped_stage() -> int:
    return engine_with(zero_optimisation={"stage": 2}).zero_optimization_stage()


def autocast_reduces_in() -> str:
    """Return the dtype in which a Linear's gradients are reduced under torch_autocast's defaults."""
    engine = engine_with(torch_autocast={"enabled": True, "dtype": "bfloat16"}, **zero(2))
    return str(get_comm_dtype(next(engine.module.parameters())))


def monitored() -> list[str]:
    """Return the names of the curves of DeepSpeed's own monitor."""
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_with(csv_monitor={"enabled": True, "output_path": folder, "job_name": "job"}, **zero(1))
        for _ in range(3):
            step(engine)
        return sorted(path.name for path in Path(folder).rglob("*.csv"))


def flipped_bit(stage: int) -> bool:
    """Return whether a checkpoint with one flipped bit loads without an error."""
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_with(**zero(stage))
        step(engine)
        engine.save_checkpoint(folder, tag="one")
        file = Path(folder, "one", "mp_rank_00_model_states.pt")
        raw = bytearray(file.read_bytes())
        value = weights(engine).numpy().tobytes()
        offset = raw.index(value)
        raw[offset + 2] ^= 0x40
        file.write_bytes(raw)
        other = engine_with(**zero(stage))
        return other.load_checkpoint(folder)[0] is not None and not torch.equal(weights(other), weights(engine))


def stage_is_an_enum() -> bool:
    """Return whether a checkpoint holds ZeRO's stage as a member of an enumeration."""
    return isinstance(engine_with(**zero(2)).optimizer.state_dict()["zero_stage"], Enum)


def loads_any_pickle() -> bool:
    """Return whether loading a checkpoint runs what a pickle in it says."""
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_with(**zero(1))
        step(engine)
        engine.save_checkpoint(folder, tag="one")
        file = Path(folder, "one", "mp_rank_00_model_states.pt")
        torch.save(torch.load(file, weights_only=False) | {"extra": _MakesFolder(folder)}, file)
        engine_with(**zero(1)).load_checkpoint(folder)
        return Path(folder, "made").exists()


class _MakesFolder:
    def __init__(self, folder: str):
        self.folder = folder

    def __reduce__(self):
        # It is loaded twice.
        return os.makedirs, (f"{self.folder}/made", 0o777, True)


def client_state_overwrites() -> int:
    """Return engine.global_steps after loading a checkpoint of step 1 whose client_state has 99."""
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_with(**zero(1))
        step(engine)
        engine.save_checkpoint(folder, tag="one", client_state={"global_steps": 99})
        other = engine_with(**zero(1))
        other.load_checkpoint(folder)
        return other.global_steps


def offload_refuses_torch() -> str:
    try:
        engine_with(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}})
    except ZeRORuntimeException as error:
        return str(error)
    return ""


def deprecated_collectives() -> bool:
    """Return whether DeepSpeed calls collectives by names that PyTorch has deprecated."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(engine_with(**zero(3)))
    return any("torch.distributed." in str(one.message) and one.category is FutureWarning for one in caught)


def all_gather_is_an_attribute() -> bool:
    """Return whether DeepSpeed's all-gather, as ZeRO calls it, goes through the attribute that can be replaced."""
    calls = []
    backend: Any = deepspeed.comm.comm.cdb
    usual = backend.all_gather_function
    backend.all_gather_function = lambda **options: (calls.append(options), usual(**options))[1]
    try:
        deepspeed.comm.all_gather_into_tensor(torch.zeros(3), torch.ones(3))
    finally:
        backend.all_gather_function = usual
    # One rank alone gathers nothing at stages 1 and 2.
    source = Path(deepspeed.__file__).parent / "runtime/utils.py"
    return len(calls) == 1 and "dist.all_gather_into_tensor(group_flat, partitioned" in source.read_text()


def norm_within_step() -> list[float]:
    """Return the engine's gradient norm and ZeRO's while the optimizer makes its second step."""
    engine = engine_with(**zero(2))
    step(engine)
    norms: list[float] = []
    usual = engine.optimizer.optimizer.step

    def observed_step(*args: Any, **options: Any) -> Any:
        norms[:] = [float(engine.get_global_grad_norm()), float(engine.optimizer._global_grad_norm)]
        return usual(*args, **options)

    engine.optimizer.optimizer.step = observed_step
    step(engine, 2.0)
    return norms


def flat_partitions() -> list[list[int]]:
    """Return the shapes of what the optimizer gets at each stage in place of a weight of 1 x 8 and a bias."""
    found = []
    for stage in (1, 2, 3):
        engine = engine_with(**zero(stage))
        shapes: list[int] = []
        usual = engine.optimizer.optimizer.step

        def observed_step(*args: Any, engine: Any = engine, shapes: list[int] = shapes, usual: Any = usual) -> Any:
            groups = engine.optimizer.optimizer.param_groups
            shapes.extend(size for group in groups for tensor in group["params"] for size in tensor.shape)
            return usual(*args)

        engine.optimizer.optimizer.step = observed_step
        step(engine)
        found.append(shapes)
    return found


def reads_norm_again() -> list[int]:
    """Return how often stage 1 checks the norm in a step that clips two groups, and how often it marks one with -1."""
    engine = engine_with(gradient_clipping=1.0, **zero(1))
    internals: Any = stage_1_and_2
    calls = {"is_invalid_grad_norm": 0, "mask_nan_or_inf_with_val_inplace": 0}
    usual = {name: getattr(internals, name) for name in calls}

    def counted(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return usual[name](*args, **options)

        return call

    for name in calls:
        setattr(internals, name, counted(name))
    try:
        step(engine)
    finally:
        for name in calls:
            setattr(internals, name, usual[name])
    return list(calls.values())


def one_rank_is_reduced() -> list[bool]:
    """Return whether stage 0 reduces the gradients of one rank, by default and where it is told not to."""
    found = []
    for reduces in (True, False):
        engine, buckets = engine_with(**zero(0)), []
        engine.enable_backward_allreduce = engine.enable_backward_allreduce and reduces
        usual = engine.allreduce_bucket

        def counted(*args: Any, usual: Any = usual, buckets: list[Any] = buckets, **options: Any) -> Any:
            buckets.append(args)
            return usual(*args, **options)

        engine.allreduce_bucket = counted
        step(engine)
        found.append(bool(buckets))
    return found


def gradients_move() -> bool:
    """Return whether reducing at stage 1 lets the tensors of gradients point at other memory."""
    engine = engine_with(**zero(1))
    gradients = [torch.ones_like(parameter) for parameter in engine.module.parameters()]
    addresses = [gradient.data_ptr() for gradient in gradients]
    for parameter, gradient in zip(engine.module.parameters(), gradients, strict=True):
        parameter.grad = gradient
    engine.set_gradient_accumulation_boundary(True)
    with engine.coalesce_grad_reduction():
        pass
    return [gradient.data_ptr() for gradient in gradients] != addresses


def numel_at_stage_3() -> list[int]:
    return [parameter.numel() for parameter in engine_with(**zero(3)).module.parameters()]


def saves_in_place() -> bool:
    """Return whether the files of a checkpoint are written to a folder that already has its final name."""
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_with(**zero(2))
        step(engine)
        written: list[str] = []
        usual = engine.checkpoint_engine.save
        engine.checkpoint_engine.save = lambda state_dict, path: (written.append(path), usual(state_dict, path))[1]
        engine.save_checkpoint(folder, tag="one")
        return bool(written) and all(Path(path).parent == Path(folder, "one") for path in written)


def refuses_another_world_size() -> bool:
    """Return whether a checkpoint that claims to be from 2 ranks is refused on one."""
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_with(**zero(2))
        step(engine)
        engine.save_checkpoint(folder, tag="one")
        [model_file] = Path(folder, "one").glob("*model_states.pt")
        state = torch.load(model_file, weights_only=False)
        torch.save(state | {"dp_world_size": 2}, model_file)
        [rank_0] = Path(folder, "one").glob("*optim_states.pt")
        shutil.copy(rank_0, str(rank_0).replace("pp_rank_0", "pp_rank_1"))
        try:
            engine_with(**zero(2)).load_checkpoint(folder, tag="one")
        except ZeRORuntimeException as error:
            return "world size of 2" in str(error)
    return False


def universal_load_at_stage_3() -> dict[str, Any]:
    """Return each group's weight decay, and how many tensors count steps, after a universal checkpoint was loaded."""
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_with(**zero(3))
        step(engine)
        engine.save_checkpoint(folder, tag="one")
        convert_to_universal(Path(folder, "one"), Path(folder, "two"))
        other = engine_with(checkpoint={"load_universal": True}, **zero(3))
        other.load_checkpoint(folder, tag="two")
        steps = {id(state["step"]) for state in other.optimizer.optimizer.state.values()}
        return {"weight_decay": [group["weight_decay"] for group in other.optimizer.param_groups], "steps": len(steps)}


def fragments_keep_graphs() -> list[bool]:
    """Return whether ZeRO's views of the parameters keep the graph that led to them, at stages 1 and 2."""
    engines = [engine_with(**zero(stage)) for stage in (1, 2)]
    return [
        any(weight._hp_mapping.lp_fragment.grad_fn is not None for weight in engine.module.parameters())
        for engine in engines
    ]


def converter_loops() -> list[str]:
    """Return the functions of the loops of DeepSpeed's converter, at stages 1 and 3."""
    names = []

    def share(do_work: Any, items: list[Any]) -> list[Any]:
        names.append(do_work.func.__name__)
        return [do_work(item) for item in items]

    for stage in (1, 3):
        with tempfile.TemporaryDirectory() as folder:
            engine = engine_with(**zero(stage))
            step(engine)
            engine.save_checkpoint(folder, tag="one")
            convert_to_universal(Path(folder, "one"), Path(folder, "two"), share)
    return names


def gathered_after_load() -> bool:
    """Return whether stage 3 leaves parameters gathered after loading a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_with(**zero(3))
        step(engine)
        engine.save_checkpoint(folder, tag="one")
        other = engine_with(**zero(3))
        before = {parameter.ds_status.name for parameter in other.module.parameters()}
        other.load_checkpoint(folder, tag="one")
        after = {parameter.ds_status.name for parameter in other.module.parameters()}
        return (before, after) == ({"NOT_AVAILABLE"}, {"AVAILABLE"})


def main() -> None:
    os.environ.update(RANK)
    deepspeed.init_distributed(verbose=False)
    found = {
        "shm_comm_by_default": COMPATIBLE_BY_DEFAULT,
        "bf16_at_stage_0": bf16_at_stage_0(),
        "compiles_muon": hasattr(muon_update, "_torchdynamo_orig_callable"),
        "deprecated_collectives": deprecated_collectives(),
        "all_gather_is_an_attribute": all_gather_is_an_attribute(),
        "nan_at_stage_0": nan_at_stage(0),
        "nan_at_stage_2": nan_at_stage(2),
        "norm_at_stage_0": norm_at_stage_0(),
        "norm_within_step": norm_within_step(),
        "flat_partitions": flat_partitions(),
        "reads_norm_again": reads_norm_again(),
        "one_rank_is_reduced": one_rank_is_reduced(),
        "gradients_move": gradients_move(),
        "numel_at_stage_3": numel_at_stage_3(),
        "mistyped_stage": mistyped_stage(),
        "autocast_reduces_in": autocast_reduces_in(),
        "monitored": monitored(),
        "saves_in_place": saves_in_place(),
        "flipped_bit_loads": flipped_bit(0),
        "client_state_overwrites": client_state_overwrites(),
        "loads_any_pickle": loads_any_pickle(),
        "stage_is_an_enum": stage_is_an_enum(),
        "nothing_to_load": path_traps.nothing_to_load(lambda: engine_with(**zero(1))),
        "folder_is_a_pattern": path_traps.folder_is_a_pattern(lambda: engine_with(**zero(0))),
        "folder_is_an_expression": path_traps.folder_is_an_expression(),
        "refuses_another_world_size": refuses_another_world_size(),
        "universal_load_at_stage_3": universal_load_at_stage_3(),
        "fragments_keep_graphs": fragments_keep_graphs(),
        "converter_loops": converter_loops(),
        "gathered_after_load": gathered_after_load(),
        "offload_refuses_torch": offload_refuses_torch(),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
