"""This package holds faster implementations of the model's operations, one file each. README.md describes them.

Importing this package imports no kernel; resolve.py imports the kernels that it chose. Deleting a kernel's file does
not affect model/.
"""

from typing import NamedTuple

# Head sizes of the Triton attention: powers of two, from 16 on, the least that tensor cores multiply.
HEAD_DIMS = (16, 32, 64, 128)
# The widest row that a LayerNorm kernel holds in registers.
MAX_WIDTH = 8192
# Documents up to this length fit one program's registers, for heads of up to 64.
SHORT = 128


class Tile(NamedTuple):
    """The block sizes of a kernel: what one program holds and what it reads per step; its warps and pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


def tile_of(kernel: str, head_dim: int, dropout: bool, window: bool = False, alibi: bool = True) -> Tile:
    """Return the largest tile that spills no register on sm_80, sm_90a and sm_100a and uses their tensor cores.

    The times of other tiles have not been compared.
    Those of "forward" and "query" have the same number of rows.
    """
    wide = head_dim > 64
    if kernel in ("forward", "query") and window and dropout:
        return Tile(64 if wide else 128, 32, 8, 2 if wide or kernel == "query" else 1)
    if kernel == "forward":
        return Tile(128, 32 if wide and dropout else 64, 8, 1 if dropout and not wide else 2)
    if kernel == "query":
        return Tile(128, 32 if wide else 64, 8, 2)
    if kernel == "short":
        return Tile(SHORT, 32 if dropout or window else 64, 8, 1)
    assert kernel == "key", f"there is no kernel {kernel!r}"
    if head_dim <= 32:
        return Tile(64, 64, 4, 1)
    if not dropout:
        # Without ALiBi, 64 rows in two stages spill registers on sm_80.
        return Tile(64 if alibi or window or wide else 32, 64, 8, 2)
    if wide:
        return Tile(32, 64, 8, 2)
    # The tensor cores of sm_90a and sm_100a multiply 64 keys at least.
    return Tile(16, 64, 4, 1) if window else Tile(64, 32, 4, 1)
