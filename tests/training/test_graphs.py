"""CUDA graphs of micro-batches: a stand-in on the CPU gives the same bits as the usual step. No GPU has run them."""

import contextlib
import dataclasses
import functools
import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megabert.config.ds_config import ResolvedDsConfig
from megabert.config.recipe import may_change_at_resume
from megabert.config.recipe_parser import RecipeParser
from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.data.batch import PackedBatch, Shapes
from megabert.kernels.resolve import Machine, why_not_all_fused
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.training import plan as plan_module
from megabert.training.distributed import device
from megabert.training.micro_batch.graph import WARM_UPS, MicroBatchGraph
from megabert.training.telemetry.provenance import start_messages
from megabert.training.unsupported import choose_cuda_graphs
from tests.helpers.recorded_graph import record
from tests.helpers.runs import (
    TINY,
    Corpus,
    finish_ranks,
    last_of_each,
    patched,
    pretrain_command,
    start_ranks,
)
from tests.model.helpers.small import small_model
from tests.training.helpers.plans import plan as plan_of_cpu

CUDA = torch.device("cuda")
# Dropout everywhere, recomputed layers, two lengths, steps of one to four micro-batches, evaluations in between.
EVERYTHING = [
    "--run.max_steps=8",
    "--run.eval_every_steps=3",
    "--model.hidden_dropout=0.1",
    "--model.attention_dropout=0.1",
    "--model.gradient_checkpointing=every_2",
    '--data.max_seq_len=[{"max_seq_len": 16, "until": 0.5}, {"max_seq_len": 32, "until": 1.0}]',
    "--data.global_batch_tokens=1024",
    "--data.batch_warmup=0.5",
    "--data.batch_warmup_from=512",
]
SAME = ("step", "loss", "masked_accuracy", "grad_norm", "skipped_updates", "heldout_loss")


def run(corpus: Corpus, out: Path, graphs: bool, ds_config: str, ranks: int) -> tuple[str, list[dict], dict]:
    """Train with an attention that can be captured. Returns the output, what the run reported, and its weights."""
    patch = f"from tests.helpers.recorded_graph import install; install({graphs})"
    command = patched(pretrain_command(corpus, out, *EVERYTHING, ds_config=ds_config))
    done = finish_ranks(start_ranks(command, ranks, PATCH=patch))
    assert done.code == 0, done.output
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return done.output, [{name: point.get(name) for name in SAME} for point in records], read_checkpoint(out)[0]


@pytest.mark.parametrize(
    ("ds_config", "ranks"),
    [
        ("zero1", 1),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in product(("zero0", "zero1"), (1, 2))),
    ],
)
def test_a_run_with_graphs_has_the_same_bits(corpus: Corpus, tmp_path, ds_config, ranks):
    _, expected, weights = run(corpus, tmp_path / "eager", False, ds_config, ranks)
    output, got, got_weights = run(corpus, tmp_path / "graphs", True, ds_config, ranks)
    assert output.count("captured ") == 2, "one graph for each length"
    assert got == expected
    assert all(torch.equal(got_weights[name], weight) for name, weight in weights.items())


def test_the_stand_in_bakes_numbers_of_the_host_in_and_draws_anew():
    """Otherwise the test above could not fail."""
    kept, total, host = torch.ones(3), torch.zeros(3), {"factor": 2.0}

    def work() -> None:
        total.add_(torch.nn.functional.dropout(kept * host["factor"], 0.5))

    torch.manual_seed(1)
    first = torch.nn.functional.dropout(kept * 2, 0.5)
    torch.manual_seed(1)
    replay = record(work)
    assert not total.any()
    replay()
    assert torch.equal(total, first)
    torch.manual_seed(2)
    second = torch.nn.functional.dropout(kept * 6, 0.5)
    assert not torch.equal(second, 3 * first)
    host["factor"] = 7.0
    torch.manual_seed(2)
    kept.fill_(3.0)
    replay()
    assert torch.equal(total, first + second)


def test_weights_that_move_are_captured_again(monkeypatch):
    work: list[str] = []
    monkeypatch.setattr(device, "warm_up", lambda compute: work.append("warm-up"))
    monkeypatch.setattr(device, "capture", lambda compute: work.append("capture") or (lambda: work.append("replay")))
    shapes = Shapes(bin_tokens=8, max_documents=2, max_masked=2)
    buffer = torch.zeros(shapes.elements, dtype=torch.int32)
    batch = PackedBatch(
        buffer=buffer, shapes=shapes, max_seqlen=8, index=0, num_documents=1, num_masked=2, num_tokens=8,
        sum_squared_lengths=64,
    )  # fmt: skip
    model = small_model()
    graph = MicroBatchGraph(model, bf16=False)
    for _ in range(2):
        graph.start_step(torch.ones(()))
        for _ in range(WARM_UPS + 2):
            graph.add(batch)
    start = ["warm-up"] * WARM_UPS + ["capture", "replay", "replay"]
    assert work == start + ["replay"] * (WARM_UPS + 2)
    model.decoder.weight.data = model.decoder.weight.data.clone()
    graph.start_step(torch.ones(()))
    del work[:]
    for _ in range(WARM_UPS + 2):
        graph.add(batch)
    assert work == start


def test_a_failed_capture_says_what_to_set(monkeypatch):
    class Graph(contextlib.nullcontext):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__()

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device, "stream_of_graphs", lambda index: None)

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(ValueError, match=r"cannot be captured: operation not permitted. Set run.cuda_graphs to false"):
        device.capture(lambda: fail(RuntimeError("operation not permitted\nmore")))
    with pytest.raises(torch.OutOfMemoryError):
        device.capture(lambda: fail(torch.OutOfMemoryError("out of memory")))


def test_all_warm_ups_and_the_capture_are_on_one_stream(monkeypatch):
    """Memory that was freed on one stream is of no use to another: each would take a micro-batch's activations anew."""
    used: list[object] = []

    class Stream:
        def __init__(self, index: int) -> None:
            self.index = index

        def wait_stream(self, other: object) -> None:
            pass

    def on(stream: object) -> contextlib.nullcontext:
        used.append(stream)
        return contextlib.nullcontext()

    device.stream_of_graphs.cache_clear()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(3))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream, **options: on(stream))
    try:
        for work in (device.warm_up, device.warm_up, device.capture):
            work(lambda: None)
    finally:
        device.stream_of_graphs.cache_clear()
    assert len(used) == 3
    assert len({id(stream) for stream in used}) == 1
    assert isinstance(used[0], Stream)
    assert used[0].index == 3


def chosen(*flags: str, on: torch.device = CUDA, **ds_config: object) -> str | None:
    recipe, _ = RecipeParser("pretrain", "").read(
        last_of_each([*TINY, "--run.max_steps=10", "--run.ops=auto", "--run.cuda_graphs=auto", *flags])
    )
    settings = {"zero_optimization": {"stage": 1}, "torch_autocast": {"enabled": True}} | ds_config
    captured = functools.partial(plan_module.why_not_captured, recipe, on, True)
    return choose_cuda_graphs(recipe, ResolvedDsConfig(settings), on.type, captured)


ZERO_2 = {"zero_optimization": {"stage": 2}}
OFFLOADED = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("flags", "ds_config", "reason"),
    [
        ([], ZERO_2, "ZeRO 2 reduces gradients within every backward pass"),
        ([], {"zero_optimization": {"stage": 3}}, "ZeRO 3 fetches weights in every layer"),
        ([], OFFLOADED, "the ds_config offloads the optimizer"),
        ([], {"bf16": {"enabled": True}}, "the ds_config sets bf16.enabled or data_types"),
        ([], {"data_types": {"grad_accum_dtype": "bf16"}}, "the ds_config sets bf16.enabled or data_types"),
        ([], {"wall_clock_breakdown": True}, "wall_clock_breakdown or flops_profiler of the ds_config"),
        ([], {"flops_profiler": {"enabled": True}}, "wall_clock_breakdown or flops_profiler of the ds_config"),
        (["--run.ops=torch"], {}, "run.ops is torch, and plain PyTorch's operations cannot be captured"),
        (["--run.compile=true"], {}, "run.compile is true"),
        (["--model.padding=padded"], {}, "with model.padding padded a bin has as many rows as documents"),
    ],
)
def test_true_is_refused_and_auto_declines_where_graphs_cannot_be(monkeypatch, flags, ds_config, reason):
    monkeypatch.setattr(plan_module, "why_not_all_fused", lambda *arguments: None)
    assert reason in str(chosen(*flags, **ds_config))
    with pytest.raises(ValueError, match=f"run.cuda_graphs is true, but .*{reason}.* or set run.cuda_graphs to auto"):
        chosen("--run.cuda_graphs=true", *flags, **ds_config)
    assert chosen("--run.cuda_graphs=false", *flags, **ds_config) == "run.cuda_graphs is false"


def test_auto_and_true_choose_graphs_where_all_kernels_are_fused(monkeypatch):
    assert "this device is a cpu, and only CUDA devices have graphs" in str(chosen(on=torch.device("cpu")))
    for stage in (0, 1):
        monkeypatch.setattr(plan_module, "why_not_all_fused", lambda *arguments: None)
        for flags in ([], ["--run.cuda_graphs=true"], ["--model.gradient_checkpointing=every_layer"]):
            assert chosen(*flags, zero_optimization={"stage": stage}) is None
    monkeypatch.setattr(plan_module, "why_not_all_fused", lambda *arguments: "Triton is not installed")
    assert chosen() == "plain PyTorch's operations cannot be captured (Triton is not installed)"


def test_what_a_gpu_can_fuse_decides():
    gpu = Machine(device_type="cuda", capability=(9, 0), installed={"triton": "3.7.1"})
    assert why_not_all_fused(CUDA, MegaBertConfig(), True, gpu) is None
    assert "torch_autocast is off" in str(why_not_all_fused(CUDA, MegaBertConfig(), False, gpu))
    bare = Machine(device_type="cuda", capability=(9, 0), installed={})
    assert "Triton is not installed" in str(why_not_all_fused(CUDA, MegaBertConfig(), True, bare))


def test_the_start_of_a_run_on_a_gpu_says_what_was_chosen():
    def lines(**changes: Any) -> list[str]:
        chosen = dataclasses.replace(plan_of_cpu(), **changes)
        corpus: Any = SimpleNamespace(tokens=1)
        return [line for line in start_messages(chosen, corpus, 1, 1, None) if line.startswith("micro-batches: ")]

    assert lines(device=CUDA, why_no_graphs=None) == ["micro-batches: launched as CUDA graphs (not run on a GPU yet)"]
    reason = "run.compile is true"
    assert lines(device=CUDA, why_no_graphs=reason) == [f"micro-batches: launched kernel by kernel: {reason}"]
    assert not lines()


def test_the_start_of_a_run_in_fp8_says_that_no_gpu_has_run_it():
    plan = plan_of_cpu()
    recipe = dataclasses.replace(plan.recipe, run=dataclasses.replace(plan.recipe.run, fp8="torchao"))
    corpus: Any = SimpleNamespace(tokens=1)

    def line(device: torch.device) -> str:
        lines = start_messages(dataclasses.replace(plan, recipe=recipe, device=device), corpus, 1, 1, None)
        return next(line for line in lines if line.startswith("layers' products"))

    assert line(torch.device("cpu")) == "layers' products: FP8 from torchao, emulated on this CPU"
    assert "not run on a GPU yet; set run.compile true" in line(CUDA)


def test_the_setting_may_change_at_a_resume():
    assert may_change_at_resume("run.cuda_graphs")
