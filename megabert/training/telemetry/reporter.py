"""Report a run's progress on rank 0: log lines, metrics.jsonl and trackers (../README.md lists the metrics)."""

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from megabert.files.atomic import write_atomically
from megabert.files.metrics_format import METRICS, read_metrics
from megabert.files.redact import redact
from megabert.training.telemetry.timers import EventClass, StepTimer
from megabert.training.telemetry.trackers import BufferedAppender, Tracker


class Meter:
    """Sums over the steps since the last report, over all ranks; local_tokens and the times are this rank's."""

    def __init__(self, event_class: EventClass | None) -> None:
        """event_class: as for StepTimer."""
        self.timer = StepTimer(event_class)
        self.reset()

    def reset(self) -> None:
        self.loss_sum = self.num_correct = self.num_targets = self.tokens = self.slots = self.squared_lengths = 0.0
        self.steps = self.local_tokens = 0
        # Seconds spent on evaluation and saving.
        self.excluded_seconds = 0.0
        self.timer.reset()
        self.started_at = time.perf_counter()

    def add_step(self, sums: list[float]) -> None:
        """Add one step. sums: loss_sum, num_correct, num_targets, tokens, slots, sum of squared lengths."""
        loss_sum, num_correct, num_targets, tokens, slots, squared_lengths = sums
        self.loss_sum += loss_sum
        self.num_correct += num_correct
        self.num_targets += num_targets
        self.tokens += tokens
        self.slots += slots
        self.squared_lengths += squared_lengths
        self.steps += 1

    def seconds(self) -> float:
        """Return the time spent on training steps since the last reset."""
        return time.perf_counter() - self.started_at - self.excluded_seconds


class Reporter:
    """Rank 0's output: a progress bar on a terminal or plain lines elsewhere, metrics.jsonl, and trackers."""

    def __init__(self, folder: Path, total_steps: int, step: int, trackers: list[Tracker]):
        """step: from which the run continues; metrics of later steps are dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self.total_steps = total_steps
        self.path = folder / METRICS
        _drop_after(self.path, step)
        self.file = BufferedAppender(self.path)
        self.trackers = trackers
        self.error: OSError | None = None
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, desc="pretraining")

    def set_total_steps(self, total_steps: int) -> None:
        """Update the estimate of the run's length, if a time budget ends it."""
        self.total_steps = total_steps
        if self.bar is not None:
            self.bar.total = total_steps

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics, and print or update the line that shows the progress."""
        self.log_metrics(step, values)
        left = _duration((self.total_steps - step) * values["seconds_per_step"])
        line = f"loss {values['loss']:.3f}  lr {values['lr']:.2e}  {values['tokens_per_s']:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.n = step
            self.bar.set_postfix_str(line)
        else:
            _print(f"step {step}/{self.total_steps}  {line}  left {left}")

    def log_line(self, message: str) -> None:
        """Print a line of its own, above the progress bar, without the secrets of URLs and commands."""
        message = redact(message)
        if self.bar is not None:
            self.bar.write(message, file=sys.stderr)
        else:
            _print(message)

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Add one point to every curve.

        What cannot be written is kept and retried with the next point. That is logged once and never ends the training.
        """
        failed = None
        for write in (*(tracker.log_metrics for tracker in self.trackers), self._write):
            try:
                write(step, values)
            except OSError as error:
                failed = error
        if failed is not None and self.error is None:
            self.log_line(
                f"{self.path.parent}: the metrics of step {step} cannot be written there: {failed}. They are kept in "
                "memory; free some space before the next checkpoint."
            )
        if failed is None and self.error is not None:
            self.log_line(f"{self.path.parent}: the metrics are written again")
        self.error = failed

    def append_json(self, name: str, record: Mapping[str, object]) -> None:
        """Append one line of JSON to another file of the run, which MegaBERT never reads; print it if that fails."""
        line = json.dumps(record)
        try:
            with open(self.path.with_name(name), "a") as file:
                file.write(line + "\n")
        except OSError as error:
            self.log_line(f"{name}: {error}; this line is missing there: {line}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        # No format version: readers use the names they know, and a metric whose meaning changes gets a new name.
        self.file.append(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        for output in (*self.trackers, self.file):
            # log_metrics has already reported the error.
            with contextlib.suppress(OSError):
                output.close()
        if self.bar is not None:
            self.bar.close()


def _drop_after(path: Path, step: int) -> None:
    """Drop the records of later steps, which a resumed run will do again."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _print(line: str) -> None:
    # A full disk under the log, or a pipe without a reader, must not end the run.
    with contextlib.suppress(OSError):
        print(line, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
