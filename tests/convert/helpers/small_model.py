"""Small models in which every parameter is random, including biases."""

import torch

from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM

SHAPE = {
    "vocab_size": 832,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
}
BERT = {"position": "learned", "ffn": "gelu"}


def small_model(seed: int = 0, cls=MegaBertForMaskedLM, **changes):
    """Make a model whose vocabulary fits the corpus's tokenizer."""
    model = cls(MegaBertConfig(**(SHAPE | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.2)
    return model
