"""Fine-tune the run's checkpoints on a small task during training, in a separate process on the CPU; rank 0 only.

OUTPUT_DIR/probe/step-00001000.json  the score of a finished probe
OUTPUT_DIR/probe/step-00001000.log   the output of its process
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megabert.config.recipe import ProbeConfig
from megabert.files.checkpoint_format import step_of, tag_of
from megabert.files.json_file import check_format_version, read_json
from megabert.files.metrics_format import METRICS, read_metrics
from megabert.process.subprocesses import why_ended
from megabert.training.distributed.rank_env import RANK_VARIABLES
from megabert.training.telemetry.reporter import Reporter

# The probe is started by name, because training must not import fine-tuning.
MODULE = "megabert.finetune.jobs.score_checkpoint"
# The newest format_version of a score file that can be read here. A file without one has version 1.
SCORE_VERSION = 1
# At the end of the run, the last score is awaited for this long. The other ranks' collectives time out after 30
# minutes.
MAX_WAIT_S = 1200.0


def probe_command(config: ProbeConfig, *more: str) -> list[str]:
    """Return a probe's command. more: --checkpoint, --out and --ops, or --check to check the task's data only."""
    settings = [f"--{name}={getattr(config, name)}" for name in ("task", "data", "protocol", "max_examples")]
    return [sys.executable, "-m", MODULE, *settings, *more]


def probe_environment() -> dict[str, str]:
    """Return this process's environment without its rank and its GPU, and with half as many threads."""
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return inherited | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // 2))}


def check_probe(config: ProbeConfig) -> None:
    """Raise ValueError if the task, its data or the protocol cannot be used. Does nothing without a probe."""
    if config.task is None:
        return
    done = subprocess.run(
        probe_command(config, "--check"), env=probe_environment(), capture_output=True, text=True,
        errors="replace", stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = why_ended(done.returncode, done.stdout + done.stderr)
        raise ValueError(f"probe: {reason.removeprefix('probe: ')}")


class ProbeRunner:
    """Runs a probe of each due checkpoint, one at a time, and logs its score at the step of the checkpoint.

    The process reads the checkpoint's files, so it affects neither the training's random numbers nor its GPU memory.
    It runs at low priority, ends with this process, and its failure is only logged.
    """

    def __init__(self, config: ProbeConfig, ops: str, output_dir: Path, reporter: Reporter, step: int):
        """Drop the scores of steps after `step`, where the run continues; log those that a crash left unlogged.

        ops: as run.ops.
        """
        self.config, self.ops, self.reporter = config, ops, reporter
        self.folder, self.checkpoints = output_dir / "probe", output_dir / "checkpoints"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.running: tuple[int, subprocess.Popen] | None = None
        self.waiting: int | None = None
        self.discard_after(step)
        logged = {record["step"] for record in read_metrics(output_dir / METRICS) if self.metric in record}
        for scored in self._scored_steps():
            if scored not in logged:
                self._log_score(scored)
        if step and not self._score_file(step).is_file():
            self.checkpoint_saved(step)

    @property
    def metric(self) -> str:
        """The name of the score in metrics.jsonl."""
        return f"probe/{Path(str(self.config.task)).stem}"

    def _score_file(self, step: int) -> Path:
        return self.folder / f"{tag_of(step)}.json"

    def _scored_steps(self) -> list[int]:
        """Return the steps that have a score file."""
        return sorted(step_of(path.stem) for path in self.folder.glob("step-*.json"))

    def discard_after(self, step: int) -> None:
        """Drop probes and scores of later steps, because the run continues from `step`."""
        if self.running is not None and self.running[0] > step:
            self.stop()
        if self.waiting is not None and self.waiting > step:
            self.waiting = None
        for later in self._scored_steps():
            if later > step:
                self._score_file(later).unlink()

    def checkpoint_saved(self, step: int) -> None:
        """Queue a probe of this step's checkpoint if one is due; the checkpoint may still be being written."""
        if step % self.config.every_steps:
            return
        if self.waiting is not None:
            self.reporter.log_line(f"probe of step {self.waiting}: skipped, the previous one is still running")
        self.waiting = step

    def poll(self) -> None:
        """Log the score of a finished probe and start the queued one; never wait."""
        if self.running is not None and self.running[1].poll() is not None:
            step, process = self._collect()
            if process.returncode == 0:
                self._log_score(step)
            else:
                output = self._score_file(step).with_suffix(".log").read_text(errors="replace")
                reason = why_ended(process.returncode, output)
                self.reporter.log_line(f"probe of step {step}: failed: {reason}")
        if self.running is None and self.waiting is not None:
            checkpoint = self.checkpoints / tag_of(self.waiting)
            if checkpoint.is_dir():
                process = self._start(checkpoint, self._score_file(self.waiting))
                self.running, self.waiting = (self.waiting, process), None

    def _start(self, checkpoint: Path, score_file: Path) -> subprocess.Popen:
        with open(score_file.with_suffix(".log"), "w") as log:
            # The process ends when its stdin is closed, and nothing is ever written there: so it ends with this one.
            return subprocess.Popen(
                probe_command(self.config, f"--checkpoint={checkpoint}", f"--out={score_file}", f"--ops={self.ops}"),
                env=probe_environment(), stdin=subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip

    def _log_score(self, step: int) -> None:
        result = _read_score(self._score_file(step))
        self.reporter.log_metrics(step, {self.metric: result["score"], "tokens": result["tokens"]})
        self.reporter.log_line(f"probe of step {step}: {self.metric.removeprefix('probe/')} {result['score']:.4f}")

    def finish(self) -> None:
        """Wait for the last probes, at most MAX_WAIT_S."""
        deadline = time.monotonic() + MAX_WAIT_S
        self.poll()
        while self.running is not None and time.monotonic() < deadline:
            time.sleep(0.1)
            self.poll()
        self.stop()

    def stop(self) -> None:
        """Kill a running probe; a run that continues from its step probes it again."""
        if self.running is not None:
            self.running[1].kill()
            step, _ = self._collect()
            self.reporter.log_line(f"probe of step {step}: stopped with the training")
        self.waiting = None

    def _collect(self) -> tuple[int, subprocess.Popen]:
        """Wait for the running process and return it with its step."""
        assert self.running is not None, "no probe is running whose result could be collected"
        step, process = self.running
        process.communicate()
        self.running = None
        return step, process


def _read_score(path: Path) -> dict[str, Any]:
    """Read a score file: at least "score", 0 to 1, and "tokens", those that the checkpoint was trained on."""
    result = read_json(path)
    check_format_version(path, result, SCORE_VERSION, "Update MegaBERT, or delete the file to leave its score out.")
    if not all(isinstance(result.get(name), (int, float)) for name in ("score", "tokens")):
        raise ValueError(f"{path}: damaged: it has no score, or no tokens. Delete it to leave its score out.")
    return result
