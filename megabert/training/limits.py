"""What does not fit together in a run, known before it starts; imports no torch."""

import importlib.util
from collections.abc import Sequence


def why_not_compile(device_type: str, zero_stage: int) -> str | None:
    """Return why torch.compile cannot be applied to the whole model, or None. Not run on a GPU yet."""
    if device_type == "cpu":
        return (
            "run.compile true on a CPU: run.ops auto already compiles each operation there, and attention, which "
            "depends on the documents' lengths, would be compiled again at every step. Set run.compile false."
        )
    if zero_stage == 3:
        return (
            "run.compile true at ZeRO 3: fetching weights breaks the graph in every layer. Use ds_configs/zero2.json, "
            "or set run.compile false."
        )
    return None


def why_no_trackers(names: Sequence[str]) -> str | None:
    """Return what these trackers lack, with a remedy; None if they can be opened."""
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        return "run.trackers contains wandb, which is not installed. Run pip install wandb, or leave it out."
    return None
