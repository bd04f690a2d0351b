"""Export a masked language model to ONNX: padded token ids in, padded logits out, for any batch size and length."""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from megabert.model.modeling_megabert import MegaBertForMaskedLM

ONNX_MODEL = "onnx/model.onnx"  # where Hugging Face's tools look for it
OPSET = 18  # the oldest that torch's exporter writes without a conversion


def check_installed() -> None:
    """Raises ValueError naming the packages that are missing."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ValueError(f"--onnx needs {', '.join(missing)}: pip install 'megabert[onnx]'.")


def write_onnx(model: MegaBertForMaskedLM, folder: Path) -> None:
    """Write onnx/model.onnx, and model.onnx.data with the weights if they are large.

    The model computes only on real tokens, whose number depends on the data and cannot be expressed in a graph.
    torch.export therefore traces a path that computes all B * S positions and masks the padded keys
    (padding.unpad_in_place). Logits at padding are meaningless.
    """
    check_installed()
    path = folder / ONNX_MODEL
    path.parent.mkdir()
    # The exporter would merge one tensor that is passed twice into one input.
    example = torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}  # the names of the graph's axes
    # The exporter logs and warns about its own future and about torchvision's operations.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(),
            example,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None, "dynamo's exporter returns the program"
        program.save(path, external_data=None)
