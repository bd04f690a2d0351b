"""A small model in fp64, and documents for it, packed and padded."""

import torch

from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM

SMALL = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "hidden_dropout_prob": 0.0,
}
LENGTHS = (1, 7, 12, 7, 2)


def small_model(cls=MegaBertForMaskedLM, **changes):
    """Build a model in fp64 with random parameters, biases included."""
    model = cls(MegaBertConfig(**(SMALL | changes))).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def documents(lengths=LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(5, SMALL["vocab_size"], (length,), generator=generator) for length in lengths]


def packed(parts: list[torch.Tensor]) -> dict:
    bounds = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).int()
    return {"input_ids": torch.cat(parts), "cu_seqlens": bounds, "max_seqlen": max(map(len, parts))}


def padded(parts: list[torch.Tensor]) -> dict:
    rows = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    return {"input_ids": rows, "attention_mask": mask}
