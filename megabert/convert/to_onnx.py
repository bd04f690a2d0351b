"""Write a masked language model as ONNX: padded rows in, padded logits out, any batch and any length.

The model computes on tokens without padding, whose number depends on the data, which no graph can say. So what torch.export
sees of it computes all B * S slots (padding.unpad_in_place), with padded keys masked; logits at padding mean nothing.
"""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from megabert.model.modeling_megabert import MegaBertForMaskedLM

FILE = "onnx/model.onnx"  # where Hugging Face's tools look for one
OPSET = 18  # the oldest that torch's exporter writes without converting


def check_installed() -> None:
    """Raises ValueError naming what is missing."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ValueError(f"--onnx needs {', '.join(missing)}: pip install 'megabert[onnx]'.")


def write_onnx(model: MegaBertForMaskedLM, folder: Path) -> None:
    """Write onnx/model.onnx, and beside it model.onnx.data with the weights where they are large."""
    check_installed()
    path = folder / FILE
    path.parent.mkdir()
    # Two tensors: of one given twice the exporter makes one input.
    example = torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    # The exporter's own complaints: about its future, and about operations of torchvision.
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
        assert program is not None, "dynamo's exporter returns what it made"
        program.save(path, external_data=None)
