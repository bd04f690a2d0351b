"""Faster operations, one file each; any of them may be deleted without touching model/. README.md has the whole story.

Importing this package imports no kernel: resolve.py does, once it has chosen.
"""

HEAD_DIMS = (16, 32, 64, 128)  # what the Triton attention computes: powers of two from the tensor cores' 16 on
MAX_WIDTH = 8192  # the widest row that a LayerNorm kernel holds in registers
