"""What a run reports: one line for people, TensorBoard for curves, metrics.jsonl for programs. Rank 0 only.

loss             nats per masked token, mean over all since the last line; masked_accuracy: share predicted exactly
lr, grad_norm    of the last step; the norm before clipping
masked_share     masked tokens / real tokens
tokens, seconds  since the start of the run, over all restarts
tokens_per_s     real tokens of all ranks per second, specials counted, filler not, evaluation and saving left out
mfu              needed FLOPs per second / the devices' peak (flops.py); on a CPU a peak measured at the start
fill             real tokens / token slots
loader_wait      share of the step's time that rank 0 waited for data
time/...         seconds per step on rank 0: data (waiting for batches), forward, backward (ZeRO's reduction of gradients in it),
                 optimizer (ZeRO's gathering of weights in it), agree (the all-reduce at a step's end: waiting for the others)
tokens_per_s_per_rank  tokens_per_s / ranks
slowest_rank, fastest_rank  real tokens per second of a rank alone, of loading and forward, which wait for no other (at ZeRO 3
                 forward does: it fetches weights)
memory_gb        most that rank 0 has used so far: of the device; on a CPU resident memory
skipped_updates  refused by the guard since the start of the run
skipped_chunks   damaged and left out since the start of the run
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megabert.files.metrics_format import METRICS, read_metrics
from megabert.training.telemetry.timers import Stopwatch
from megabert.training.telemetry.trackers import Appended, Tracker


class Meter:
    """Adds up what happens between two lines of the log, over all ranks but for own_tokens and the times, which are this one's."""

    def __init__(self, event: Any) -> None:
        """event: as Stopwatch's."""
        self.watch = Stopwatch(event)
        self.reset()

    def reset(self) -> None:
        self.loss_sum = self.num_correct = self.num_targets = self.tokens = self.slots = self.squared_lengths = 0.0
        self.steps = self.own_tokens = 0
        self.paused = 0.0
        self.watch.reset()
        self.started = time.perf_counter()

    def add(self, counted: list[float]) -> None:
        """One step: loss_sum, num_correct, num_targets, tokens, slots, sum of squared lengths."""
        loss_sum, num_correct, num_targets, tokens, slots, squared_lengths = counted
        self.loss_sum += loss_sum
        self.num_correct += num_correct
        self.num_targets += num_targets
        self.tokens += tokens
        self.slots += slots
        self.squared_lengths += squared_lengths
        self.steps += 1

    def seconds(self) -> float:
        return time.perf_counter() - self.started - self.paused


class Reporter:
    """Rank 0's voice: a progress bar on a terminal, plain lines elsewhere (a log file, SLURM), metrics.jsonl, and trackers."""

    def __init__(self, folder: Path, total_steps: int, step: int, trackers: list[Tracker]):
        folder.mkdir(parents=True, exist_ok=True)
        self.total = total_steps
        self.path = folder / METRICS
        _forget_after(self.path, step)
        self.file = Appended(self.path)
        self.trackers = trackers
        self.problem: OSError | None = None
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, desc="pretraining")

    def expect(self, total_steps: int) -> None:
        """Say how many steps there will probably be, where the clock ends the run."""
        self.total = total_steps
        if self.bar is not None:
            self.bar.total = total_steps

    def log(self, step: int, values: dict[str, float]) -> None:
        """One point of every curve, and one line."""
        self.record(step, values)
        eta = _duration((self.total - step) * values["seconds_per_step"])
        line = f"loss {values['loss']:.3f}  lr {values['lr']:.2e}  {values['tokens_per_s']:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.n = step
            self.bar.set_postfix_str(line)
        else:
            _print(f"step {step}/{self.total}  {line}  left {eta}")

    def say(self, message: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is not None:
            self.bar.write(message, file=sys.stderr)
        else:
            _print(message)

    def record(self, step: int, values: dict[str, float]) -> None:
        """One point of every curve. What cannot be written waits for the next, which is said once: training is dearer."""
        problem = None
        for write in (*(tracker.record for tracker in self.trackers), self._write):
            try:
                write(step, values)
            except OSError as mistake:
                problem = mistake
        if problem is not None and self.problem is None:
            self.say(
                f"{self.path.parent}: the metrics of step {step} cannot be written there: {problem}. They wait in memory; make room "
                "before the next checkpoint."
            )
        if problem is None and self.problem is not None:
            self.say(f"{self.path.parent}: the metrics are written again")
        self.problem = problem

    def add_to(self, name: str, facts: dict[str, Any]) -> None:
        """One line of JSON at the end of another file of the run's; said aloud where it cannot be written."""
        line = json.dumps(facts)
        try:
            with open(self.path.with_name(name), "a") as file:
                file.write(line + "\n")
        except OSError as mistake:
            self.say(f"{name}: {mistake}; it would have said {line}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.file.add(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        for one in (*self.trackers, self.file):
            with contextlib.suppress(OSError):  # which has been said by record()
                one.close()
        if self.bar is not None:
            self.bar.close()


def _forget_after(path: Path, step: int) -> None:
    """Drop records of steps that a resumed run will do again."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(temporary, path)


def _print(line: str) -> None:
    with contextlib.suppress(OSError):  # a log on a full disk, or a pipe whose reader has gone, ends no run
        print(line, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
