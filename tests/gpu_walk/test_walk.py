"""The real training step on a fake CUDA device: what the host waits for, precisions, products, bytes and launches.

Nothing is computed: tensors have shapes only. What a GPU computes, and how fast, these tests cannot say.
"""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megabert.config.ds_config import read_ds_config
from megabert.config.recipe_parser import ds_config_path, load_recipe
from megabert.training.micro_batch.batch import Batch
from megabert.training.micro_batch.memory import Execution, Memory, memory_of_rank
from tests.gpu.parts import few_waits
from tests.helpers.runs import REPOSITORY

pytestmark = [pytest.mark.compiler, pytest.mark.triton]

HERE = Path(__file__).parent
LIBRARY = "no_op_cuda"
MICRO_BATCHES = 2

# Every wait of a step that is allowed, and why. None of them may happen more than once in a step, so none between
# micro-batches, but EPILOGUE at ZeRO 2: with overlap_comm it waits after every micro-batch. So ZeRO 1 is faster.
OF_EVERY_STAGE = {"read(tolist) megabert/training/loop.py:reduce_counts": "the step's counts, and whether to stop"}
# A rank that has no more batches must stop all before the step, whose collectives would wait for it. Its host can tell
# the others only through the device's all-reduce, or through another one that it would wait for as long.
OF_SEVERAL_RANKS = {
    "read(item) megabert/training/loop.py:sum_masked": "whether every rank has batches, while the device has no work"
}
OF_STAGE_0 = {
    "read(float) megabert/training/updates/guard.py:allows_step": "the guard checks the norm before the update"
}
EPILOGUE = "synchronize deepspeed/runtime/zero/stage_1_and_2.py:independent_gradient_partition_epilogue"
FLUSH = "synchronize deepspeed/runtime/engine.py:_flush_coalesced_reduction_zero12"
OF_ZERO = {
    "read(float) megabert/training/distributed/deepspeed_compat.py:__call__": "DeepSpeed and the guard check the norm",
    EPILOGUE: "DeepSpeed reduces the last gradients",
}

SKIPPED = {"objects megabert/training/loop.py:log_skipped_update": "the places of the bins, for skipped.jsonl"}
TAG = "deepspeed/runtime/engine.py:_checkpoint_tag_validation"
OF_SAVING = {
    "copy megabert/training/checkpointing/writer.py:_host_copy": "every tensor that this rank writes",
    f"copy {TAG}": "DeepSpeed compares the ranks' tags",
    f"read(bool) {TAG}": "the same",
}
OF_RESUMING = {
    "objects megabert/training/distributed/sync.py:gather_dicts": "whether every rank finds its files sound",
    "copy deepspeed/runtime/engine.py:load_module_state_dict": "the weights",
    "copy deepspeed/runtime/engine.py:_load_checkpoint": "the optimizer's state at stage 0",
    "copy deepspeed/runtime/zero/stage_1_and_2.py:_load_legacy_checkpoint": "the optimizer's state of ZeRO",
}

# Operations on the device per micro-batch at ZeRO 1, with MICRO_BATCHES in a step, by recipe, ranks and layers. A
# single rank owns every gradient, and DeepSpeed takes the norm of each. Of StableAdamW's update, once in a step, there
# are 83, three of them for each parameter that the rank holds a part of.
LAUNCHES = {
    ("mosaicbert-base", 8, 2): 205,
    ("mosaicbert-base", 1, 12): 935.5,
    ("mosaicbert-base", 8, 12): 727,
    ("modernbert-base", 8, 12): 802.5,
    ("bert-base", 1, 12): 1081,
    ("bert-base", 8, 12): 853,
}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes torch believe in a CUDA device."""
    spec = find_spec("torch")
    assert spec is not None
    torch = Path(str(spec.origin)).parent
    built = tmp_path_factory.mktemp("library") / f"{LIBRARY}.so"
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
    command = ["g++", *flags, str(HERE / f"{LIBRARY}.cpp"), "-o", str(built), "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return built


def walk(library: Path, recipe: str, stage: int, ranks: int, layers: int, fp8: str = "none") -> dict[str, Any]:
    """Run walk.py and return what it prints."""
    spec = find_spec("torch")
    assert spec is not None
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(Path(str(spec.origin)).parent / "lib"),
        "PYTHONPATH": str(REPOSITORY),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE / "walk.py"), recipe, *map(str, (stage, ranks, MICRO_BATCHES, layers)), fp8]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def allowed_waits(stage: int, ranks: int) -> dict[str, int]:
    """How often each allowed wait may happen in a step."""
    allowed = OF_EVERY_STAGE | (OF_ZERO if stage else OF_STAGE_0) | (OF_SEVERAL_RANKS if ranks > 1 else {})
    return dict.fromkeys(allowed, 1) | ({EPILOGUE: MICRO_BATCHES} if stage == 2 else {})


def predicted_memory(recipe: str, stage: int, ranks: int, found: dict[str, Any], fp8: str = "none") -> Memory:
    """What the formula behind data.micro_batch_tokens auto says of the micro-batch that was walked."""
    batch = Batch(tokens=found["tokens"], slots=found["slots"], masked=found["masked"], attended=0)
    model = dataclasses.replace(load_recipe(recipe).model, num_hidden_layers=found["layers"])
    zero = read_ds_config(ds_config_path(f"zero{stage}")).values.zero_optimization
    execution = Execution(fp8=fp8 != "none")
    return memory_of_rank(model, batch, execution, vocab_size=found["vocabulary"], zero=zero, ranks=ranks)


def check_memory(found: dict[str, Any], memory: Memory) -> None:
    assert found["kept_bytes"] == pytest.approx(memory.kept, rel=0.1)
    assert found["peak_bytes"] <= memory.states + memory.kept + memory.work <= 1.25 * found["peak_bytes"]


def check_other_steps(found: dict[str, Any], allowed: dict[str, int], stage: int, ranks: int) -> None:
    """Check refused updates, saving, resuming, and the steps of the resumed run, whose model is compiled."""
    assert found["updates"] > 0
    for number, refused in enumerate(found["refused"], 1):
        assert (refused["updates"], refused["in_a_row"]) == (0, number)
        assert too_many(refused["waits"], allowed | dict.fromkeys(SKIPPED, 1)) == {}
    assert found["saving"].keys() == OF_SAVING.keys()
    weights = found["weights"]
    expected = 12 * weights if stage == 0 else (4 + 12 / ranks) * weights
    assert found["saved_bytes"] == pytest.approx(expected, rel=0.01)
    assert found["resuming"].keys() <= OF_RESUMING.keys()
    assert too_many(found["compiled"], allowed) == {}
    assert found["compiled_updates"] == found["updates"]
    # One more where the number of rows, which differs between bins, has become dynamic.
    assert 1 <= found["graphs"] <= 2


def too_many(waits: dict[str, int], allowed: dict[str, int]) -> dict[str, int]:
    return {wait: count for wait, count in waits.items() if count > allowed.get(wait, 0)}


def check_graph(found: dict[str, Any], allowed: dict[str, int], eager_launches: float) -> None:
    """Check a captured micro-batch and a step of replays. FLUSH waits for a stream that has nothing to do yet."""
    assert found["captured"] > eager_launches
    assert found["not_captured"] == {}, "a graph would repeat these with old values"
    assert too_many(found["waits"], allowed) == {}
    # What is left is the reduction and the update.
    assert found["launches_per_micro_batch"] < eager_launches / 2


@pytest.mark.parametrize(
    ("recipe", "stage", "ranks", "layers"),
    [
        ("mosaicbert-base", 1, 8, 2),
        *(
            pytest.param(recipe, stage, ranks, 12, marks=pytest.mark.nightly)
            for recipe, stage, ranks in [
                *product(("mosaicbert-base", "bert-base"), (0, 1, 2), (1, 8)),
                ("modernbert-base", 1, 8),
            ]
        ),
    ],
)
def test_a_step_on_a_gpu(library, recipe, stage, ranks, layers):
    found = walk(library, recipe, stage, ranks, layers)
    assert found["steps_applied"] == 2
    allowed = allowed_waits(stage, ranks)
    assert too_many(found["waits"], allowed) == {}
    for waits in (found["waits"], found.get("graph", found)["waits"]):
        # Those of one rank, which tests/gpu/accept.py counts on a GPU.
        alone = sum(count for name, count in waits.items() if name not in OF_SEVERAL_RANKS)
        assert few_waits(str(stage), alone, MICRO_BATCHES, 0, {})
    assert found["evaluation_waits"] == {"read(tolist) megabert/training/evaluate.py:evaluate": 1}
    residual = "torch.bfloat16 cuda" if recipe.startswith("mosaic") else "torch.float32 cuda"
    assert found["residual"] == [residual]
    assert found["gradients"] == ["torch.float32 cuda"]
    assert found["reduced"] == ["torch.float32"] or (ranks == 1 and not found["reduced"])
    assert found["loss_dtype"] == "torch.float32"
    assert found["wide_products"] == 0
    assert 0.9 <= found["flops_over_needed"] <= 1.1
    check_memory(found, predicted_memory(recipe, stage, ranks, found))
    if stage < 2 and recipe != "bert-base":
        check_graph(found["graph"], allowed | ({FLUSH: 1} if stage else {}), found["launches_per_micro_batch"])
    check_other_steps(found, allowed, stage, ranks)
    if stage == 1:
        assert found["launches_per_micro_batch"] == pytest.approx(LAUNCHES[recipe, ranks, layers], rel=0.05)


@pytest.mark.fp8
@pytest.mark.nightly
@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_in_fp8_reads_and_copies_nothing_more(library, stage):
    """torchao's scales stay on the device, so a graph can hold them, and the whole model is compiled as one graph."""
    found, allowed = walk(library, "mosaicbert-base", stage, 8, 2, "torchao"), allowed_waits(stage, 8)
    assert too_many(found["waits"], allowed) == {}
    assert found["gradients"] == ["torch.float32 cuda"]
    check_memory(found, predicted_memory("mosaicbert-base", stage, 8, found, "torchao"))
    check_graph(found["graph"], allowed | ({FLUSH: 1} if stage else {}), found["launches_per_micro_batch"])
    check_other_steps(found, allowed, stage, 8)
    # Each of two layers has four maps, and each map six casts: without run.compile they are kernels of their own.
    assert found["launches_per_micro_batch"] > 2 * LAUNCHES["mosaicbert-base", 8, 2]
