"""Trials of the race: one training of a contender, recorded when it has ended, and the search among settings."""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from race import clock, scoring
from race.clock import Clock, Contender
from race.records import Records, hash_of
from race.sides.grids import SEARCH_SEEDS
from race.texts.corpora import Corpus

from megabert.finetune.tasks.task import Task
from megabert.training.updates.guard import DivergedError

# One of so many settings goes on to the next rung.
KEPT = 4
Any_ = TypeVar("Any_", bound=Contender)


@dataclass(frozen=True)
class Track:
    """A corpus, and where trials on it are trained and recorded."""

    corpus: Corpus
    records: Records
    out: Path
    tasks: list[Task]
    examples: int

    def clock(self, contender: Contender) -> Clock:
        found = clock.find(contender, self.corpus, self.records)
        assert found is not None, "clocks are measured before trials"
        return found

    def trial(self, contender: Contender, steps: int, seed: int, scored: bool = False) -> dict[str, Any]:
        """Return the record of a training; train only if there is none. scored: fine-tune the model too."""
        tasks = [task.name for task in self.tasks] if scored else []
        identity = {
            "kind": "trial", "side": contender.side, "key": hash_of([contender.side, contender.settings]),
            "corpus": self.corpus.hash, "steps": steps, "seed": seed, "tasks": tasks,
            "examples": self.examples if scored else 0,
        }  # fmt: skip
        if (found := self.records.last(**identity)) is not None:
            return found
        out = self.out / "trial"
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
        when = {"settings": contender.settings, "ended": datetime.now(UTC).isoformat(timespec="seconds")}
        return self.records.append(identity | values | when)

    def fine_tune(self, folder: Path, out: Path, seed: int, pretrained: bool) -> list[float]:
        return scoring.fine_tune(folder, out / "start", self.tasks, seed, pretrained, self.examples)


def loss_of(record: dict[str, Any]) -> float:
    """Return a trial's loss; infinity if it failed."""
    return math.inf if record["loss"] is None else record["loss"]


def halve(track: Track, contenders: Sequence[Any_], budgets: Sequence[float]) -> list[tuple[float, Any_]]:
    """Train all settings for the first budget, the best quarter for the second, and so on.

    Each training's schedule ends at its own budget. Returns the losses and settings of the last budget, the best first.
    """
    ranked: list[tuple[float, Any_]] = []
    left = list(contenders)
    for number, budget in enumerate(budgets):
        ranked = []
        for contender in left:
            steps = track.clock(contender).steps_in(budget)
            loss = loss_of(track.trial(contender, steps, SEARCH_SEEDS[0])) if steps else math.inf
            ranked.append((loss, contender))
            print(f"  {budget:.0f} s, {steps} steps: loss {loss:.3f}  {short(contender)}", flush=True)
        ranked.sort(key=lambda pair: pair[0])
        if number < len(budgets) - 1:
            left = [contender for _, contender in ranked[: -(-len(ranked) // KEPT)]]
    return ranked


def short(contender: Contender) -> str:
    """Describe a setting by what differs from the side's default."""
    default = type(contender)().settings
    changed = {name: value for name, value in contender.settings.items() if default.get(name) != value}
    return f"{contender.side} " + (", ".join(f"{name} {value}" for name, value in changed.items()) or "default")
