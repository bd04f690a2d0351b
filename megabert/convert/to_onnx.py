"""Write a masked language model as ONNX: padded rows in, padded logits out, any batch and any length.

The model itself computes on tokens without padding, whose number depends on the data, which no graph can say. So the graph is
that of the same layers on all B * S slots, with padded keys masked; logits at padding mean nothing.
"""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from megabert.model.alibi import alibi_slopes
from megabert.model.modeling_megabert import MegaBertForMaskedLM

FILE = "onnx/model.onnx"  # where Hugging Face's tools look for one
OPSET = 18  # the oldest that torch's exporter writes without converting


class PaddedRows(nn.Module):
    """The model on (B, S) rows, in operations that a graph can hold."""

    def __init__(self, model: MegaBertForMaskedLM):
        super().__init__()
        self.model = model
        config = model.config
        slopes = alibi_slopes(config.num_attention_heads) if config.position == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask: (B, S) int64, nonzero at real tokens. Returns logits (B, S, V)."""
        config = self.model.config
        rows, length = input_ids.shape
        real = attention_mask != 0
        lowest = torch.tensor(torch.finfo(torch.float32).min, device=input_ids.device)
        bias = torch.where(real[:, None, None, :], torch.zeros_like(lowest), lowest)  # (B, 1, 1, S)
        if self.slopes is not None:
            place = real.long().cumsum(dim=1)  # distances count real tokens: the model has no others
            bias = (
                bias - self.slopes[:, None, None] * (place[:, None, :, None] - place[:, None, None, :]).abs()
            )  # (B, H, S, S)
            bias = bias.clamp(min=torch.finfo(torch.float32).min)

        def attend(qkv: Tensor, dropout_p: float) -> Tensor:
            query, key, value = qkv.view(rows, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)  # (B, H, S, D) each
            scores = query @ key.transpose(-1, -2) * config.head_dim**-0.5 + bias
            return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).reshape(qkv.shape[0], *qkv.shape[2:])

        positions = torch.arange(length, device=input_ids.device).expand(rows, length).flatten()
        hidden = self.model.bert.embeddings(input_ids.flatten(), None, positions)
        for layer in self.model.bert.encoder.layers:
            hidden = layer(hidden, attend)
        return self.model.decoder(self.model.transform(hidden)).view(rows, length, -1)


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
            PaddedRows(model).eval(),
            example,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes=(sizes, sizes),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None, "dynamo's exporter returns what it made"
        program.save(path, external_data=None)
