"""onnxruntime gives the model's states and logits for any batch size, length and mask."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from megabert.convert.targets import onnx_graphs
from megabert.model.modeling_megabert import (
    MegaBertForMaskedLM,
    MegaBertForQuestionAnswering,
    MegaBertForSequenceClassification,
    MegaBertForTokenClassification,
    MegaBertModel,
)
from tests.convert.helpers.auto_tokenizer import load_auto_tokenizer
from tests.convert.helpers.small_model import BERT, small_model
from tests.model.helpers.architectures import ARCHITECTURES

ROWS = ["batch", "sequence"]


def make_graph(changes, path) -> tuple[MegaBertForMaskedLM, Path]:
    """Write the graph of a model with large attention weights, with which a wrong distance shows."""
    model = small_model(**changes, num_attention_heads=2).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention.qkv.weight"):
                parameter.mul_(5)
    onnx_graphs.write_graph(onnx_graphs.MaskedLmGraph(model), path, ["logits", "last_hidden_state"])
    return model, path


NIGHTLY = ("bert", "roberta", "rope-mosaicbert")
GRAPHS = ["mosaicbert", "modernbert", *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY)]


@pytest.fixture(params=GRAPHS)
def graph(request, served, tmp_path) -> tuple[MegaBertForMaskedLM, Path]:
    """One layer of a ModernBERT is global and one local."""
    if request.param == "mosaicbert":
        return MegaBertForMaskedLM.from_pretrained(served).eval(), served / onnx_graphs.MASKED_LM
    fewer = {"num_hidden_layers": 2, "global_attention_every": 2} if request.param == "modernbert" else {}
    return make_graph(ARCHITECTURES[request.param] | fewer, tmp_path / "model.onnx")


def test_the_graphs_answer_texts_of_any_length(served):
    import onnxruntime

    model, tokenizer = MegaBertForMaskedLM.from_pretrained(served).eval(), load_auto_tokenizer(served)
    session = onnxruntime.InferenceSession(served / onnx_graphs.MASKED_LM)
    encoder = onnxruntime.InferenceSession(served / onnx_graphs.ENCODER)
    shapes = {node.name: node.shape for node in (*session.get_inputs(), *session.get_outputs())}
    inputs = {"input_ids": ROWS, "attention_mask": ROWS}
    assert shapes == inputs | {"logits": [*ROWS, 832], "last_hidden_state": [*ROWS, 24]}
    shapes = {node.name: node.shape for node in (*encoder.get_inputs(), *encoder.get_outputs())}
    assert shapes == inputs | {"last_hidden_state": [*ROWS, 24]}
    questions = [
        "the [MASK] of the module",
        "Returns [MASK].",
        "a list of [MASK], which are not " + "very " * 9 + "long",
    ]
    for texts in (questions, *([question] for question in questions)):
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        feed = {name: inputs[name].numpy() for name in ("input_ids", "attention_mask")}
        got = np.asarray(session.run(["logits"], feed)[0])
        with torch.no_grad():
            expected = model(**inputs).logits.numpy()
        real = feed["attention_mask"].astype(bool)
        np.testing.assert_allclose(got[real], expected[real], rtol=0, atol=1e-4)
        asked = feed["input_ids"] == tokenizer.mask_token_id
        assert (got[asked].argmax(-1) == expected[asked].argmax(-1)).all()


def test_every_mask_gives_the_same_logits(graph):
    """A token is real where the mask is not 0, anywhere in the row."""
    import onnxruntime

    model, path = graph
    session = onnxruntime.InferenceSession(path)
    masks = {
        "whole": torch.ones(3, 40, dtype=torch.int64),
        "one token": torch.ones(1, 1, dtype=torch.int64),
        "padded": (torch.arange(40) < torch.tensor([[40], [7], [1]])).long(),
        "padded on the left": (torch.arange(40) >= torch.tensor([[0], [7], [39]])).long(),
        "with holes": (torch.rand(3, 40) < 0.6).long(),
        "not of ones": (torch.rand(3, 40) < 0.6).long() * torch.randint(-3, 4, (3, 40)),
        "an empty row": torch.tensor([[1, 1, 1], [0, 0, 0]]),
    }
    for name, mask in masks.items():
        ids = torch.randint(5, 800, mask.shape)
        (got,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(ids, mask).logits
            ones = model(ids, (mask != 0).long()).logits
        assert torch.equal(expected, ones), name
        real = mask != 0
        torch.testing.assert_close(torch.from_numpy(got)[real], expected[real], rtol=0, atol=1e-4, msg=name)


def test_a_mask_of_another_shape_is_an_error(graph):
    """Without one, the graph gave states of the mask's shape for the ids' tokens."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    session = onnxruntime.InferenceSession(graph[1])
    ids = torch.randint(5, 800, (2, 6)).numpy()
    for shape in ((1, 6), (2, 1), (1, 1), (2, 5), (2, 7), (3, 6), (6, 2), (1, 12), (12, 1), (4, 3)):
        with pytest.raises((errors.RuntimeException, errors.Fail, errors.InvalidArgument)):
            session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones(shape, dtype=np.int64)})


def edit_initializer(file: str, change, longest: int = 200):
    """Change the largest matrix of a graph with sides of at most `longest`: the table of words has 832 rows."""

    def damage(folder: Path) -> None:
        graph = onnx.load(folder / file)
        tensors = [
            tensor for tensor in graph.graph.initializer if len(tensor.dims) == 2 and max(tensor.dims) <= longest
        ]
        tensor = max(tensors, key=lambda tensor: int(np.prod(tensor.dims)))
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))
        onnx.save(graph, folder / file)

    return damage


def test_the_weights_of_int8_fit_processors_without_vnni(served):
    """There, the sum of two products overflows if weights have 8 bits."""
    graph = onnx.load(served / "onnx/model_quantized.onnx").graph
    quantized = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    largest = [np.abs(numpy_helper.to_array(tensor).astype(int)).max() for tensor in quantized]
    assert len(largest) > 5
    assert 60 <= max(largest) <= 64


DAMAGES = {
    "a wrong weight": ("onnx", edit_initializer("onnx/model.onnx", lambda matrix: matrix * np.float32(1.01))),
    "swapped halves": ("onnx", edit_initializer("onnx/model_mlm.onnx", lambda matrix: np.roll(matrix, 40, -1).copy())),
    "int8": ("onnx-int8", edit_initializer("onnx/model_quantized.onnx", lambda words: np.roll(words, 1, 0), 832)),
    "no graph": ("onnx", lambda folder: (folder / "onnx/model.onnx").write_bytes(b"no graph")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(write_damaged, name):
    target, damage = DAMAGES[name]
    assert any(word in write_damaged(target, damage) for word in ("differ by", "mean cosine", "cannot run"))


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (MegaBertModel, {}),
        (MegaBertForSequenceClassification, BERT),
        (MegaBertForSequenceClassification, {"classifier_pooling": "mean"}),
        (MegaBertForTokenClassification, {"padding": "padded"}),
        (MegaBertForQuestionAnswering, {}),
    ],
)
def test_the_graph_of_every_head_gives_the_same_outputs(cls, changes):
    model = small_model(cls=cls, **changes).eval()
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    shapes = {"input_ids": sizes, "attention_mask": sizes}
    graph = torch.export.export(model, example, dynamic_shapes=shapes).module()
    for shape in ((1, 1), (3, 40)):
        ids, mask = torch.randint(5, 800, shape), (torch.rand(shape) < 0.6).long()
        mask[:, 0] = 1
        with torch.no_grad():
            got, expected = graph(ids, mask), model(ids, mask)
        for name, value in expected.items():
            # Outputs at padding are meaningless.
            real = mask != 0 if value.shape[:2] == shape else slice(None)
            torch.testing.assert_close(got[name][real], value[real], rtol=0, atol=1e-5, msg=name)
