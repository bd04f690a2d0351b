"""Steps into DeepSpeed's traps, one after the other, in one process, and prints what happened as one line of JSON.

test_traps.py says which trap each is and where MegaBERT goes round it.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.torch_autocast import get_comm_dtype

COMPATIBLE_BY_DEFAULT = bool(deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"])
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would take a minute to build

RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
BATCH = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": None}


def engine_with(**config: Any) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
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
    """Adam's step count after no step at all."""
    engine = engine_with(bf16={"enabled": True}, **zero(0))
    states = engine.optimizer.optimizer.state.values()
    return max((int(state["step"]) for state in states), default=0)


def nan_at_stage(stage: int) -> bool:
    """Whether a gradient that is not a number reaches the weights."""
    engine = engine_with(**zero(stage))
    step(engine, float("nan"))
    return bool(weights(engine).isnan().any())


def norm_at_stage_0() -> bool:
    """Whether DeepSpeed says what it clipped."""
    engine = engine_with(gradient_clipping=1.0, **zero(0))
    step(engine)
    return engine.get_global_grad_norm() is not None


def mistyped_stage() -> int:
    return engine_with(zero_optimisation={"stage": 2}).zero_optimization_stage()


def autocast_reduces_in() -> str:
    """The dtype that gradients of a Linear are reduced in, under torch_autocast as it comes."""
    engine = engine_with(torch_autocast={"enabled": True, "dtype": "bfloat16"}, **zero(2))
    return str(get_comm_dtype(next(engine.module.parameters())))


def monitored() -> list[str]:
    """The names of what DeepSpeed's own TensorBoard gets."""
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_with(csv_monitor={"enabled": True, "output_path": folder, "job_name": "job"}, **zero(1))
        for _ in range(3):
            step(engine)
        return sorted(path.name for path in Path(folder).rglob("*.csv"))


def flipped_bit(stage: int) -> bool:
    """Whether a checkpoint with one flipped bit loads without a word."""
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_with(**zero(stage))
        step(engine)
        engine.save_checkpoint(folder, tag="one")
        file = Path(folder, "one", "mp_rank_00_model_states.pt")
        raw = bytearray(file.read_bytes())
        value = weights(engine).numpy().tobytes()
        place = raw.index(value)
        raw[place + 2] ^= 0x40
        file.write_bytes(raw)
        other = engine_with(**zero(stage))
        return other.load_checkpoint(folder)[0] is not None and not torch.equal(weights(other), weights(engine))


def client_state_overwrites() -> int:
    """What engine.global_steps is after loading a checkpoint of one step, whose client_state says 99."""
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_with(**zero(1))
        step(engine)
        engine.save_checkpoint(folder, tag="one", client_state={"global_steps": 99})
        other = engine_with(**zero(1))
        other.load_checkpoint(folder)
        return other.global_steps


def nothing_to_load() -> bool:
    """Whether loading from a folder without checkpoints goes on as if nothing had been asked."""
    with tempfile.TemporaryDirectory() as folder:
        return engine_with(**zero(1)).load_checkpoint(folder)[0] is None


def offload_refuses_torch() -> str:
    try:
        engine_with(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}})
    except deepspeed.runtime.zero.utils.ZeRORuntimeException as error:
        return str(error)
    return ""


def main() -> None:
    os.environ.update(RANK)
    deepspeed.init_distributed(verbose=False)
    found = {
        "shm_comm_by_default": COMPATIBLE_BY_DEFAULT,
        "bf16_at_stage_0": bf16_at_stage_0(),
        "nan_at_stage_0": nan_at_stage(0),
        "nan_at_stage_2": nan_at_stage(2),
        "norm_at_stage_0": norm_at_stage_0(),
        "mistyped_stage": mistyped_stage(),
        "autocast_reduces_in": autocast_reduces_in(),
        "monitored": monitored(),
        "flipped_bit_loads": flipped_bit(0),
        "client_state_overwrites": client_state_overwrites(),
        "nothing_to_load": nothing_to_load(),
        "offload_refuses_torch": offload_refuses_torch(),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
