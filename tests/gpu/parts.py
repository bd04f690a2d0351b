"""The parts of accept.py: each returns whether it passed, its figures for the table, and all that it found."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from megabert.files.metrics_format import read_metrics
from megabert.process.subprocesses import kill_with_children
from tests.helpers.ports import free_port
from tests.helpers.runs import TINY, last_of_each

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ("0", "1", "2")
# In a step, without ZeRO 2's one in each micro-batch and ZeRO 1's for an idle stream; tests/gpu_walk names them.
MOST_WAITS = 3
# Differences of losses: fp32 on the GPU and on the CPU; bf16 by kernels and by PyTorch; ZeRO 0 and 2.
SAME_FP32, SAME_BF16, SAME_STAGES = 1e-3, 0.02, 1e-4
# The same kernels with and without CUDA graphs: cuBLAS may choose another algorithm, with another order of sums.
SAME_GRAPHS = 1e-3


class Outcome(NamedTuple):
    passed: bool
    figure: str
    found: dict[str, object]


@dataclass(frozen=True)
class Setup:
    """out: folder of this part. tokens: shards. dry: tiny models, on the CPU."""

    out: Path
    tokens: Path
    dry: bool

    @property
    def accelerator(self) -> str:
        return "cpu" if self.dry else "cuda"

    def flags(self, recipe: str, *more: str) -> list[str]:
        tiny = TINY if self.dry else []
        return last_of_each(
            [f"--recipe={recipe}", f"--data.train={self.tokens}", "--run.log_every_steps=1", *tiny, *more]
        )

    def batch(self, micro_batch_tokens: int, micro_batches: int) -> list[str]:
        """Return the flags of a step's size, which otherwise depends on the card. A dry run keeps its own."""
        total = micro_batches * micro_batch_tokens
        flags = [f"--data.micro_batch_tokens={micro_batch_tokens}", f"--data.global_batch_tokens={total}"]
        return [] if self.dry else flags

    def run(self, command: list[str], **environment: str) -> None:
        """Run a command and keep its output; raise with its last lines if it fails."""
        env = os.environ | {"DS_ACCELERATOR": self.accelerator} | environment
        with open(self.out / "log.txt", "a+") as log:
            start = log.tell()
            code = subprocess.run(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log, check=False).returncode
            log.seek(start)
            if code:
                raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{log.read()[-3000:]}")

    def train(
        self, name: str, flags: list[str], ds_config: str | Path = "zero2", **environment: str
    ) -> list[dict[str, float]]:
        """Run launch/pretrain.py. Returns its metrics."""
        self.run([sys.executable, *self.pretrain(name, flags, ds_config)], **environment)
        return read_metrics(self.out / name / "metrics.jsonl")

    def pretrain(self, name: str, flags: list[str], ds_config: str | Path = "zero2") -> list[str]:
        """Return the command of a run, without what starts it."""
        return ["launch/pretrain.py", f"--ds_config={ds_config}", f"--run.output_dir={self.out / name}", *flags]


def losses(metrics: list[dict[str, float]]) -> list[float]:
    return [point["loss"] for point in metrics if "loss" in point]


def largest_difference(one: list[float], other: list[float]) -> float:
    """Return the largest difference of two curves, relative to the second; infinite if their lengths differ."""
    if len(one) != len(other) or not one:
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def machine(setup: Setup) -> Outcome:
    """Versions, the card, the chosen operations, and the rates of a copy, a product and an empty launch."""
    import logging

    import transformers

    from megabert.kernels.resolve import resolve
    from megabert.model.configuration_megabert import MegaBertConfig
    from megabert.training.telemetry.cards import find_card

    device = torch.device(setup.accelerator)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megabert.kernels.resolve")
    logger.addHandler(handler)
    logger.setLevel("INFO")
    resolve("auto", device, MegaBertConfig(), bf16=True)
    size = 256 if setup.dry else 8192
    x, y = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    data = torch.randn(size * size, device=device)
    rates = {
        "copy_gb_per_s": 2 * 4 * size**2 / timed(device, data.clone) / 1e9,
        "product_tflops": 2 * size**3 / timed(device, lambda: x @ y) / 1e12,
        "launch_us": 1e6 * timed(device, lambda: data[:1].add_(1)),
    }
    name = "cpu" if setup.dry else torch.cuda.get_device_name()
    card = find_card(name)
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "card": name, "ops": lines[-1]}
    known = "in the table" if card else "not in telemetry/cards.py"
    passed = setup.dry or "all from Triton" in lines[-1] or "PyTorch" not in lines[-1].split("(")[0]
    return Outcome(passed, f"{name} ({known}), {rates['product_tflops']:.3g} TFLOP/s", found | rates)


def timed(device: torch.device, work, times: int = 20) -> float:
    """Return the seconds of one call, in many calls without a wait between them."""
    for _ in range(2):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def kernels(setup: Setup) -> Outcome:
    """The tests with the mark gpu, without those that compile or compare speeds."""
    chosen = "not compiled and not faster_than_eager and not training"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", chosen]
    setup.run([*command, "tests/kernels/test_gpu.py", "tests/gpu"])
    summary = (setup.out / "log.txt").read_text().strip().splitlines()[-1]
    return Outcome("passed" in summary or setup.dry, summary.strip("= "), {"summary": summary})


def host_waits(setup: Setup) -> Outcome:
    """The host's waits for the GPU in the fifth step, of four micro-batches, at each ZeRO stage."""
    found: dict[str, object] = {}
    counts, passed = [], True
    for stage in STAGES:
        flags = setup.flags("mosaicbert-base", "--run.max_steps=5", *setup.batch(14_720, 4))
        setup.run([sys.executable, "-m", "tests.gpu.steps", "waits", stage, str(setup.out), *flags])
        found[f"zero{stage}"] = report = json.loads((setup.out / f"waits{stage}.json").read_text())
        counts.append(f"{report['waits']} ({report['between']})")
        passed = passed and few_waits(stage, **report)
    return Outcome(
        passed, f"{', '.join(counts)} waits (before the last micro-batch) at ZeRO {', '.join(STAGES)}", found
    )


def few_waits(stage: str, waits: int, micro_batches: int, between: int, lines: dict[str, int]) -> bool:
    """Whether a step waits as seldom as it can.

    ZeRO 2 with overlap_comm waits after each micro-batch. ZeRO 1 after a CUDA graph waits for a stream of DeepSpeed's,
    too, which has nothing to do then.
    """
    if stage == "2":
        return waits <= MOST_WAITS + micro_batches
    return waits <= MOST_WAITS + (stage == "1") and between == 0


def curves(setup: Setup) -> Outcome:
    """The quickstart's losses: fp32 on the GPU and on the CPU, bf16 by kernels and by PyTorch, ZeRO 0 and 2."""
    flags = setup.flags("quickstart", f"--run.max_steps={4 if setup.dry else 60}", "--run.eval_tokens=1024")
    flags = [flag for flag in flags if not flag.startswith("--run.ops")]
    configs = {
        (stage, bf16): precise(setup.out, stage, bf16) for stage, bf16 in (("2", False), ("2", True), ("0", False))
    }
    plain = [*flags, "--run.ops=torch"]
    curve = {
        "cpu": losses(setup.train("cpu", plain, configs["2", False], DS_ACCELERATOR="cpu")),
        "fp32": losses(setup.train("fp32", plain, configs["2", False])),
        "stage0": losses(setup.train("stage0", plain, configs["0", False])),
        "bf16": losses(setup.train("bf16", plain, configs["2", True])),
        "kernels": losses(setup.train("kernels", [*flags, "--run.ops=auto"], configs["2", True])),
    }
    far = {
        "fp32": largest_difference(curve["fp32"], curve["cpu"]),
        "bf16": largest_difference(curve["kernels"], curve["bf16"]),
        "stages": largest_difference(curve["stage0"], curve["fp32"]),
    }
    passed = far["fp32"] <= SAME_FP32 and far["bf16"] <= SAME_BF16 and far["stages"] <= SAME_STAGES
    return Outcome(passed, ", ".join(f"{name} {value:.1e}" for name, value in far.items()), far | curve)


def precise(out: Path, stage: str, bf16: bool) -> Path:
    """Write one of our ds_configs with its precision fixed."""
    config = json.loads((REPOSITORY / f"ds_configs/zero{stage}.json").read_text())
    config["torch_autocast"]["enabled"] = bf16
    path = out / f"zero{stage}-{'bf16' if bf16 else 'fp32'}.json"
    path.write_text(json.dumps(config))
    return path


def crash(setup: Setup) -> Outcome:
    """A launched run, killed after a save and resumed, ends as one that is not; an injected NaN skips one update."""
    steps = 6 if setup.dry else 30
    size = [f"--run.max_steps={steps}", f"--run.save_every_steps={steps // 3}", *setup.batch(14_720, 2)]
    flags = setup.flags("mosaicbert-base", *size)
    flags = last_of_each([*flags, "--run.eval_tokens=65536" if not setup.dry else "--run.eval_tokens=768"])
    whole = losses(setup.train("whole", flags))
    folder = setup.out / "killed"
    # As users start it.
    which = "--num_gpus=1" if setup.dry else on_one_gpu()
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", which, f"--master_port={free_port()}"]
    command = [*launcher, *setup.pretrain("killed", flags)]
    env = os.environ | {"DS_ACCELERATOR": setup.accelerator}
    with open(setup.out / "log.txt", "a") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log)
    while process.poll() is None and not list((folder / "checkpoints").glob("*step-*")):
        time.sleep(0.01)
    kill_with_children(process.pid)
    # Otherwise it had ended by itself.
    was_killed = process.wait() == -signal.SIGKILL
    setup.run(command)
    killed = {point["step"]: point["loss"] for point in read_metrics(folder / "metrics.jsonl") if "loss" in point}
    same = list(killed.values()) == whole
    # Bins of the third step; the loss of each becomes NaN.
    fault = json.dumps({"bins": [4], "factor": "nan", "added": 0})
    _, *its_flags = setup.pretrain("nan", last_of_each([*flags, "--run.max_steps=6"]))
    setup.run([sys.executable, "tests/helpers/scripts/inject.py", *its_flags], INJECT=fault)
    skipped = json.loads((setup.out / "nan/result.json").read_text())["skipped_updates"]
    figure = f"{'the same' if same else 'OTHER'} losses, {skipped} update skipped{'' if was_killed else ', NOT KILLED'}"
    found = {"whole": whole, "killed": killed, "skipped": skipped}
    return Outcome(was_killed and same and skipped == 1, figure, found)


def on_one_gpu() -> str:
    """Return the launcher's flag for one rank. With --num_gpus it ignores CUDA_VISIBLE_DEVICES."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    return f"--include=localhost:{first}" if first.isdecimal() else "--num_gpus=1"


def where_time_goes(setup: Setup) -> Outcome:
    """The fifteen kernels of a step that take longest, and the longest gaps between kernels."""
    flags = setup.flags("mosaicbert-base", "--run.max_steps=5", *setup.batch(14_720, 4))
    setup.run([sys.executable, "-m", "tests.gpu.steps", "profile", "1", str(setup.out), *flags])
    found = json.loads((setup.out / "profile1.json").read_text())
    size = (setup.out / "trace.json").stat().st_size
    first = re.sub(r"[<(].*", "", next(iter(found["top_ms"])))
    figure = f"first {first}, GPU idle {found['idle_percent']:.0f} %, trace {size / 2**20:.1f} MiB"
    return Outcome(size < 16 * 2**20, figure, found)


def graphs(setup: Setup) -> Outcome:
    """Losses and tokens/s with run.cuda_graphs true and false, with dropout and recomputed layers; ZeRO 0 and 1."""
    more = ["--model.hidden_dropout=0.1", "--model.gradient_checkpointing=every_2", "--run.eval_tokens=1024"]
    flags = setup.flags("quickstart", f"--run.max_steps={6 if setup.dry else 40}", *more)
    flags = last_of_each([*flags, f"--run.ops={'torch' if setup.dry else 'auto'}"])
    found: dict[str, object] = {}
    differences, speeds_up = [], []
    for stage in ("0", "1"):
        curve: dict[str, list[float]] = {}
        speed: dict[str, float] = {}
        # A CPU has no graphs.
        for choice in ("false", "auto" if setup.dry else "true"):
            points = setup.train(
                f"zero{stage}-{choice}", [*flags, f"--run.cuda_graphs={choice}"], precise(setup.out, stage, True)
            )
            curve[choice] = losses(points)
            speed[choice] = [point["tokens_per_s"] for point in points if "tokens_per_s" in point][-1]
        eager, graph = curve.values()
        differences.append(largest_difference(graph, eager))
        speeds_up.append(speed[choice] / speed["false"])
        found[f"zero{stage}"] = {"losses": curve, "tokens_per_s": speed}
    far, faster = (", ".join(map("{:.2g}".format, values)) for values in (differences, speeds_up))
    return Outcome(max(differences) <= SAME_GRAPHS, f"differences {far}, speed x {faster}", found)
