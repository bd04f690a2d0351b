"""Compute the losses of the heads, chosen as transformers chooses them, and check the shapes of their labels."""

import torch.nn.functional as F
from torch import Tensor

from .configuration_megabert import MegaBertConfig
from .inputs import check_shape
from .ops import IGNORE_INDEX, upcast
from .padding import Tokens


def token_loss(logits: Tensor, labels: Tensor | None, tokens: Tokens) -> Tensor | None:
    """Return the mean cross-entropy of logits (T, C) over the tokens whose label is not IGNORE_INDEX."""
    if labels is None:
        return None
    check_shape("labels", labels, tokens.shape, "a label per token")
    targets = _integers("labels", tokens.pick_labels(labels))
    return F.cross_entropy(upcast(logits), targets, ignore_index=IGNORE_INDEX)


def classification_loss(logits: Tensor, labels: Tensor | None, config: MegaBertConfig) -> Tensor | None:
    """Choose the loss as transformers does: problem_type if set, else by num_labels and the labels' dtype.

    logits: (B, num_labels). labels: (B,) or (B, 1) for one label or one number per document, else (B, num_labels).
    """
    if labels is None:
        return None
    kind = config.problem_type
    if kind is None:
        integers = not labels.is_floating_point()
        kind = "regression" if config.num_labels == 1 else "single" if integers else "multi"
    if kind.startswith("single"):
        return choice_loss(logits, labels)
    if logits.shape[1] == 1:
        labels = _column("labels", labels, logits.shape[0], "one number per document")[:, None]
    check_shape("labels", labels, tuple(logits.shape), "a number per document and label")
    wide = upcast(logits)
    loss = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    return loss(wide, labels.to(wide.dtype))


def choice_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Return the mean cross-entropy of logits (B, C) with labels (B,) or (B, 1)."""
    if labels is None:
        return None
    targets = _column("labels", labels, logits.shape[0], "one label per document")
    return F.cross_entropy(upcast(logits), _integers("labels", targets))


def span_loss(
    start: Tensor, end: Tensor, start_positions: Tensor | None, end_positions: Tensor | None
) -> Tensor | None:
    """Return the mean of both ends' cross-entropies. start, end: (B, S) scores; positions: (B,) or (B, 1) slots.

    Positions outside the row are ignored, as in BERT.
    """
    batch, length = start.shape
    losses = []
    for name, scores, positions in (("start_positions", start, start_positions), ("end_positions", end, end_positions)):
        if positions is not None:
            slots = _integers(name, _column(name, positions, batch, "one slot per row")).clamp(0, length)
            losses.append(F.cross_entropy(upcast(scores), slots, ignore_index=length))
    return (losses[0] + losses[1]) / 2 if len(losses) == 2 else None


def _column(name: str, values: Tensor, batch: int, meaning: str) -> Tensor:
    """Return (B,) or (B, 1) as (B,). Raises ValueError for another shape."""
    if values.dim() == 2 and values.shape[1] == 1:
        values = values[:, 0]
    check_shape(name, values, (batch,), meaning)
    return values


def _integers(name: str, values: Tensor) -> Tensor:
    """Return int64 labels. Raises ValueError for fractions, which would be cut off."""
    if values.is_floating_point():
        raise ValueError(f"{name} are {values.dtype}, expected integers.")
    return values.long()
