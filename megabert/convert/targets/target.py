"""Define a target of an export: its files, what it cannot do, and the proof that it computes what the model does."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from megabert.model.configuration_megabert import MegaBertConfig

SAME_TEXT = 0.9


class DiffersError(ValueError):
    """A target's own program gives something else than the checkpoint; the message says what."""


class ExportedFolder(NamedTuple):
    """The finished transformers folder that a target is made from. weights: by our names, memory-mapped.

    tokenizer: the content of its tokenizer.json; max_length: at which a text is cut, in tokens.
    """

    folder: Path
    config: MegaBertConfig
    weights: dict[str, Tensor]
    tokenizer: dict[str, Any]
    max_length: int


class Expected(NamedTuple):
    """What the checkpoint gives, N texts.

    ids: each text's, with special tokens; pooled: (N, E) fp32, the mean of each text's states; inputs: the export
    check's input_ids, attention_mask (B, S) and logits (T, V) of real tokens; states: (T, E) of those tokens.
    """

    texts: list[str]
    ids: list[list[int]]
    pooled: np.ndarray
    inputs: dict[str, np.ndarray]
    states: np.ndarray


class Proof(NamedTuple):
    """Which program opened a target, and what it measured.

    difference: the largest from the checkpoint, in what `measure` says. notes: other facts that a user should know.
    """

    program: str
    version: str
    difference: float
    measure: str
    notes: tuple[str, ...] = ()


class NotOpened(NamedTuple):
    """Why no proof was possible here. needs: what has to be installed."""

    needs: str


@dataclass(frozen=True)
class Target:
    """One program's format.

    packages: to write it, by the names that Python imports; extra: of setup.py, which installs them. requires: targets
    that are written first. check: raises ValueError if this model cannot be written so, and lists what the user should
    know before. write: adds files to the folder and says what wrote them. prove: compares the folder's files with
    what is expected, raising DiffersError. use: three lines of code for the model card.
    """

    name: str
    check: Callable[[MegaBertConfig, dict[str, Any], int], list[str]]
    write: Callable[[ExportedFolder, Path], str]
    prove: Callable[[Path, Expected], Proof | NotOpened]
    use: str
    language: str = "python"
    packages: tuple[str, ...] = ()
    extra: str = ""
    requires: tuple[str, ...] = field(default=())

    def check_packages(self) -> None:
        """Raise ValueError naming the packages that are missing."""
        if missing := [name for name in self.packages if find_spec(name) is None]:
            raise ValueError(f"--for {self.name} needs {', '.join(missing)}: pip install 'megabert[{self.extra}]'.")


def largest_difference(got: np.ndarray, wanted: np.ndarray, tolerance: float, what: str) -> float:
    """Return the largest difference. Raises DiffersError above the tolerance, relative to a largest value above 1."""
    if got.shape != wanted.shape:
        raise DiffersError(f"{what} have shape {got.shape}, expected {wanted.shape}")
    difference = float(np.abs(got - wanted).max(initial=0.0))
    # Rounding errors of fp32 are relative.
    allowed = tolerance * max(1.0, float(np.abs(wanted).max(initial=0.0)))
    # This form of the comparison also refuses NaN.
    if not difference <= allowed:
        raise DiffersError(f"{what} differ by {difference:.3g}, more than {allowed:.1e}")
    return difference


def smallest_cosine(got: np.ndarray, wanted: np.ndarray, least: float, what: str) -> float:
    """Return the smallest cosine of two (N, E). Raises DiffersError below `least`.

    Embeddings of different texts have much in common, which hides a wrong token. The mean cosine of what is left
    without the mean of all texts must therefore be at least SAME_TEXT.
    """
    if got.shape != wanted.shape:
        raise DiffersError(f"{what} have shape {got.shape}, expected {wanted.shape}")
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    cosine = float(_cosines(got, wanted).min())
    # This form of the comparison also refuses NaN.
    if not cosine >= least:
        raise DiffersError(f"{what}: the smallest cosine is {cosine:.6f}, less than {least}")
    own = float(_cosines(got - got.mean(axis=0), wanted - wanted.mean(axis=0)).mean())
    if not own >= SAME_TEXT:
        raise DiffersError(f"{what}: without what all texts have in common, the mean cosine is {own:.3f}")
    return cosine


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(axis=1) / np.maximum(lengths, 1e-30)


def mean_of_tokens(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Average states (B, S, E) over the real tokens of mask (B, S): (B, E)."""
    return (states * mask[:, :, None]).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)[:, None]


def batches(ids: list[list[int]], pad: int, tokens: int = 4096) -> list[tuple[list[int], np.ndarray, np.ndarray]]:
    """Group texts of similar lengths: their numbers, and padded input_ids and attention_mask (B, S) int64."""
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    groups: list[list[int]] = []
    for number in order:
        if not groups or (len(groups[-1]) + 1) * len(ids[number]) > tokens:
            groups.append([])
        groups[-1].append(number)
    result = []
    for group in groups:
        width = max(len(ids[number]) for number in group)
        rows = np.full((len(group), width), pad, dtype=np.int64)
        mask = np.zeros((len(group), width), dtype=np.int64)
        for row, number in enumerate(group):
            rows[row, : len(ids[number])] = ids[number]
            mask[row, : len(ids[number])] = 1
        result.append((group, rows, mask))
    return result
