"""Fine-tuning the run's checkpoints on a small task while training goes on: a process of its own, on the CPU. Rank 0 only.

The process (megabert/finetune/jobs/probe.py) starts from a checkpoint's files, so that nothing of the training can change: not its random
numbers, not a GPU's memory. It is nice to the loader's workers, ends with this process, and its failure is a line in the log.

OUTPUT_DIR/probe/step-00001000.json  the score, once it is there      step-00001000.log  what the process said
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from megabert.config.recipe import ProbeConfig
from megabert.files.checkpoint_format import step_of, tag_of
from megabert.files.metrics_format import METRICS, read_metrics
from megabert.training.telemetry.reporter import Reporter

MODULE = "megabert.finetune.jobs.probe"  # by name: training knows nothing of fine-tuning
# What would make the process take itself for a rank, or use the GPU.
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LONGEST_WAIT_S = 1200.0  # for the last score at the end of the run; other ranks wait half an hour before they give up


def command(config: ProbeConfig, *more: str) -> list[str]:
    """What fine-tunes once; more: --checkpoint, --out and --ops, or --check to look at the task's data only."""
    settings = [f"--{name}={getattr(config, name)}" for name in ("task", "data", "protocol", "max_examples")]
    return [sys.executable, "-m", MODULE, *settings, *more]


def environment() -> dict[str, str]:
    """This process's, but not its rank and its GPU; half as many threads."""
    mine = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    return mine | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // 2))}


def check(config: ProbeConfig) -> None:
    """Raise ValueError, in one line, if the task, its data or the protocol cannot be used. Does nothing without a probe."""
    if config.task is None:
        return
    done = subprocess.run(
        command(config, "--check"), env=environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"probe: {_last_line(done.stdout + done.stderr).removeprefix('probe: ')}")


class Prober:
    """Starts a process for each checkpoint that is due, one at a time, and logs its score with the step that it belongs to."""

    def __init__(self, config: ProbeConfig, ops: str, output_dir: Path, reporter: Reporter, step: int):
        """ops: as run.ops; step: that the run goes on from. Scores of later ones are dropped, and those that a kill kept from the log are logged."""
        self.config, self.ops, self.reporter = config, ops, reporter
        self.folder, self.checkpoints = output_dir / "probe", output_dir / "checkpoints"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.running: tuple[int, subprocess.Popen] | None = None
        self.waiting: int | None = None
        self.forget_after(step)
        logged = {record["step"] for record in read_metrics(output_dir / METRICS) if self.name in record}
        for result in self._results():
            if result not in logged:
                self._log(result)
        if step and not self._result(step).is_file():
            self.saved(step)

    @property
    def name(self) -> str:
        """Of the curve."""
        return f"probe/{Path(str(self.config.task)).stem}"

    def _result(self, step: int) -> Path:
        return self.folder / f"{tag_of(step)}.json"

    def _results(self) -> list[int]:
        """Steps whose score is there."""
        return sorted(step_of(path.stem) for path in self.folder.glob("step-*.json"))

    def forget_after(self, step: int) -> None:
        """The run goes on from this step: what it did after that is undone."""
        if self.running is not None and self.running[0] > step:
            self.stop()
        if self.waiting is not None and self.waiting > step:
            self.waiting = None
        for later in self._results():
            if later > step:
                self._result(later).unlink()

    def saved(self, step: int) -> None:
        """A checkpoint of this step is there, or will be. It is probed if it is time for one."""
        if step % self.config.every_steps:
            return
        if self.waiting is not None:
            self.reporter.say(f"probe of step {self.waiting}: left out, the one before is not done yet")
        self.waiting = step

    def look(self) -> None:
        """Log a score that is there, and start the next process; waits for nothing."""
        if self.running is not None and self.running[1].poll() is not None:
            step, process = self._ended()
            if process.returncode == 0:
                self._log(step)
            else:
                said = _last_line(self._result(step).with_suffix(".log").read_text(errors="replace"))
                self.reporter.say(f"probe of step {step}: failed with exit code {process.returncode}: {said}")
        if self.running is None and self.waiting is not None:
            checkpoint = self.checkpoints / tag_of(self.waiting)
            if checkpoint.is_dir():
                self.running, self.waiting = (self.waiting, self._start(checkpoint, self._result(self.waiting))), None

    def _start(self, checkpoint: Path, result: Path) -> subprocess.Popen:
        with open(result.with_suffix(".log"), "w") as log:
            # Nothing is ever written to its stdin: it ends when that does.
            return subprocess.Popen(
                command(self.config, f"--checkpoint={checkpoint}", f"--out={result}", f"--ops={self.ops}"),
                env=environment(), stdin=subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip

    def _log(self, step: int) -> None:
        found = json.loads(self._result(step).read_text())
        self.reporter.record(step, {self.name: found["score"], "tokens": found["tokens"]})
        self.reporter.say(f"probe of step {step}: {self.name.removeprefix('probe/')} {found['score']:.4f}")

    def finish(self) -> None:
        """Wait for the scores that are still to come; at most LONGEST_WAIT_S."""
        until = time.monotonic() + LONGEST_WAIT_S
        self.look()
        while self.running is not None and time.monotonic() < until:
            time.sleep(0.1)
            self.look()
        self.stop()

    def stop(self) -> None:
        """End a process that is running; its step is probed again should the run go on from there."""
        if self.running is not None:
            self.running[1].kill()
            step, _ = self._ended()
            self.reporter.say(f"probe of step {step}: stopped with the training")
        self.waiting = None

    def _ended(self) -> tuple[int, subprocess.Popen]:
        assert self.running is not None, "one was running"
        step, process = self.running
        process.communicate()
        self.running = None
        return step, process


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
