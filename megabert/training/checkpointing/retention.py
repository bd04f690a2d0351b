"""Which checkpoints stay: the last ones, every n-th step's, and the best."""

from collections.abc import Mapping
from dataclasses import dataclass

from megabert.files.checkpoint_format import step_of


@dataclass(frozen=True)
class Retention:
    """last: how many of the newest; every_steps: all of multiples of so many steps, 0: none; best: the lowest loss."""

    last: int
    every_steps: int = 0
    best: bool = False

    def expendable(self, heldout_loss: Mapping[str, float | None], good: int | None = None) -> list[str]:
        """The tags to delete, newest first. heldout_loss: of each tag, None where it was not measured.

        good: the step of the last update that was made, if some after it were refused: a rollback wants the newest
        checkpoint up to there.

        Retention(last=1, best=True) on step 10: 3.0, step 20: 2.0, step 30: 2.5 -> step 10.
        """
        tags = sorted(heldout_loss, key=step_of, reverse=True)
        kept = set(tags[: self.last])
        if good is not None:
            kept |= set([tag for tag in tags if step_of(tag) <= good][:1])
        if self.every_steps:
            kept |= {tag for tag in tags if step_of(tag) % self.every_steps == 0}
        if self.best and (measured := {tag: loss for tag, loss in heldout_loss.items() if loss is not None}):
            kept.add(min(measured, key=lambda tag: (measured[tag], step_of(tag))))
        return [tag for tag in tags if tag not in kept]
