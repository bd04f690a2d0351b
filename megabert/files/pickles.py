"""Check which classes the pickles of a checkpoint name; no pickle is ever executed."""

import zipfile
from pathlib import Path
from pickle import UnpicklingError

from torch.serialization import get_unsafe_globals_in_checkpoint

from megabert.process.error_text import first_line

# Besides tensors and plain containers, DeepSpeed's files name these classes, all of which only hold values.
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# Python 3.11.0 to 3.11.3 pickle a member of an enumeration as a call of this. Readers put a function in its place that
# returns nothing else.
GETATTR = "builtins.getattr"
# What torch's unpickler raises for bytes that are not a pickle of tensors.
UNPICKLING_ERRORS = (
    UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    AssertionError,
    TypeError,
    ValueError,
    AttributeError,
)


def check_pickle(path: Path) -> None:
    """Raise ValueError unless a .pt file is what torch.save writes, of tensors, containers and DEEPSPEED_CLASSES.

    The file is not loaded: only the names in it are read. Older formats of torch.save are refused.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: damaged, or not in a format that MegaBERT writes.")
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except UNPICKLING_ERRORS as error:
        raise ValueError(f"{path}: damaged: {first_line(error)}") from error
    if foreign := sorted(set(names) - {*DEEPSPEED_CLASSES, GETATTR}):
        raise ValueError(
            f"{path}: was not read, because it names {', '.join(foreign)}, which no MegaBERT checkpoint does. It was "
            "not written by MegaBERT, or was changed later: do not trust its folder."
        )
