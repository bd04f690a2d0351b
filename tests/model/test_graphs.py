"""torch.jit.trace and torch.compile: one graph for every batch size, length and mask, with the model's outputs."""

import pytest
import torch

from megabert.model.modeling_megabert import (
    MegaBertForMaskedLM,
    MegaBertForQuestionAnswering,
    MegaBertForSequenceClassification,
    MegaBertForTokenClassification,
    MegaBertModel,
)
from tests.helpers.cases import cases
from tests.model.helpers.small import SMALL, documents, padded, small_model

CASES = [
    (MegaBertModel, {}),
    (MegaBertForMaskedLM, {}),
    (MegaBertForMaskedLM, {"embedding_neighbors": 2}),
    (MegaBertForSequenceClassification, {"position": "learned", "ffn": "gelu"}),
    (MegaBertForSequenceClassification, {"classifier_pooling": "mean"}),
    (MegaBertForTokenClassification, {"padding": "padded"}),
    (MegaBertForQuestionAnswering, {}),
]
SHAPES = [(2, 6), (3, 9), (5, 12), (4, 7), (1, 1)]


def rows(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and a mask with holes; the last of several rows is empty."""
    mask = (torch.rand(batch, length) < 0.7).long()
    mask[:, 0] = 1
    if batch > 1:
        mask[-1] = 0
    return torch.randint(5, SMALL["vocab_size"], (batch, length)), mask


def assert_same_outputs(graph, model) -> None:
    """Compare everywhere: outputs at padding and of empty rows are those of the model, too."""
    for shape in SHAPES:
        ids, mask = rows(*shape)
        with torch.no_grad():
            got, expected = graph(ids, mask), model(ids, mask)
        assert list(got) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("cls", "changes"), CASES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_gives_the_models_outputs(cls, changes, attention):
    model = small_model(cls, **changes).eval()
    model.config._attn_implementation = attention
    assert_same_outputs(torch.jit.trace(model, rows(2, 6), strict=False), model)


@pytest.mark.parametrize(
    ("cls", "changes", "attention"),
    cases(
        per_push=[(MegaBertForMaskedLM, {}, "sdpa")],
        nightly=[(*case, attention) for case in CASES for attention in ("sdpa", "eager")],
    ),
)
def test_compiling_gives_one_graph_for_all_shapes(cls, changes, attention):
    """fullgraph=True allows no break. A batch or length of 1 has a graph of its own, as in every compiled model."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small_model(cls, **changes).eval()
    model.config._attn_implementation = attention
    assert_same_outputs(torch.compile(model, fullgraph=True, dynamic=True, backend="eager"), model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.nightly)])
def test_a_compiled_model_trains_with_dropout(backend):
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    torch._dynamo.reset()
    graph = torch.compile(small_model(**rates, num_hidden_layers=1), fullgraph=True, dynamic=True, backend=backend)
    inputs = padded(documents())
    losses = [graph(**inputs, labels=inputs["input_ids"]).loss for _ in range(2)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_compiled_model_trains_as_the_model_does(layers):
    """Labels at padding count in neither."""
    inputs = padded(documents())
    labels = inputs["input_ids"].clone()
    plain, compiled = (small_model(num_hidden_layers=layers) for _ in range(2))
    torch._dynamo.reset()
    graph = torch.compile(compiled, fullgraph=True, dynamic=True, backend="aot_eager")
    losses = [model(**inputs, labels=labels).loss for model in (plain, graph)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
