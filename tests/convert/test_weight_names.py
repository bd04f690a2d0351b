"""Weights are renamed to other architectures' names and back without changing a bit."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from megabert.convert.weight_names import TIED_DECODER, WORD_EMBEDDINGS, Kind, from_megabert, to_megabert
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}

# The parameter names of the published checkpoint with one layer, copied from its modules.
MOSAICBERT_NAMES = """
bert.embeddings.word_embeddings.weight bert.embeddings.token_type_embeddings.weight
bert.embeddings.LayerNorm.weight bert.embeddings.LayerNorm.bias
bert.encoder.layer.0.attention.self.Wqkv.weight bert.encoder.layer.0.attention.self.Wqkv.bias
bert.encoder.layer.0.attention.output.dense.weight bert.encoder.layer.0.attention.output.dense.bias
bert.encoder.layer.0.attention.output.LayerNorm.weight bert.encoder.layer.0.attention.output.LayerNorm.bias
bert.encoder.layer.0.mlp.gated_layers.weight bert.encoder.layer.0.mlp.wo.weight bert.encoder.layer.0.mlp.wo.bias
bert.encoder.layer.0.mlp.layernorm.weight bert.encoder.layer.0.mlp.layernorm.bias
cls.predictions.transform.dense.weight cls.predictions.transform.dense.bias
cls.predictions.transform.LayerNorm.weight cls.predictions.transform.LayerNorm.bias
cls.predictions.decoder.weight cls.predictions.decoder.bias
""".split()


def model_of(kind: str, **changes) -> MegaBertForMaskedLM:
    classic = {} if kind == "mosaicbert" else {"position": "learned", "ffn": "gelu"}
    classic |= {"type_vocab_size": 0} if kind == "distilbert" else {}
    model = MegaBertForMaskedLM(MegaBertConfig(**(SHAPE | classic | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases too.
            parameter.normal_()
    return model


def state_dict_of(theirs: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """Rename another masked language model's weights, and add the tied tensor, which a state dict has."""
    weights = to_megabert(theirs, kind).weights
    return weights | {TIED_DECODER: weights[WORD_EMBEDDINGS]}


@pytest.mark.parametrize("kind", ["mosaicbert", "bert", "roberta", "distilbert", "electra"])
def test_there_and_back_changes_no_bit(kind):
    ours = model_of(kind).state_dict()
    theirs = from_megabert(ours, kind)
    back = state_dict_of(theirs, kind)
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(back[name], tensor), name
    again = from_megabert(back, kind)
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.items())
    assert not model_of(kind).load_state_dict(back).missing_keys


def test_mosaicbert_has_the_published_names_and_no_others():
    theirs = from_megabert(model_of("mosaicbert", num_hidden_layers=1).state_dict(), "mosaicbert")
    assert sorted(theirs) == sorted(MOSAICBERT_NAMES)
    assert theirs["bert.encoder.layer.0.attention.self.Wqkv.weight"].shape == (72, 24)
    assert theirs["bert.encoder.layer.0.mlp.gated_layers.weight"].shape == (80, 24)


def test_the_published_mosaicbert_base_has_137_million_parameters():
    with torch.device("meta"):
        model = MegaBertForMaskedLM(MegaBertConfig())
    theirs = from_megabert(model.state_dict(), "mosaicbert")
    del theirs["cls.predictions.decoder.weight"]
    assert sum(tensor.numel() for tensor in theirs.values()) == 137_400_384


@pytest.mark.parametrize("direction", ["from transformers", "to transformers"])
def test_bert_is_transformers_bert(direction):
    theirs = BertForMaskedLM(BertConfig(**SHAPE)).double().eval()
    ours = model_of("bert").double().eval()
    if direction == "from transformers":
        ours.load_state_dict(state_dict_of(theirs.state_dict(), "bert"))
    else:
        assert from_megabert(ours.state_dict(), "bert").keys() == theirs.state_dict().keys()
        theirs.load_state_dict(from_megabert(ours.state_dict(), "bert"))
    ids = torch.randint(0, 60, (3, 17))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-10)


def test_unknown_missing_and_untied_tensors_are_refused():
    theirs = from_megabert(model_of("mosaicbert").state_dict(), "mosaicbert")
    with pytest.raises(ValueError, match="1 unknown: bert.pooler.conv.weight"):
        to_megabert(theirs | {"bert.pooler.conv.weight": torch.zeros(1)}, "mosaicbert")
    fewer = dict(theirs)
    del fewer["bert.encoder.layer.1.mlp.wo.bias"]
    with pytest.raises(ValueError, match="1 missing: bert.encoder.layer.1.mlp.wo.bias"):
        to_megabert(fewer, "mosaicbert")
    with pytest.raises(ValueError, match="not a bert masked language model"):
        to_megabert(theirs, "bert")
    with pytest.raises(ValueError, match="not a megabert as bert masked language model"):
        from_megabert(model_of("mosaicbert").state_dict(), "bert")
    untied = theirs | {"cls.predictions.decoder.weight": torch.zeros(60, 24)}
    with pytest.raises(ValueError, match="cls.predictions.decoder.weight differs from bert.embeddings"):
        to_megabert(untied, "mosaicbert")
