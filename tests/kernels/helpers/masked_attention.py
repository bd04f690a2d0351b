"""Attention in PyTorch with the dropout masks of the Triton kernels."""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabert.kernels.dropout import threshold, tile_factor

ROWS = 16


@triton.jit
def write_mask(OUT, SEED, start, length, head, below, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    keep = tile_factor(tl.load(SEED), start + rows, 0, head, below, 1.0, COLUMNS)
    inside = (rows[:, None] < length) & (columns[None, :] < length)
    tl.store(OUT + rows[:, None] * length + columns[None, :], keep, mask=inside)


def masks_of(lengths: list[int], heads: int, dropout_p: float, seed: Tensor) -> list[Tensor]:
    """Return the mask of each document, (H, L, L) of 0 and 1. seed: (1,) int64, from draw_seed()."""
    masks, start = [], 0
    for length in lengths:
        mask = torch.zeros(heads, length, length, device=seed.device)
        columns = max(16, triton.next_power_of_2(length))
        for head in range(heads):
            write_mask[(triton.cdiv(length, ROWS),)](
                mask[head], seed, start, length, head, threshold(dropout_p), ROWS=ROWS, COLUMNS=columns
            )
        masks.append(mask)
        start += length
    return masks


def masked_attention(slopes: Tensor, size: int, masks: list[Tensor], dropout_p: float) -> Callable[[Tensor], Tensor]:
    """Return the specification with these masks on the weights: (T, 3, H, D) -> (T, H, D)."""

    def attend(qkv: Tensor) -> Tensor:
        outputs = []
        for mask, part in zip(masks, qkv.split([mask.shape[-1] for mask in masks]), strict=True):
            query, key, value = part.permute(1, 2, 0, 3)
            place = torch.arange(len(part), device=qkv.device)
            bias = -slopes[:, None, None] * (place[:, None] - place[None, :]).abs()
            weights = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(size) + bias.to(qkv.dtype), dim=-1)
            outputs.append((weights * mask.to(qkv.dtype) / (1 - dropout_p) @ value).transpose(0, 1))
        return torch.cat(outputs)

    return attend
