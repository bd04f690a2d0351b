"""Faster implementations of the model's operations, one file each. README.md describes them.

Importing this package imports no kernel; resolve.py imports the kernels that it chose. Deleting a kernel's file does
not affect model/.
"""

# Head sizes of the Triton attention: powers of two, from 16 on, the least that tensor cores multiply.
HEAD_DIMS = (16, 32, 64, 128)
# The widest row that a LayerNorm kernel holds in registers.
MAX_WIDTH = 8192
