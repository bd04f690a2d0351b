"""This package computes the operations on a CPU, fused by torch.compile."""

from megabert.kernels.cpu.compiled import add_layer_norm, embed_layer_norm, geglu
from megabert.kernels.cpu.cross_entropy import masked_cross_entropy
from megabert.kernels.cpu.rotate import rotate
from megabert.model.ops import TORCH_OPS

CPU_OPS = TORCH_OPS._replace(
    rotate=rotate,
    geglu=geglu,
    add_layer_norm=add_layer_norm,
    embed_layer_norm=embed_layer_norm,
    masked_cross_entropy=masked_cross_entropy,
)
