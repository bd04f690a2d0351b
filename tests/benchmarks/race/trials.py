"""Trials of the race: one training of a contender, recorded when it has ended, and the search among settings.

Trials that do not depend on each other are trained at the same time, in processes that share the threads: two with a
thread each train more steps a minute than one with two threads.
"""

import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from race import clock, scoring
from race.clock import Clock, Contender, environment
from race.records import Records, hash_of
from race.sides.grids import SEARCH_SEEDS
from race.texts.corpora import Corpus

from megabert.finetune.tasks.task import Task
from megabert.process.subprocesses import exit_with_parent
from megabert.training.distributed.process import keep_freed_memory
from megabert.training.updates.guard import DivergedError

# One of so many settings goes on to the next rung.
KEPT = 4
Any_ = TypeVar("Any_", bound=Contender)


class Trial(NamedTuple):
    """A training to its end. scored: the model is fine-tuned too."""

    contender: Contender
    steps: int
    seed: int
    scored: bool = False


@dataclass(frozen=True)
class Track:
    """A corpus, and where trials on it are trained and recorded.

    examples: most of a task's to train on and to score; 0: all. processes: trials at the same time.
    """

    corpus: Corpus
    records: Records
    out: Path
    tasks: list[Task]
    examples: int
    processes: int = 1

    def clock(self, contender: Contender) -> Clock:
        found = clock.find(contender, self.corpus, self.records)
        assert found is not None, "clocks are measured before trials"
        return found

    def trials(self, wanted: Sequence[Trial]) -> list[dict[str, Any]]:
        """Return the records of trainings, in this order; train those that have none."""
        missing = [trial for trial in wanted if self.find(trial) is None]
        for trial, values in self.run(missing):
            when = {"settings": trial.contender.settings, "ended": datetime.now(UTC).isoformat(timespec="seconds")}
            loss = loss_of(self.records.append(self.identity(trial) | values | when))
            print(
                f"  trained: {trial.steps} steps, seed {trial.seed}, loss {loss:.3f}  {short(trial.contender)}",
                flush=True,
            )
        found = [self.find(trial) for trial in wanted]
        return [record for record in found if record is not None]

    def find(self, trial: Trial) -> dict[str, Any] | None:
        return self.records.last(**self.identity(trial))

    def identity(self, trial: Trial) -> dict[str, Any]:
        """Return the fields of a trial's record that no other trial's record has."""
        side = trial.contender.side
        return {
            "kind": "trial", "side": side, "key": hash_of([side, trial.contender.settings]),
            "corpus": self.corpus.hash, "steps": trial.steps, "seed": trial.seed,
            "tasks": [task.name for task in self.tasks] if trial.scored else [],
            "examples": self.examples if trial.scored else 0,
        }  # fmt: skip

    def run(self, missing: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Any]]]:
        """Train, and yield what each trial measured, as soon as it has ended."""
        processes = min(self.processes, len(missing))
        if processes < 2:
            yield from ((trial, self.measure(trial)) for trial in missing)
            return
        spawn = multiprocessing.get_context("spawn")
        threads = share_threads(torch.get_num_threads(), processes, len(missing))
        # megabert.pretrain() leaves the number of threads alone if this is set.
        with environment(OMP_NUM_THREADS="1"), ProcessPoolExecutor(processes, spawn, start_worker) as pool:
            futures = {pool.submit(self.measure, *job): job[0] for job in zip(missing, threads, strict=True)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def measure(self, trial: Trial, threads: int | None = None) -> dict[str, Any]:
        """Train a trial, and return its loss, scores and seconds. threads: None leaves their number as it is."""
        contender, steps, seed, scored = trial
        if threads is not None:
            torch.set_num_threads(threads)
        out = self.out / f"trial-{os.getpid()}"
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        values: dict[str, Any] = {"loss": None}
        try:
            folder = contender.train(self.corpus, steps, seed, out)
        except DivergedError as error:
            values["failed"] = str(error)
        else:
            values["wall_s"] = time.perf_counter() - began
            loss = scoring.held_out_loss(contender.load(folder), self.corpus)
            values["loss"] = loss if math.isfinite(loss) else None
            if scored:
                values["scores"] = self.fine_tune(folder, out, seed, pretrained=True)
                if contender.side == "baseline":
                    values["random_twin"] = self.fine_tune(folder, out, seed, pretrained=False)
        shutil.rmtree(out, ignore_errors=True)
        return values

    def fine_tune(self, folder: Path, out: Path, seed: int, pretrained: bool) -> list[float]:
        return scoring.fine_tune(folder, out / "start", self.tasks, seed, pretrained, self.examples)


def share_threads(threads: int, processes: int, trials: int) -> list[int]:
    """Return each trial's threads. The last trials, too few for all processes, have more: (2, 2, 3) -> [1, 1, 2]."""
    last = trials % processes
    shares = [threads // processes] * (trials - last)
    return shares + [threads // last] * last if last else shares


def start_worker() -> None:
    exit_with_parent()
    prepare_process()


def prepare_process() -> None:
    """Prepare a process for trials of both sides."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # megabert.pretrain() asks malloc for this in the process that it runs in. So the baseline has it from the start.
    keep_freed_memory()


def loss_of(record: dict[str, Any]) -> float:
    """Return a trial's loss; infinity if it failed."""
    return math.inf if record["loss"] is None else record["loss"]


def halve(track: Track, contenders: Sequence[Any_], budgets: Sequence[float]) -> list[tuple[float, Any_]]:
    """Train all settings for the first budget, the best quarter for the second, and so on.

    It ends when one setting is left. Each training's schedule ends at its own budget. Returns the losses and settings
    of the last budget, the best first.
    """
    ranked: list[tuple[float, Any_]] = []
    left = list(contenders)
    for number, budget in enumerate(budgets):
        if number and len(left) == 1:
            break
        rung = [Trial(each, track.clock(each).steps_in(budget), SEARCH_SEEDS[0]) for each in left]
        records = iter(track.trials([trial for trial in rung if trial.steps]))
        losses = [loss_of(next(records)) if trial.steps else math.inf for trial in rung]
        ranked = list(zip(losses, left, strict=True))
        for trial, (loss, contender) in zip(rung, ranked, strict=True):
            print(f"  {budget:.0f} s, {trial.steps} steps: loss {loss:.3f}  {short(contender)}", flush=True)
        ranked.sort(key=lambda pair: pair[0])
        if number < len(budgets) - 1:
            left = [contender for _, contender in ranked[: -(-len(ranked) // KEPT)]]
    return ranked


def short(contender: Contender) -> str:
    """Describe a setting by what differs from the side's default."""
    default = type(contender)().settings
    changed = {name: value for name, value in contender.settings.items() if default.get(name) != value}
    return f"{contender.side} " + (", ".join(f"{name} {value}" for name, value in changed.items()) or "default")
