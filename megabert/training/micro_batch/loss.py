"""Compute the loss of a micro-batch as its share of the step's loss."""

import math

import torch
from torch import Tensor

from megabert.model.ops import MaskedLoss


def scaled_loss(output: MaskedLoss, scale: Tensor) -> Tensor:
    """Return the loss to differentiate. scale: () fp32, ranks / all masked tokens of the step.

    A non-finite loss may have finite gradients. Multiplied by NaN, they make the guard skip the update on every rank.
    """
    return output.loss_sum * torch.where(output.loss_sum.isfinite(), scale, math.nan)
