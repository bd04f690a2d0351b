"""Mixed neighbors: the formula in a loop, documents kept apart, initial weights, and Muon's group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megabert.config.recipe import OptimizerConfig
from megabert.convert.hf.native import native_kind
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.embeddings import NeighborMixing
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.model.padding import Sequences, places_in_documents, shift
from megabert.training.updates.optimizers import parameter_groups
from tests.model.helpers.small import SMALL, documents, packed, small_model


def mixing_of(model: MegaBertForMaskedLM) -> NeighborMixing:
    mixing = model.bert.embeddings.neighbors
    assert isinstance(mixing, NeighborMixing)
    return mixing


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(-4, 4))
def test_a_shift_stays_within_the_document(lengths, offset):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(bounds[-1])
    values = torch.arange(1.0, total + 1)[:, None]
    got = shift(values, offset, *places_in_documents(Sequences(bounds, 6), total)).flatten().tolist()
    expected = []
    for start, length in zip(bounds.tolist(), lengths, strict=False):
        row = range(length)
        expected += [float(start + i + offset + 1) if i + offset in row else 0.0 for i in row]
    assert got == expected


def test_a_padded_rows_padding_is_no_neighbor():
    sequences = Sequences(torch.tensor([0, 4, 8], dtype=torch.int32), 4, torch.tensor([2, 0], dtype=torch.int32))
    places, lengths = places_in_documents(sequences, 8)
    got = shift(torch.arange(1.0, 9.0)[:, None], 1, places, lengths).flatten()
    assert got.tolist() == [2, 0, 0, 0, 0, 0, 0, 0]


def test_the_mixture_is_the_formula():
    model = small_model(embedding_neighbors=2)
    mixing, parts = mixing_of(model), documents()
    inputs = packed(parts)
    hidden = torch.randn(len(inputs["input_ids"]), SMALL["hidden_size"], dtype=torch.float64)
    got = mixing(hidden, Sequences(inputs["cu_seqlens"], inputs["max_seqlen"]))
    weights = dict(zip((-1, 1, -2, 2), mixing.maps.parameters(), strict=True))
    norm, rows = dict(mixing.norm.named_parameters()), []
    for part in hidden.split([len(part) for part in parts]):
        for i in range(len(part)):
            total = part[i].clone()
            for offset, weight in weights.items():
                if 0 <= i + offset < len(part):
                    total += weight @ part[i + offset]
            centered = total - total.mean()
            scale = (centered.square().mean() + model.config.layer_norm_eps).rsqrt()
            rows.append(centered * scale * norm["weight"] + norm["bias"])
    torch.testing.assert_close(got, torch.stack(rows), rtol=0, atol=1e-12)


def test_muon_trains_the_maps_but_no_table():
    model = small_model(embedding_neighbors=1)
    groups = parameter_groups(model, OptimizerConfig(name="muon", max_grad_norm=0.0))
    muon = {id(parameter) for parameter in groups[0]["params"]}
    maps = {id(parameter) for parameter in mixing_of(model).maps.parameters()}
    assert maps <= muon
    assert id(model.bert.embeddings.word_embeddings.weight) not in muon


def test_no_class_of_transformers_has_it():
    bert = {"position": "learned", "ffn": "gelu"}
    assert native_kind(MegaBertConfig(**bert)) == "bert"
    assert native_kind(MegaBertConfig(**bert, embedding_neighbors=1)) is None
    with pytest.raises(ValueError, match="embedding_neighbors is -1, expected a whole number from 0"):
        MegaBertConfig(embedding_neighbors=-1)


def test_maps_begin_as_the_other_matrices():
    model = MegaBertForMaskedLM(MegaBertConfig(embedding_neighbors=1, num_hidden_layers=1, initializer_range=0.05))
    for weight in mixing_of(model).maps.parameters():
        assert weight.std().item() == pytest.approx(0.05, rel=0.02)
