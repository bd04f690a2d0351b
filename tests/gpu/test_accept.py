"""The acceptance script on the CPU: its comparisons at every push, all of its parts in the nightly run."""

import functools
import inspect
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from megabert.model.configuration_megabert import MegaBertConfig
from megabert.training.micro_batch import step as micro_batch_step
from megabert.training.run import Run
from megabert.training.telemetry import cards
from tests.benchmarks import bench_kernels
from tests.gpu import accept, kernel_times, parts, speeds, steps
from tests.helpers.runs import Corpus, run_command


def test_the_machine_is_described(corpus: Corpus, tmp_path):
    passed, figure, found = parts.machine(parts.Setup(tmp_path, corpus.tokens, dry=True))
    assert passed
    assert figure.startswith("cpu (not in telemetry/cards.py), ")
    assert str(found["ops"]).startswith("ops: ")
    assert all(float(found[name]) > 0 for name in ("copy_gb_per_s", "product_tflops", "launch_us"))


def test_the_kernels_part_leaves_out_tests_that_take_minutes(corpus: Corpus, tmp_path, monkeypatch):
    """torch.compile of a whole model alone may take longer than the part's limit."""

    def collect(setup, command):
        collecting = [*command, "--collect-only", "-p", "no:cacheprovider"]
        done = subprocess.run(collecting, cwd=parts.REPOSITORY, capture_output=True, text=True, check=True)
        (setup.out / "log.txt").write_text(done.stdout)

    monkeypatch.setattr(parts.Setup, "run", collect)
    # Options of the tests that run now, such as -v, would change what the collection prints.
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    parts.kernels(parts.Setup(tmp_path, corpus.tokens, dry=False))
    lines = (tmp_path / "log.txt").read_text().splitlines()
    chosen = [line.partition("::")[2] for line in lines if "::" in line]
    assert "test_a_model_trains_the_same[0-eager]" in chosen
    assert not [name for name in chosen if "-True" in name or "compiled" in name or "faster" in name]


def test_curves_of_other_lengths_are_not_the_same():
    assert parts.largest_difference([1.0, 2.02], [1.0, 2.0]) == pytest.approx(0.01)
    assert parts.largest_difference([1.0], [1.0, 2.0]) == math.inf
    assert parts.largest_difference([], []) == math.inf


def fake_waits(monkeypatch) -> None:
    """Let the CPU wait as a GPU would, and torch warn of streams only."""

    def stream(self=None):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", stream)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda self=None: None)


def test_every_wait_is_counted_once_and_at_its_line(monkeypatch):
    fake_waits(monkeypatch)
    here = inspect.currentframe()
    assert here is not None
    with steps.waits_by_line() as lines:
        first = here.f_lineno + 1
        CUDA_Accelerator.synchronize(None)
        torch.cuda.synchronize()
        torch.cuda.Stream.synchronize(None)
        torch.cuda.Event.synchronize(None)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("does not yet detect all synchronizing operations", stacklevel=1)
    torch.cuda.synchronize()
    assert lines == [f"{__file__}:{first + number}" for number in range(5)]


@pytest.mark.parametrize(("stage", "each", "most"), [("0", 0, 3), ("1", 0, 4), ("2", 1, 3)])
def test_too_many_waits_fail(stage, each, most, corpus: Corpus, tmp_path, monkeypatch):
    """Waits that a step makes in each of its micro-batches and at its end, as DeepSpeed's timers do."""
    fake_waits(monkeypatch)

    def counts(in_each: int, at_the_end: int) -> dict[str, Any]:
        def step(run):
            for number in range(16):
                micro_batch_step.seed_dropout(17, number)
                for _ in range(in_each):
                    torch.cuda.synchronize()
            for _ in range(at_the_end):
                torch.cuda.synchronize()

        monkeypatch.setattr(steps, "step", step)
        return steps.waits(cast("Run", None))

    def passes(report: dict[str, Any]) -> bool:
        none = {"waits": 0, "micro_batches": 16, "between": 0, "lines": {}}

        def write(setup, command):
            number = command[command.index("waits") + 1]
            (setup.out / f"waits{number}.json").write_text(json.dumps(report if number == stage else none))

        monkeypatch.setattr(parts.Setup, "run", write)
        return parts.host_waits(parts.Setup(tmp_path, corpus.tokens, dry=False)).passed

    assert counts(each, most)["waits"] == 16 * each + most
    assert passes(counts(each, most))
    assert not passes(counts(each, most + 1))
    assert not passes(counts(each + 1, 0))


def test_times_of_a_micro_batch_are_the_same_for_the_engine_and_for_a_graph(monkeypatch):
    """A step of four micro-batches of 20 ms on the host, none of which calls the engine."""
    times = {"now": 0.0}

    def step(run):
        for number in range(4):
            micro_batch_step.seed_dropout(17, number)
            torch.ones(1000).sum()
            times["now"] += 0.02

    meter = SimpleNamespace(reset=lambda: None, seconds=lambda: 1.0, tokens=10, num_targets=1, squared_lengths=10)
    engine = SimpleNamespace(device=torch.device("cpu"))
    run: Any = SimpleNamespace(engine=engine, meter=meter, model_config=MegaBertConfig(), peak_flops=None)
    monkeypatch.setattr(speeds, "step", step)
    monkeypatch.setattr(speeds, "device_work", lambda profiler, run: [steps.Work(0, 8000, "kernel")])
    monkeypatch.setattr(speeds.time, "perf_counter", lambda: times["now"])
    found = speeds.speed_of(run)
    assert found["host_ms"] == pytest.approx(20)
    assert found["gpu_ms"] == pytest.approx(2)


def test_a_graph_is_freed_before_the_bare_loop(monkeypatch):
    """It holds the activations of a micro-batch, and the loop needs the same memory again: 90 of an H100's 85 GB."""
    monkeypatch.setattr(speeds, "build_model", lambda *arguments: (_ for _ in ()).throw(InterruptedError))
    run: Any = MagicMock()
    with pytest.raises(InterruptedError):
        speeds.bare_tokens_per_s(run)
    assert run.graph is None


def test_a_failed_required_part_is_exit_code_1(corpus: Corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accept, "start_part", lambda number, options, left_s: {"passed": number != 3, "figure": "x"})
    flags = ["accept.py", "--dry-run", "--out", str(tmp_path), "--tokens", str(corpus.tokens)]
    for only, code in (("", 1), ("3", 1), ("1,2,4,5", 0), ("0,6,7", 0)):
        monkeypatch.setattr(sys, "argv", [*flags, *(["--only", only] if only else [])])
        assert accept.main() == code
    assert "| 3 curves | NO | 0 | x |" in capsys.readouterr().out


@pytest.mark.parametrize(("only", "wrong"), [("9", "9"), ("a", "a"), ("0,,1", ""), ("-1", "-1"), ("", "")])
def test_a_part_that_does_not_exist_is_refused(only, wrong, corpus: Corpus, tmp_path, monkeypatch, capsys):
    flags = ["--dry-run", "--out", str(tmp_path), "--tokens", str(corpus.tokens), f"--only={only}"]
    monkeypatch.setattr(sys, "argv", ["accept.py", *flags])
    with pytest.raises(SystemExit) as left:
        accept.main()
    assert left.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith(f"argument --only: {only} has the part {wrong!r}, expected numbers from 0 to 8: 0,2")


def test_without_shards_or_a_gpu_it_says_what_to_do(corpus: Corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parts.torch.cuda, "is_available", lambda: False)
    for tokens, message in ((tmp_path, "Run bash launch/quickstart/prepare.sh"), (corpus.tokens, "torch sees no GPU")):
        monkeypatch.setattr(sys, "argv", ["accept.py", "--out", str(tmp_path), "--tokens", str(tokens)])
        with pytest.raises(SystemExit):
            accept.main()
        assert message in capsys.readouterr().err


def test_the_limits_of_all_parts_are_the_minutes_that_the_texts_name(corpus: Corpus, tmp_path, monkeypatch, capsys):
    assert 21 < sum(part.limit_s for part in accept.PARTS) / 60 <= 22
    for text in (accept.__doc__, Path(accept.__file__).with_name("README.md").read_text()):
        assert "twenty-two minutes" in str(text)
    flags = ["--dry-run", "--out", str(tmp_path), "--tokens", str(corpus.tokens), "--only=4", "--seconds=0"]
    monkeypatch.setattr(sys, "argv", ["accept.py", *flags])
    assert accept.main() == 1
    assert "| 4 crash | NO | 0 | it ran longer than 0 s |" in capsys.readouterr().out


@pytest.mark.parametrize("part", [parts.host_waits, parts.crash, speeds.speeds, parts.where_time_goes])
def test_a_step_has_the_same_tokens_on_every_card(part, corpus: Corpus, tmp_path, monkeypatch):
    def start(setup, command, **environment):
        raise InterruptedError(*command)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(parts.Setup, "run", start)
    with pytest.raises(InterruptedError) as started:
        part(parts.Setup(tmp_path, corpus.tokens, dry=False))
    sizes = dict(flag.split("=") for flag in started.value.args if flag.startswith("--data."))
    assert 0 < int(sizes["--data.micro_batch_tokens"]) < int(sizes["--data.global_batch_tokens"]) < 500_000


@pytest.mark.parametrize(
    ("code", "resumed", "skipped", "passed"),
    [(-9, 2.0, 1, True), (-9, 2.1, 1, False), (-9, 2.0, 0, False), (0, 2.0, 1, False)],
)
def test_a_crash_that_is_not_survived_fails(code, resumed, skipped, passed, corpus: Corpus, tmp_path, monkeypatch):
    process = SimpleNamespace(pid=0, poll=lambda: code, wait=lambda: code)
    monkeypatch.setattr(parts.subprocess, "Popen", lambda *arguments, **options: process)
    monkeypatch.setattr(parts, "kill_with_children", lambda pid: None)

    def run(setup, command, **environment):
        name = next(Path(flag.partition("=")[2]).name for flag in command if flag.startswith("--run.output_dir="))
        started.append("deepspeed.launcher.runner" in command)
        (setup.out / name).mkdir()
        points = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": resumed if name == "killed" else 2.0}]
        (setup.out / name / "metrics.jsonl").write_text("".join(f"{json.dumps(point)}\n" for point in points))
        (setup.out / name / "result.json").write_text(json.dumps({"skipped_updates": skipped}))

    started: list[bool] = []
    monkeypatch.setattr(parts.Setup, "run", run)
    assert parts.crash(parts.Setup(tmp_path, corpus.tokens, dry=False)).passed == passed
    assert started == [False, True, False]


@pytest.mark.parametrize(
    ("visible", "flag"), [(None, "--num_gpus=1"), ("", "--num_gpus=1"), ("3,5", "--include=localhost:3")]
)
def test_the_launched_run_is_on_the_gpu_that_this_process_may_use(visible, flag, monkeypatch):
    """DeepSpeed's launcher drops CUDA_VISIBLE_DEVICES where --num_gpus is given, and takes the machine's first GPU."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert parts.on_one_gpu() == flag


PREDICT = functools.cache(speeds.Case.predict)


@pytest.mark.parametrize(
    ("name", "share", "measured", "passed", "figure"),
    [
        ("NVIDIA H100 80GB HBM3", 0.81, 9, True, "81 % of the prediction"),
        ("NVIDIA H100 80GB HBM3", 0.79, 9, False, "79 % of the prediction"),
        ("NVIDIA A10", 0.81, 6, True, "81 % of the prediction"),
        ("NVIDIA Unknown", 0.1, 9, True, "no prediction for this device"),
    ],
)
def test_a_speed_far_below_the_prediction_fails(
    name, share, measured, passed, figure, corpus: Corpus, tmp_path, monkeypatch
):
    """The fastest predicted case decides; what does not fit the card's memory is not tried."""
    seen = []

    def measure(setup, case, folder):
        seen.append(case)
        reached = share if case.is_predicted else 2.0
        card = cards.card_named("a10" if "A10" in name else "h100")
        return {"tokens_per_s": reached * case.predict(card).tokens_per_s, "idle_percent": 3.0}

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(speeds, "measure", measure)
    monkeypatch.setattr(speeds.Case, "predict", PREDICT)
    outcome = speeds.speeds(parts.Setup(tmp_path, corpus.tokens, dry=False))
    assert outcome.passed == passed
    assert outcome.figure.endswith(f" tokens/s, GPU idle 3 %, {figure}")
    assert len(seen) == measured
    assert len(outcome.found) == len(speeds.CASES) == 9


def test_gaps_are_what_no_kernel_covers():
    work = [steps.Work(0, 5, "a"), steps.Work(1, 2, "within a"), steps.Work(5, 6, "b"), steps.Work(10, 11, "c")]
    assert steps.gaps_after(work) == [(4, "b")]
    assert steps.gaps_after([*work[:2], *work[3:]]) == [(5, "a")]


@pytest.mark.parametrize(("share", "passed"), [(0.61, True), (0.59, False)])
@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA Unknown"])
def test_a_kernel_that_moves_too_few_bytes_fails(name, share, passed, corpus: Corpus, tmp_path, monkeypatch):
    """LayerNorm reaches a share of the bandwidth: the data sheet's, or of an unknown card that of a copy."""
    bandwidth = 3.35e12 if "H100" in name else 1e12
    names = ("geglu", "add_layer_norm", "masked_cross_entropy")
    contenders = {operation: {"Triton": operation, "compiled": "not timed"} for operation in names}

    def time_s(contender, *arguments):
        reached = {"geglu": 0.9, "add_layer_norm": share, "masked_cross_entropy": 0.01}[contender]
        return bench_kernels.WORK[contender].moved_bytes / bandwidth / reached

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(kernel_times, "copy_rate", lambda device, size: 1e12)
    monkeypatch.setattr(kernel_times, "by_warps", lambda device: {})
    monkeypatch.setattr(kernel_times, "by_tile", lambda device: {})
    monkeypatch.setattr(bench_kernels, "contenders", lambda *arguments: contenders)
    monkeypatch.setattr(bench_kernels, "time_s", time_s)
    outcome = kernel_times.kernel_times(parts.Setup(tmp_path, corpus.tokens, dry=False))
    assert outcome.passed == passed
    assert outcome.figure == f"add_layer_norm {100 * share:.0f} % of {bandwidth / 1e9:,.0f} GB/s"


@pytest.mark.triton
def test_other_programs_and_tiles_are_what_is_timed(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from megabert.kernels import attention, row_statistics

    used: list[object] = []

    def time_us(device, operation):
        if operation == "add_layer_norm":
            monkeypatch.setattr(row_statistics, "multiprocessors", lambda device: 132)
            used.append(row_statistics.num_programs(8192, 768, device))
        else:
            used.append(attention.tile_of("short", 64, False))
        if len(used) == 5:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 1.0

    monkeypatch.setattr(kernel_times, "time_us", time_us)
    usual = attention.tile_of
    found = kernel_times.by_warps(torch.device("cuda")) | kernel_times.by_tile(torch.device("cuda"))
    assert used[:4] == [264, 660, 1056, 2112]
    assert [str(value)[:15] for value in found.values()][3:6] == ["1.0", "out of resource", "1.0"]
    assert len(set(used)) == len(found) > 8
    assert attention.tile_of is usual


@pytest.mark.nightly
def test_all_parts_run_on_the_cpu(corpus: Corpus, tmp_path):
    command = [sys.executable, "tests/gpu/accept.py", "--dry-run", f"--out={tmp_path}", f"--tokens={corpus.tokens}"]
    done = run_command(command, timeout_s=1500)
    assert done.code == 0, done.output
    for number in range(len(accept.PARTS)):
        assert json.loads((tmp_path / f"{number}.json").read_text())["passed"], done.output
